"""Derivatives of the user's per-example losses: pool scores, gradients, Hessian-vector products.

Each directional derivative exists in two forms. `exact` is forward-mode differentiation through
`torch.func`. `central` is a central difference of plain passes,

    d loss / d direction  ~  (loss(theta + e direction) - loss(theta - e direction)) / 2e

which costs two forward passes for a whole pool, works with every kernel, and has an error that
falls with e^2 until rounding takes over. e is set so that |e direction| is a fixed share of
|theta|; one share does not serve both uses, see `directions`. `auto` takes central differences
where a check on a few examples finds them right, since they are the cheaper form on every model
measured, and the exact form otherwise.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectflow.core.batches import Batch, chunks, num_examples
from selectflow.core.chunks import Chunks, ChunkSize, Pass
from selectflow.core.directions import has_queries, over_queries, split, step_size
from selectflow.core.params import Params
from selectflow.core.passes import Objective, check_finite

Method = Literal["auto", "exact", "central"]
Curvature = Literal["exact", "fisher", "none"]

_log = logging.getLogger(__name__)

# as torch says that a model has no forward mode, or no derivative of a derivative
_NO_FORWARD_MODE = (
    "forward AD", "forward mode AD", "functorch", "functional transforms", "saved tensor hooks",
    "vmap", "is not implemented", "Double backwards", "data pointer",
)  # fmt: skip
_NUM_CHECKED = 8  # examples on which the two forms are compared
# Relative error at which central differences still rank a pool rightly: up to it, Spearman with the
# exact form was 0.99 and more (tests/benchmarks/derivative_agreement.py). A Hessian product is a
# correction to the adjoint, and across the kinks of ReLU the two forms need not agree.
_TOLERANCE = 0.05


@dataclass
class Forms:
    """Which form, "exact" or "central", derivatives have.

    Attributes:
        decided: the form by use, "losses" and "gradients", from the first use on.
        unchecked: uses whose next one is to check that the form is right.
    """

    decided: dict[str, str] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=set)

    def recheck(self) -> None:
        """Let the next use of each form check again that it is right."""
        self.unchecked = set(self.decided)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {"decided": dict(self.decided), "unchecked": sorted(self.unchecked)}

    def load(self, plain: Mapping[str, Any]) -> None:
        """Go on from `plain`."""
        self.decided, self.unchecked = dict(plain["decided"]), set(plain["unchecked"])


class Derivatives:
    """Directional derivatives of an objective, by one method, a chunk of examples at a time.

    Args:
        objective: the per-example losses.
        method: "exact", "central" or "auto": decided at the first use, for losses and gradients
            apart, and kept in `forms`.
        chunk_size: examples per pass; None: all at once; "auto": as many as a pass of its kind
            takes within `memory_gib`, see `chunking`.
        memory_gib: limit for "auto", in GiB; None: 1, or what one example takes.
        forms: what was decided before; None: nothing.
    """

    def __init__(
        self,
        objective: Objective,
        method: Method = "auto",
        chunk_size: ChunkSize = None,
        memory_gib: float | None = None,
        forms: Forms | None = None,
    ) -> None:
        if method not in ("auto", "exact", "central"):
            raise ValueError(f"derivative must be 'auto', 'exact' or 'central', got {method!r}")
        self.objective = objective
        self._chunks = Chunks(objective, chunk_size, memory_gib)
        self.method = method
        self.forms = forms or Forms()
        self._is_said = False  # that there is no forward mode

    # --- the quantities -------------------------------------------------------------------

    @torch.no_grad()
    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Loss of each example, shape (N,), without a graph."""
        losses = self._losses(params, batch)
        check_finite("losses", losses, batch)
        return losses

    def _losses(self, params: Params, batch: Batch) -> Tensor:
        parts = [self.objective.losses(params, part) for part in self._chunks.of(params, batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradient(
        self,
        params: Params,
        batch: Batch,
        weights: Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> tuple[float, Params]:
        """Weighted sum of the losses and its gradient.

        Args:
            params: where to differentiate.
            batch: N examples.
            weights: shape (N,); None: 1/N each, the batch mean.
            names: parameters to differentiate in; None: all.

        Returns:
            The sum of weights * losses, and its gradient by parameter.
        """
        if weights is not None:
            losses, grad = self.gradients(params, batch, weights, names)
            return float((losses * weights.to(losses)).sum()), grad
        size = num_examples(batch)
        losses, grad = self._vjp(
            params,
            batch,
            lambda losses, _: torch.full_like(losses, 1 / size),
            names,
        )
        return losses.mean().item(), grad

    def gradients(
        self,
        params: Params,
        batch: Batch,
        weights: Tensor,
        names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Params]:
        """Gradients of one or several weighted sums of the losses, from one forward pass.

        Args:
            params: where to differentiate.
            batch: N examples.
            weights: shape (N,), or (Q, N) for Q sums.
            names: parameters to differentiate in; None: all.

        Returns:
            The losses, shape (N,), and the gradients, with a leading dimension Q where weights
            have it.
        """

        def part(losses: Tensor, start: int) -> Tensor:
            return weights[..., start : start + len(losses)].to(losses)

        return self._vjp(params, batch, part, names)

    def _vjp(
        self,
        params: Params,
        batch: Batch,
        weigh: Callable[[Tensor, int], Tensor],
        names: Sequence[str] | None,
    ) -> tuple[Tensor, Params]:
        """Losses, and gradient of their sum as `weigh(losses of a chunk, its start)` weighs it."""
        names = list(params) if names is None else names
        total, values, start = None, [], 0
        for part in self._chunks.of(params, batch):

            def weigh_part(losses: Tensor, start: int = start) -> Tensor:
                return weigh(losses, start)

            losses, grads = self.objective.gradients(params, part, weigh_part, names)
            # Parameters that the loss does not use have a gradient of zero.
            leading = weigh_part(losses).shape[:-1]
            grad = Params(
                (name, _in_type_of(params[name], grad, leading)) for name, grad in grads.items()
            )
            total = grad if total is None else total + grad
            values.append(losses)
            start += len(losses)
        assert total is not None
        return torch.cat(values), total

    @torch.no_grad()
    def directional(self, params: Params, direction: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses of the examples and their derivatives along a direction.

        Args:
            params: where to differentiate.
            direction: same shapes, any length, of all or some of the parameters, the others held;
                a leading dimension holds Q of them.
            batch: N examples.

        Returns:
            losses, shape (N,), and sum(d loss / d params * direction), shape (N,) or (Q, N).
        """
        method = self._decide("losses", params, direction, batch)
        form = self._directional_exact if method == "exact" else self._directional_central
        losses, slopes = form(params, direction, batch)
        check_finite("losses", losses, batch)
        check_finite("derivatives of the losses", slopes, batch)
        return losses, slopes

    def hessian_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """H direction, with H the Hessian of the batch's mean loss; for Q directions at once."""
        method = self._decide("gradients", params, direction, batch)
        if method == "central":
            return self._hessian_central(params, direction, batch)
        return self._hessian_exact(params, direction, batch)

    def fisher_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """F direction, with F = mean over examples of g g^T, the empirical Fisher matrix.

        g g^T direction = (slope along direction) g, so F direction is the gradient of the
        losses weighted by their slopes: no per-example gradient is formed.
        """
        _, slopes = self.directional(params, direction, batch)
        return self.gradients(params, batch, slopes / slopes.shape[-1])[1]

    # --- the two forms --------------------------------------------------------------------

    def _directional_exact(
        self, params: Params, direction: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        def both(part: Batch) -> tuple[Tensor, Tensor]:
            def toward(to: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                at = dict(params.pick(to))
                losses, slopes = torch.func.jvp(
                    lambda p: self.objective.pure(params | p, part), (at,), (to,)
                )[:2]
                return losses, slopes

            return over_queries(toward, params, direction, (None, 0))

        params = self.objective.apart(params)
        by = Pass("slopes", _num_queries(params, direction), both)
        with plain_attention(), self.objective.restored():
            parts = self._chunks.of(params, batch, by=by)
            losses, slopes = zip(*map(both, parts), strict=True)
        return torch.cat(losses), torch.cat(slopes, -1)

    def _directional_central(
        self, params: Params, direction: Params, batch: Batch, shrink: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        if has_queries(params, direction):
            each = [
                self._directional_central(params, one, batch, shrink) for one in split(direction)
            ]
            return each[0][0], torch.stack([slopes for _, slopes in each])
        step = shrink * step_size(params, direction, 0)
        if step == 0:
            losses = self._losses(params, batch)
            return losses, torch.zeros_like(losses)
        ahead = self._losses(params.moved(direction, step), batch)
        behind = self._losses(params.moved(direction, -step), batch)
        return (ahead + behind) / 2, (ahead - behind) / (2 * step)

    def _hessian_exact(self, params: Params, direction: Params, batch: Batch) -> Params:
        def product(part: Batch) -> dict[str, Tensor]:
            gradient = torch.func.grad(lambda p: self.objective.pure(p, part).sum())

            def bent(to: dict[str, Tensor]) -> dict[str, Tensor]:
                found: dict[str, Tensor] = torch.func.jvp(gradient, (dict(params),), (to,))[1]
                return found

            return over_queries(bent, params, direction, 0)

        params = self.objective.apart(params)
        size, total = num_examples(batch), direction.zeros_like()
        by = Pass("products", _num_queries(params, direction), product)
        with plain_attention(), self.objective.restored():
            for part in self._chunks.of(params, batch, by=by):
                total = total.add(Params(product(part)).detach(), 1 / size)
        return total

    def _hessian_central(
        self, params: Params, direction: Params, batch: Batch, shrink: float = 1.0
    ) -> Params:
        if has_queries(params, direction):
            each = [self._hessian_central(params, one, batch, shrink) for one in split(direction)]
            return Params((name, torch.stack([one[name] for one in each])) for name in direction)
        step = shrink * step_size(params, direction, 1)
        if step == 0:
            return direction.zeros_like()
        _, ahead = self.gradient(params.add(direction, step), batch)
        _, behind = self.gradient(params.add(direction, -step), batch)
        return (ahead - behind) / (2 * step)

    # --- choosing between them ------------------------------------------------------------

    def _decide(self, use: str, params: Params, direction: Params, batch: Batch) -> str:
        if self.method == "central":
            return "central"
        if self.method == "exact":
            self._check_forward_mode(use, params, direction, batch)
            return "exact"
        if use not in self.forms.decided or use in self.forms.unchecked:
            if has_queries(params, direction):
                direction = next(split(direction))
            if not direction.norm():  # any form is right: the next use decides
                return self.forms.decided.get(use, "central")
            few = next(chunks(batch, _NUM_CHECKED))
            form, why = self._compare(use, params, direction, few)
            if form != self.forms.decided.get(use):
                _log.info("derivatives of %s: %s (%s)", use, form, why)
            self.forms.decided[use] = form
            self.forms.unchecked.discard(use)
        return self.forms.decided[use]

    def _check_forward_mode(
        self, use: str, params: Params, direction: Params, batch: Batch
    ) -> None:
        """Try the exact form on one example, once."""
        if use in self.forms.decided:
            return
        try:
            one = next(self._chunks.of(params, batch, 1))
            self._flat(use, params, direction, one)("exact", 1.0)
        except RuntimeError as error:
            if not _lacks_forward_mode(error):
                raise
            raise RuntimeError(
                f"a model with derivative 'exact' must have forward mode, got: {_reason(error)}; "
                "use 'auto' or 'central'"
            ) from error
        self.forms.decided[use] = "exact"

    def _compare(
        self, use: str, params: Params, direction: Params, batch: Batch
    ) -> tuple[str, str]:
        """The form to use, and why: central where it agrees with the exact form, or itself."""
        flat = self._flat(use, params, direction, batch)
        central = flat("central", 1.0)
        try:
            reference, against = flat("exact", 1.0), "the exact form"
        except RuntimeError as error:
            if not _lacks_forward_mode(error):  # as where memory does not suffice
                error.add_note("in forward mode, which derivative='central' does without")
                raise
            reference, against = flat("central", 0.5), "half the step"
            if not self._is_said:
                _log.info("no forward-mode derivative of this model (%s)", _reason(error))
                self._is_said = True
        apart = _apart(central, reference)
        if use == "losses":
            # What all examples share moves no rank, however large: what tells them apart counts.
            about_mean = [slopes - slopes.mean() for slopes in (central, reference)]
            apart = max(apart, _apart(*about_mean))
        agrees = apart <= _TOLERANCE
        if not agrees and against == "half the step":
            raise FloatingPointError(
                f"central differences of {use} must agree to {_TOLERANCE:.0%} between a "
                f"step and half of it, got {apart:.1%}, and the model has no forward-mode "
                "derivative; compute the losses in float32 without autocast, make the model smooth"
                + ("" if use == "losses" else ", or set curvature to 'none'")
            )
        return ("central" if agrees else "exact"), f"{apart:.1e} from {against}"

    def _flat(
        self, use: str, params: Params, direction: Params, batch: Batch
    ) -> Callable[[str, float], Tensor]:
        def losses(form: str, shrink: float) -> Tensor:
            if form == "exact":
                return self._directional_exact(params, direction, batch)[1]
            return self._directional_central(params, direction, batch, shrink)[1]

        def gradients(form: str, shrink: float) -> Tensor:
            if form == "exact":
                product = self._hessian_exact(params, direction, batch)
            else:
                product = self._hessian_central(params, direction, batch, shrink)
            return torch.cat([tensor.flatten() for tensor in product.values()])

        return losses if use == "losses" else gradients


def _in_type_of(param: Tensor, grad: Tensor | None, leading: Sequence[int]) -> Tensor:
    """A gradient in the type of the values that it is taken at; zeros where there is none."""
    if grad is None:
        return param.new_zeros((*leading, *param.shape))
    return grad.to_dense().to(param.dtype)


def _apart(found: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference; 0 where the reference is."""
    scale = reference.norm()
    return float((found - reference).norm() / scale) if scale > 0 else 0.0


def _num_queries(params: Params, direction: Params) -> int | None:
    return len(next(iter(direction.values()))) if has_queries(params, direction) else None


def _lacks_forward_mode(error: RuntimeError) -> bool:
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return not is_memory and any(words in str(error) for words in _NO_FORWARD_MODE)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward mode and no vmap."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch's own forward-mode rules are scripted at their first use, and it warns of that
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield
