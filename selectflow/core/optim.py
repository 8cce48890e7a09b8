"""AdamW and SGD as pure functions: one update, and the adjoint of one update.

Before update n the state is (theta, m, v); g is the gradient of the batch, after clipping.
With c1 = 1 - beta1^n and c2 = 1 - beta2^n, `torch.optim.AdamW` computes

    m'     = beta1 m + (1 - beta1) g
    v'     = beta2 v + (1 - beta2) g^2
    theta' = (1 - lr wd) theta - (lr / c1) m' / q          q = sqrt(v') / sqrt(c2) + eps

Let (a', b', c') be the derivatives of a scalar, the target loss, in (theta', m', v'). The chain
rule, read from the last line to the first, gives

    b      = b' - (lr / c1) a' / q                         derivative in m'
    c      = c' + (lr / c1) a' m' / (2 q^2 sqrt(v' c2))    derivative in v'; 0 where v' = 0
    gamma  = (1 - beta1) b + 2 (1 - beta2) g c             derivative in g: the sensitivity
    a_prev = (1 - lr wd) a' + H gamma                      H: Hessian of the batch loss at theta
    b_prev = beta1 b
    c_prev = beta2 c

`adjoint` returns all but H gamma, which needs the model; `lookahead` adds it. The equations are
those of Deng et al. 2026 (arXiv 2605.18814) for AdamW without eps_root, as torch computes it.

`Adam` differs in one line (weight decay is part of the gradient), SGD has only m, the momentum
buffer. Adjoints may carry leading query dimensions; states and gradients never do.

Clipping by norm, `torch.nn.utils.clip_grad_norm_`, makes g of the batch's own gradient u:

    g       = s u,  s = limit / (|u| + 1e-6)  where that is below 1; else g = u
    dg      = s du + u ds,  ds = - s d|u| / (|u| + 1e-6),  d|u| = (u . du) / |u|
    gamma_u = s (gamma - u (u . gamma) / (|u| (|u| + 1e-6)))

so that almost nothing is left of gamma along u: what is clipped cannot grow longer. In the sweep
gamma_u stands for gamma, in H gamma too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from selectflow.core.params import Params, merge
from selectflow.core.pieces import in_pieces
from selectflow.distributed import over_shards

# Bytes of parameters that an update is made of at a time: as many as a processor's caches hold with
# their temporaries, and more on a device, where each kernel has a start of its own.
_PART_BYTES, _DEVICE_PART_BYTES = 2**22, 2**26
_CLIP_EPS = 1e-6  # torch's, in the norm that it divides by
# A gradient of this share of the model's typical one is float32 rounding, not a signal. The measure
# is the whole model: of a bias that batch norm cancels, all entries are rounding.
NEGLIGIBLE_SHARE = 1e-6


_Found = TypeVar("_Found")


class State(NamedTuple):
    """What one update reads and writes. `exp_avg` is SGD's momentum buffer; unused parts: empty."""

    params: Params
    exp_avg: Params
    exp_avg_sq: Params


Adjoint = State
"""Derivatives of the target loss in the entries of a `State`."""

_NOTHING = State(Params(), Params(), Params())


