"""Directional derivatives of the user's per-example losses: pool scores, Hessian-vector products.

Each directional derivative exists in two forms. `exact` is forward-mode differentiation through
`torch.func`. `central` is a central difference of plain passes,

    d loss / d direction  ~  (loss(theta + e direction) - loss(theta - e direction)) / 2e

which costs two forward passes for a whole pool, works with every kernel, and has an error that
falls with e^2 until rounding takes over. e is set so that |e direction| is a share of |theta|,
which depends on the use (`directions`) and on the arithmetic (`forms`). `auto` takes central
differences where a check on a few examples finds them right, since they are the cheaper form on
every model measured, and the exact form otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectflow.core.batches import Batch, chunks, num_examples
from selectflow.core.chunks import ChunkSize, Pass
from selectflow.core.directions import has_queries, over_queries, split, step_size
from selectflow.core.forms import NUM_CHECKED, TOLERANCE, Derive, Forms, Method, Use, apart
from selectflow.core.gradients import Gradients
from selectflow.core.params import Params
from selectflow.core.passes import Objective, check_finite
from selectflow.core.weighted import filled, mean_of

Curvature = Literal["exact", "fisher", "none"]


class Product(NamedTuple):
    """A direction times the curvature, and what the passes behind it tell of the losses.

    Attributes:
        value: H direction or F direction.
        losses: of the examples, shape (N,).
        slopes: their derivatives along the direction, shape (N,) or (Q, N).
    """

    value: Params
    losses: Tensor
    slopes: Tensor


class Derivatives(Gradients):
    """Directional derivatives of an objective, by one method, a chunk of examples at a time.

    Args:
        objective: the per-example losses.
        method: "exact", "central" or "auto": decided at the first use, for losses and gradients
            apart, and kept in `forms`.
        chunk_size, memory_gib: examples per pass, see `Gradients`.
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
        super().__init__(objective, chunk_size, memory_gib)
        if objective.layout.is_sharded and (method == "exact" or chunk_size == "auto"):
            raise ValueError(
                "of sharded parameters derivative must be 'auto' or 'central' and chunk_size a "
                f"number or None, got {method!r} and {chunk_size!r}: forward mode and the counting "
                "of memory do not go through fully_shard"
            )
        self.method = method
        self.forms = forms or Forms()

    def anew(self, method: Method) -> Derivatives:
        """The same by another method, with nothing decided."""
        other = Derivatives(self.objective, method)
        other._chunks = self._chunks
        return other

    # --- the quantities -------------------------------------------------------------------

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
        self._check_slopes(losses, slopes, batch)
        return losses, slopes

    def hessian_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """H direction, with H the Hessian of the mean loss, over the batches of all processes.

        For Q directions at once.
        """
        return self._hessian(params, direction, batch).value

    def _hessian(
        self, params: Params, direction: Params, batch: Batch, with_slopes: bool = False
    ) -> Product:
        method = self._decide("gradients", params, direction, batch, with_slopes)
        form = self._hessian_exact if method == "exact" else self._hessian_central
        return form(params, direction, batch)

    def fisher_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """F direction, with F = mean over examples of g g^T, the empirical Fisher matrix.

        g g^T direction = (slope along direction) g, so F direction is the gradient of the
        losses weighted by their slopes: no per-example gradient is formed.
        """
        return self._fisher(params, direction, batch).value

    def _fisher(self, params: Params, direction: Params, batch: Batch) -> Product:
        with self.group.together():
            losses, slopes = self.directional(params, direction, batch)
        value = self.gradients(params, batch, slopes / slopes.shape[-1])[1]
        return Product(value, losses, slopes)

    def product(
        self,
        curvature: Curvature,
        params: Params,
        direction: Params,
        batch: Batch,
        *,
        with_slopes: bool = False,
    ) -> tuple[Params, tuple[Tensor, Tensor] | None]:
        """A product with the curvature, and what `directional` gives of the same direction.

        Losses and slopes cost no pass. They are None where they were not asked for, or where a
        check did not find them right at the step that Hessian products have.
        """
        if curvature == "fisher":
            value, losses, slopes = self._fisher(params, direction, batch)
            return value, (losses, slopes) if with_slopes else None
        value, losses, slopes = self._hessian(params, direction, batch, with_slopes)
        if not (with_slopes and self.forms.shares_slopes):
            return value, None
        self._check_slopes(losses, slopes, batch)
        return value, (losses, slopes)

    def _check_slopes(self, losses: Tensor, slopes: Tensor, batch: Batch) -> None:
        if not math.isfinite(losses.sum() + slopes.sum()):  # one reading in the usual case
            check_finite("losses", losses, batch)
            check_finite("derivatives of the losses", slopes, batch)

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

        self._check_whole()
        params = self.objective.apart(params)
        by = Pass("slopes", _num_queries(params, direction), both)
        with plain_attention(), self.objective.restored():
            parts = self._chunks.of(params, batch, by=by)
            losses, slopes = zip(*map(both, parts), strict=True)
        return torch.cat(losses), torch.cat(slopes, -1)

    def _directional_central(
        self, params: Params, direction: Params, batch: Batch, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        if has_queries(params, direction):
            each = [
                self._directional_central(params, one, batch, scale) for one in split(direction)
            ]
            return each[0][0], torch.stack([slopes for _, slopes in each])
        scale = self.forms.scales.get("losses", 1.0) if scale is None else scale
        step = scale * step_size(params, direction, 0)
        if step == 0:
            losses = self._losses(params, batch)
            return losses, torch.zeros_like(losses)
        ahead = self._losses(params.moved(direction, step), batch)
        behind = self._losses(params.moved(direction, -step), batch)
        return (ahead + behind) / 2, (ahead - behind) / (2 * step)

    def _hessian_exact(self, params: Params, direction: Params, batch: Batch) -> Product:
        def product(part: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            def total_and_each(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                losses = self.objective.pure(p, part)
                return losses.sum(), losses

            gradient = torch.func.grad(total_and_each, has_aux=True)

            def bent(to: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
                (_, losses), (found, slopes) = torch.func.jvp(gradient, (dict(params),), (to,))[:2]
                return found, losses, slopes

            return over_queries(bent, params, direction, (0, None, 0))

        self._check_whole()
        params = self.objective.apart(params)
        direction = direction.pick(params)
        size, total = num_examples(batch), direction.zeros_like()
        each: list[tuple[Tensor, Tensor]] = []
        by = Pass("products", _num_queries(params, direction), product)
        with plain_attention(), self.objective.restored():
            for part in self._chunks.of(params, batch, by=by):
                found, losses, slopes = product(part)
                total = total.add(Params(found).detach(), 1 / size)
                each.append((losses.detach(), slopes.detach()))
        value = Params(zip(total, self.group.means(list(total.values())), strict=True))
        losses, slopes = (torch.cat(parts, -1) for parts in zip(*each, strict=True))
        return Product(value, losses, slopes)

    def _hessian_central(
        self, params: Params, direction: Params, batch: Batch, scale: float | None = None
    ) -> Product:
        if has_queries(params, direction):
            each = [self._hessian_central(params, one, batch, scale) for one in split(direction)]
            rows = Params((k, torch.stack([one.value[k] for one in each])) for k in direction)
            return Product(rows, each[0].losses, torch.stack([one.slopes for one in each]))
        scale = self.forms.scales.get("gradients", 1.0) if scale is None else scale
        step = scale * step_size(params, direction, 1)
        if step == 0:
            losses = self._losses(params, batch)
            return Product(direction.zeros_like(), losses, torch.zeros_like(losses))
        found = [
            self._vjp(params.add(direction, by), batch, mean_of(batch), None)
            for by in (step, -step)
        ]
        (losses, mean, _), (others, other, _) = found
        self._checked(mean + other, losses + others, batch)
        ahead, behind = (filled(grads, params, ()) for *_, grads in found)
        value = (ahead - behind) / (2 * step)
        return Product(value, (losses + others) / 2, (losses - others) / (2 * step))

    def _check_whole(self) -> None:
        if self.objective.layout.is_sharded:
            raise RuntimeError("there is no forward AD of sharded parameters")

    # --- choosing between them ------------------------------------------------------------

    def _decide(
        self,
        use: Use,
        params: Params,
        direction: Params,
        batch: Batch,
        with_slopes: bool = False,
    ) -> str:
        if not self.forms.is_due(use, self.method):
            return self.forms.decided[use]
        if has_queries(params, direction):
            direction = next(split(direction))
        if not direction.norm():  # any form is right: the next use decides
            usual = "exact" if self.method == "exact" else "central"
            return self.forms.decided.get(use, usual)
        few = next(chunks(batch, NUM_CHECKED))
        if use == "losses" and self.forms.shares_slopes:
            scale = step_size(params, direction, 1) / step_size(params, direction, 0)
            if self.forms.step_as_products(scale):
                return "central"
        if use == "losses":
            return self.forms.decide(use, self.method, self._slopes_of(params, direction, few))
        seen: dict[tuple[str, float], Tensor] = {}
        form = self.forms.decide(use, self.method, self._products_of(params, direction, few, seen))
        if with_slopes:
            self.forms.shares_slopes = form == "exact" or self._are_right(
                seen, params, direction, few
            )
        return form

    def _slopes_of(self, params: Params, direction: Params, batch: Batch) -> Derive:
        def derive(form: str, scale: float) -> Tensor:
            if form == "exact":
                slopes = self._directional_exact(params, direction, batch)[1]
            else:
                slopes = self._directional_central(params, direction, batch, scale)[1]
            return self._of_all(slopes)

        return derive

    def _products_of(
        self,
        params: Params,
        direction: Params,
        batch: Batch,
        seen: dict[tuple[str, float], Tensor],
    ) -> Derive:
        """The slopes that each product brings along are left in `seen`."""

        def derive(form: str, scale: float) -> Tensor:
            if form == "exact":
                found = self._hessian_exact(params, direction, batch)
            else:
                found = self._hessian_central(params, direction, batch, scale)
            seen[form, scale] = found.slopes
            return torch.cat([tensor.flatten() for tensor in found.value.values()])

        return derive

    def _are_right(
        self,
        seen: dict[tuple[str, float], Tensor],
        params: Params,
        direction: Params,
        batch: Batch,
    ) -> bool:
        """Whether slopes at the step of central Hessian products are those of the losses."""
        found = seen.get(("central", self.forms.scales["gradients"]))
        if found is None:
            found = self._hessian_central(params, direction, batch).slopes
        reference = seen.get(("exact", 1.0))
        if reference is None:
            reference = self._directional_central(params, direction, batch, 1.0)[1]
        return apart(self._of_all(found), self._of_all(reference), "losses") <= TOLERANCE

    def _of_all(self, slopes: Tensor) -> Tensor:
        """Of the examples of all processes."""
        return torch.cat([each.to(slopes) for each in self.group.gather(slopes.cpu())])


def _num_queries(params: Params, direction: Params) -> int | None:
    return len(next(iter(direction.values()))) if has_queries(params, direction) else None


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward mode and no vmap."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch's own forward-mode rules are scripted at their first use, and it warns of that
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield
