"""One optimizer update of all parameters: rules of `optim` by group, after clipping by norm.

Clipping by norm, `torch.nn.utils.clip_grad_norm_`, makes g of the batch's own gradient u:

    g       = s u,  s = limit / (|u| + 1e-6)  where that is below 1; else g = u
    dg      = s du + u ds,  ds = - s d|u| / (|u| + 1e-6),  d|u| = (u . du) / |u|
    gamma_u = s (gamma - u (u . gamma) / (|u| (|u| + 1e-6)))

so that almost nothing is left of gamma along u: what is clipped cannot grow longer. In the sweep
gamma_u stands for gamma, in H gamma too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from selectflow.core.optim import SGD, AdamW, Adjoint, Rule, State, join, part_of
from selectflow.core.params import Params, merge
from selectflow.core.pieces import in_pieces
from selectflow.distributed import over_shards

# Bytes of parameters that an update is made of at a time: as many as a processor's caches hold with
# their temporaries, and more on a device, where each kernel has a start of its own.
_PART_BYTES, _DEVICE_PART_BYTES = 2**22, 2**26
_CLIP_EPS = 1e-6  # torch's, in the norm that it divides by
_NOTHING = State(Params(), Params(), Params())
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Update:
    """One optimizer update of all parameters: a rule per group, after clipping by norm."""

    rules: tuple[Rule, ...]
    max_grad_norm: float | None = None

    def clip_scale(self, grad: Params) -> float:
        """The factor that `torch.nn.utils.clip_grad_norm_` applies to a gradient."""
        if self.max_grad_norm is None or not grad:
            return 1.0
        return min(1.0, self.max_grad_norm / (grad.norm() + _CLIP_EPS))

    def at_rate(self, factor: float) -> Update:
        """The same update at `factor` times the learning rate; decoupled decay follows it."""
        rules = []
        for rule in self.rules:
            assert isinstance(rule, AdamW | SGD)
            rules.append(dataclasses.replace(rule, lr=factor * rule.lr))
        return dataclasses.replace(self, rules=tuple(rules))

    def step_of(self, name: str) -> int:
        """The number of this update of a parameter."""
        return next(rule.step for rule in self.rules if name in rule.names)

    def earlier(self, names: Collection[str]) -> Update:
        """The same update, which is one number lower for `names`."""
        rules: list[Rule] = []
        for rule in self.rules:
            assert isinstance(rule, AdamW | SGD)
            for is_late in (False, True):
                part = tuple(name for name in rule.names if (name in names) == is_late)
                if part:
                    rules.append(dataclasses.replace(rule, names=part, step=rule.step - is_late))
        return dataclasses.replace(self, rules=tuple(rules))

    def advance(self, state: State, grad: Params) -> State:
        """State after the update.

        Args:
            state: state before it, one tensor a parameter.
            grad: mean gradient of the batch, before clipping; a parameter that is not in it is
                skipped, as torch skips one whose `grad` is None.

        Returns:
            A new `State`; the inputs are untouched.
        """
        grad = _scaled(grad, self.clip_scale(grad))
        moved = [
            _in_pieces(rule.advance, part_of(state, names), grad.pick(names))
            for rule, names in self.parts(grad)
        ]
        skipped = [name for name in state.params if name not in grad]
        return join([*moved, part_of(state, skipped)] if skipped else moved)

    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params, carry: bool = True
    ) -> tuple[Params, Adjoint]:
        """Sensitivity and adjoint before the update, without the Hessian term.

        Args:
            adjoint: derivatives (a', b', c') of the target loss in the state after the update;
                tensors may have leading query dimensions.
            state: the state before the update.
            after: the state after it, as `advance` returned it.
            grad: the gradient it was made with, before clipping. A parameter that is not in it
                was skipped: its adjoint passes by, and gamma is of the update that a first
                gradient would have made.
            carry: whether the adjoint before the update is asked for; it is empty if not.

        Returns:
            gamma, d target / d grad (the gradient before clipping, whose norm the clip factor
            follows), and (a, b, c) before the update with a still lacking H gamma.
        """
        scale = self.clip_scale(grad)
        applied = _scaled(grad, scale)
        gammas: list[Params] = []
        earlier = [_NOTHING]  # all there is if nothing is carried
        for rule, names, is_skipped in self._parts_apart(adjoint.params, grad):
            back, now, then = (part_of(each, names) for each in (adjoint, state, after))
            made_with = now.params.zeros_like() if is_skipped else applied.pick(names)
            if is_skipped:
                then = _in_pieces(rule.advance, now, made_with)
            derive = rule.adjoint if carry and not is_skipped else partial(_sensitivity, rule)
            gamma, before = _in_pieces(derive, back, now, then, made_with)
            gammas.append(gamma)
            if carry:
                earlier.append(back if is_skipped else before)
        gamma = merge(gammas)
        if scale < 1.0:
            gamma = _through_clipping(gamma, grad, scale)
        return gamma, join(earlier)

    def _parts_apart(self, params: Params, grad: Params) -> Iterator[tuple[Rule, list[str], bool]]:
        """`parts` of those that have a gradient, and of those that have none."""
        yield from ((*part, False) for part in self.parts(params.pick(grad)))
        skipped = [name for name in params if name not in grad]
        yield from ((*part, True) for part in self.parts(params.pick(skipped)))

    def immediate(self, state: State, grad: Params) -> Params:
        """Sensitivity at horizon 0: target gradient `grad` through the present preconditioner.

        Every entry has its own: `grad` may be that of some of the parameters only.
        """
        typical = self.typical(state, 1)
        return merge(
            _in_pieces(
                partial(rule.immediate, typical=typical), part_of(state, names), grad.pick(names)
            )
            for rule, names in self.parts(grad)
        )

    def masked(self, gamma: Params, after: State) -> Params:
        """Gamma for scoring examples that the update has not seen: 0 at negligible entries.

        At an entry whose second moment is 0, d theta' / d g is lr / eps, true only for |g| << eps.
        A new example with a real gradient there would be scored by that alone.

        Args:
            gamma: sensitivity of this update.
            after: the state after it.

        Returns:
            gamma, with 0 where the root of the second moment is below `NEGLIGIBLE_SHARE` of the
            model's `typical` gradient, unless that is below eps.
        """
        typical = self.typical(after)
        return merge(
            rule.masked(gamma.pick(names), part_of(after, names), typical)
            for rule, names in self.parts(gamma)
        )

    def typical(self, state: State, ago: int = 0) -> Tensor:
        """Root mean square of the model's gradients, over all entries, by the second moments.

        Args:
            state: the state after this update.
            ago: how many updates before that it is.

        Returns:
            A number, shape (), which stays on the device.
        """
        total, size = torch.zeros((), device=state.params.device), 0
        for rule in self.rules:
            num = rule.step - ago
            seen = [state.exp_avg_sq[name] for name in rule.names if name in state.exp_avg_sq]
            if isinstance(rule, AdamW) and num and seen:
                sums = torch.stack(torch._foreach_norm(seen, 1))
                total = total + sums.sum() / (1 - rule.beta2**num)
                size += sum(v.numel() for v in seen)
        total, num_entries = over_shards(torch.stack([total, total.new_tensor(size)]))
        return torch.sqrt(total / num_entries.clamp(min=1))

    def parts(self, params: Params) -> Iterator[tuple[Rule, list[str]]]:
        """Rules and names of `params` that each is applied to, so many at a time.

        An update makes up to a dozen temporaries of all that it is applied to. Of a large model
        they are of a part only, of a small one the part is everything.
        """
        for rule in self.rules:
            names: list[str] = []
            size = 0
            for name in filter(params.__contains__, rule.names):
                size += params[name].nbytes
                if names and size > _most_bytes(params):
                    yield rule, names
                    names, size = [], params[name].nbytes
                names.append(name)
            if names:
                yield rule, names


def after_skipping(updates: Sequence[Update], index: int, grad: Params) -> Sequence[Update]:
    """A window's updates where update `index` skipped what is not in `grad`.

    Numbers of later updates that count the skipped one fall by one; those that an optimizer gave
    one by one know already.
    """
    if index + 1 >= len(updates):
        return updates
    now, following = updates[index : index + 2]
    late = {
        name
        for rule in following.rules
        for name in rule.names
        if name not in grad and rule.step > now.step_of(name)
    }
    if not late:
        return updates
    return [*updates[: index + 1], *(update.earlier(late) for update in updates[index + 1 :])]


def _most_bytes(params: Params) -> int:
    return _PART_BYTES if params.device.type == "cpu" else _DEVICE_PART_BYTES


def _in_pieces(function: Callable[..., _Found], of: State | Params, *others: Any) -> _Found:
    """An elementwise function, of a tensor that is larger than a part in pieces of that size."""
    params = of if isinstance(of, Params) else of.params
    return in_pieces(function, _most_bytes(params), of, *others)


def _sensitivity(rule: Rule, *of: Any) -> tuple[Params, Adjoint]:
    """The adjoint of a rule, whose second part is not kept."""
    return rule.adjoint(*of)[0], _NOTHING


def _scaled(params: Params, scale: float) -> Params:
    return params if scale == 1.0 else scale * params


def _through_clipping(gamma: Params, grad: Params, scale: float) -> Params:
    """Derivative in `grad`, from gamma in `scale * grad`, where the scale follows |grad|."""
    norm = grad.norm()
    parts = torch.stack([_query_dot(gamma[name], u) for name, u in grad.items()])
    along = over_shards(parts.sum(0))
    share = along / (norm * (norm + _CLIP_EPS))
    part = grad.map(lambda u: share.reshape(share.shape + (1,) * u.ndim) * u)
    return scale * gamma.moved(part, -1.0)


def _query_dot(queries: Tensor, other: Tensor) -> Tensor:
    """Inner product of each query with `other`; shape: the leading dimensions of the queries."""
    leading = queries.shape[: queries.ndim - other.ndim]
    return (queries * other).reshape((*leading, -1)).sum(-1)