class Rule(Protocol):
    """One group of parameters that share hyperparameters and step count."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def lr(self) -> float: ...
    def advance(self, state: State, grad: Params) -> State: ...
    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]: ...
    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params: ...
    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params: ...


@dataclass(frozen=True)
class AdamW:
    """AdamW's update number `step` (the first is 1) of the parameters `names`."""

    names: tuple[str, ...]
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True  # False: torch.optim.Adam, which adds wd * theta to the gradient

    @property
    def c1(self) -> float:
        return 1 - self.beta1**self.step

    @property
    def c2(self) -> float:
        return 1 - self.beta2**self.step

    @property
    def decay(self) -> float:
        """Factor on theta in the last line of the update."""
        return 1 - self.lr * self.weight_decay if self.decoupled else 1.0

    def _grad(self, state: State, grad: Params) -> Params:
        coupled = not self.decoupled and self.weight_decay
        return grad.add(state.params, self.weight_decay) if coupled else grad

    def advance(self, state: State, grad: Params) -> State:
        grad = self._grad(state, grad)
        m = (self.beta1 * state.exp_avg).add(grad, 1 - self.beta1)
        v = (self.beta2 * state.exp_avg_sq).add(grad * grad, 1 - self.beta2)
        q = v.sqrt() / math.sqrt(self.c2) + self.eps
        return State((self.decay * state.params).add(m / q, -self.lr / self.c1), m, v)

    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]:
        grad = self._grad(state, grad)
        root = after.exp_avg_sq.sqrt()
        q = root / math.sqrt(self.c2) + self.eps
        pull = adjoint.params / q * (self.lr / self.c1)
        slope = (after.exp_avg / q / root).map(lambda x: torch.where(x.isfinite(), x, 0.0))
        b = adjoint.exp_avg - pull
        c = adjoint.exp_avg_sq.add(pull * slope, 0.5 / math.sqrt(self.c2))
        gamma = ((1 - self.beta1) * b).add(grad * c, 2 * (1 - self.beta2))
        a = self.decay * adjoint.params
        if not self.decoupled and self.weight_decay:
            a = a.add(gamma, self.weight_decay)
        return gamma, Adjoint(a, self.beta1 * b, self.beta2 * c)

    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params:
        """Sensitivity at horizon 0: the present preconditioner, nothing simulated.

        An entry that has had no gradient (an input that was never on, a bias that batch norm
        cancels in training) has no preconditioner: 1 / eps would let it drown all others, so its
        sensitivity is taken as 0. Before the first step no entry has one, and the gradient
        itself gives the direction.
        """
        scale = -(1 - self.beta1) * self.lr / self.c1
        num = self.step - 1  # the updates that made exp_avg_sq
        if not num:
            return scale * grad
        q = state.exp_avg_sq.sqrt() / math.sqrt(1 - self.beta2**num) + self.eps
        return scale * self._masked(grad / q, state.exp_avg_sq, num, typical)

    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params:
        return self._masked(gamma, after.exp_avg_sq, self.step, typical)

    def _masked(self, gamma: Params, exp_avg_sq: Params, num: int, typical: Tensor) -> Params:
        """0 where the second moment after `num` updates is negligible.

        Not where eps rules all entries: then 1 / eps is the scale of each, of dead ones too.
        """
        negligible = (NEGLIGIBLE_SHARE * typical) ** 2 * (1 - self.beta2**num)
        negligible = torch.where(typical > self.eps, negligible, -1.0)
        return Params(
            (name, torch.where(exp_avg_sq[name] <= negligible, 0.0, x)) for name, x in gamma.items()
        )


@dataclass(frozen=True)
class SGD:
    """SGD's update number `step` (1 where the momentum buffer is empty) of `names`.

    d = g + wd theta;  m' = momentum m + (1 - dampening) d  (m' = d at step 1);
    theta' = theta - lr u,  u = m', or d + momentum m' with nesterov, or d without momentum.
    """

    names: tuple[str, ...]
    step: int
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @property
    def mix(self) -> tuple[float, float]:
        """The shares of m and of d in m'."""
        return (0.0, 1.0) if self.step == 1 else (self.momentum, 1 - self.dampening)

    def advance(self, state: State, grad: Params) -> State:
        d = grad.add(state.params, self.weight_decay)
        if not self.momentum:
            return State(state.params.add(d, -self.lr), state.exp_avg, state.exp_avg_sq)
        keep, new = self.mix
        m = (keep * state.exp_avg).add(d, new)
        u = d.add(m, self.momentum) if self.nesterov else m
        return State(state.params.add(u, -self.lr), m, state.exp_avg_sq)

    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]:
        del state, after, grad  # the update is linear
        pull = -self.lr * adjoint.params
        b = adjoint.exp_avg
        if not self.momentum:
            gamma = pull
        else:
            keep, new = self.mix
            b = b.add(pull, self.momentum if self.nesterov else 1.0)
            gamma = new * b + pull if self.nesterov else new * b
            b = keep * b
        return gamma, Adjoint(adjoint.params.add(gamma, self.weight_decay), b, adjoint.exp_avg_sq)

    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params:
        """Sensitivity at horizon 0: the gradient itself, scaled by this update's reach."""
        del typical
        zeros = Adjoint(grad, *(part.zeros_like() for part in state[1:]))
        return self.adjoint(zeros, state, state, grad)[0]

    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params:
        del after, typical  # nothing is divided by a second moment
        return gamma


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


def part_of(state: State, names: Sequence[str]) -> State:
    """The entries of a state with these names; a moment that is not there stays empty."""
    return State(*(params.pick(names) if params else params for params in state))


def join(states: Iterable[State]) -> State:
    """States of disjoint names as one."""
    return State(*(merge(fields) for fields in zip(*states, strict=True)))


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
