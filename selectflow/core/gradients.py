"""Losses and gradients of the user's objective: means over a batch and over all processes.

A batch passes through the model in chunks. Each process brings its own examples; what is a mean is
the mean of all of theirs, and where one of them finds a loss that is not finite, all raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from selectflow.core.batches import Batch, weights_of
from selectflow.core.chunks import Chunks, ChunkSize
from selectflow.core.params import Params
from selectflow.core.passes import Objective, check_finite
from selectflow.core.weighted import Weigh, filled, mean_of, parts_of, summed


class Gradients:
    """Losses and gradients of an objective, a chunk of examples at a time.

    Args:
        objective: the per-example losses.
        chunk_size: examples per pass; None: all at once; "auto": as many as a pass of its kind
            takes within `memory_gib`, see `chunks`.
        memory_gib: limit for "auto", in GiB; None: 1, or what one example takes.
    """

    def __init__(
        self, objective: Objective, chunk_size: ChunkSize = None, memory_gib: float | None = None
    ) -> None:
        self.objective, self.group = objective, objective.layout.group
        self._chunks = Chunks(objective, chunk_size, memory_gib)

    @torch.no_grad()
    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Loss of each example, shape (N,), without a graph."""
        losses = self._losses(params, batch)
        check_finite("losses", losses, batch)
        return losses

    @torch.no_grad()
    def mean_loss(self, params: Params, batch: Batch) -> float:
        """Mean of the losses; of several processes the mean of theirs, which raise together."""
        losses = self._losses(params, batch)
        return self._checked(self.group.mean(losses.mean()), losses, batch)

    def _parts(self, params: Params, batch: Batch) -> Iterable[Batch]:
        """The chunks of a batch; of shards as many in all processes, which gather together."""
        parts = self._chunks.of(params, batch)
        if not self.objective.layout.is_sharded or self._chunks.size is None:
            return parts
        listed = list(parts)
        self.group.check_same("passes over a batch in chunks", len(listed))
        return listed

    def _checked(self, mean: Tensor, losses: Tensor, batch: Batch) -> float:
        """A mean over all processes as a number, if it is finite: one reading in the usual case."""
        value = mean.item()
        if not math.isfinite(value):
            check_finite("losses", losses, batch)
            if self.group.size > 1:
                raise FloatingPointError("losses must be finite, got one in another process")
        return value

    def _losses(self, params: Params, batch: Batch) -> Tensor:
        parts = [self.objective.losses(params, part) for part in self._parts(params, batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradient(
        self, params: Params, batch: Batch, names: Sequence[str] | None = None
    ) -> tuple[float, Params]:
        """Mean loss of the batch and its gradient; of several processes the means of theirs.

        Args:
            params: where to differentiate.
            batch: N examples, of each process its own.
            names: parameters to differentiate in; None: all.

        Raises:
            FloatingPointError: a loss is not finite; in all processes where it is so in one.
        """
        losses, mean, grads = self._vjp(params, batch, mean_of(batch), names)
        return self._checked(mean, losses, batch), filled(grads, params, ())

    def step_gradient(self, params: Params, batch: Batch, weights: Tensor | None = None) -> Params:
        """The gradient of an optimizer step: without parameters that the batch does not use.

        torch leaves their `grad` at None and skips them: no decay, no moment, no count.

        Args:
            params: where to differentiate.
            batch: N examples.
            weights: shape (N,); None: 1/N each, the batch mean, times the batch's own weights.
        """
        if weights is None and (own := weights_of(batch)) is not None:
            weights = own / len(own)
        weigh = mean_of(batch) if weights is None else parts_of(weights)
        losses, mean, grads = self._vjp(params, batch, weigh, None)
        self._checked(mean, losses, batch)
        return Params((name, grad) for name, grad in grads.items() if grad is not None)

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
        losses, mean, grads = self._vjp(params, batch, parts_of(weights), names)
        self._checked(mean, losses, batch)
        return losses, filled(grads, params, weights.shape[:-1])

    def _vjp(
        self,
        params: Params,
        batch: Batch,
        weigh: Weigh,
        names: Sequence[str] | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Losses, their mean, and gradient of their sum as `weigh` weighs it; none is checked.

        Mean and gradient are those over all processes.
        """
        names = list(params) if names is None else names
        total: dict[str, Tensor | None] = {}
        values, start = [], 0
        for part in self._parts(params, batch):

            def weigh_part(losses: Tensor, start: int = start) -> Tensor:
                return weigh(losses, start)

            losses, grads = self.objective.gradients(params, part, weigh_part, names)
            total = summed(total, grads, params)
            values.append(losses)
            start += len(losses)
        losses = torch.cat(values)
        return losses, *self._over_group(losses.mean(), total, params)

    def _over_group(
        self, loss: Tensor, grads: dict[str, Tensor | None], params: Params
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The means over all processes; a parameter that none of them uses has no gradient."""
        if self.group.size == 1 or self.objective.layout.is_sharded:  # fully_shard made the means
            return self.group.mean(loss), grads
        like = next(iter(params.values()))
        leading = next(
            (g.shape[: g.ndim - params[k].ndim] for k, g in grads.items() if g is not None), ()
        )
        used = like.new_tensor([grad is not None for grad in grads.values()])
        *means, used, loss = self.group.means(
            [*filled(grads, params, leading).values(), used, loss]
        )
        is_used = zip(grads, means, used.tolist(), strict=True)
        return loss, {name: mean if share else None for name, mean, share in is_used}
