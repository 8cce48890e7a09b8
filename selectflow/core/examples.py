"""Gradients of single examples, so many at a time that they fit.

No more than a chunk of them is held at once, two for products of each with each: what is asked of
them is reduced to a few numbers an example, chunk by chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from selectflow.core.batches import Batch, map_tensors, num_examples, take
from selectflow.core.chunks import Chunks, ChunkSize, Pass, num_fitting
from selectflow.core.derivatives import plain_attention
from selectflow.core.params import Params
from selectflow.core.passes import Objective, check_finite

# Of an example's gradient at once: itself, one of a second chunk, and what an optimizer's update
# makes of it on its way.
_COPIES = 8
_TOLERANCE = 1e-2  # of losses alone and in a batch, which low precision rounds differently
_INSTEAD = "use a strategy that needs no gradient of single examples, as influence or gradient"

_log = logging.getLogger(__name__)


class ExampleGradients:
    """Gradients of the losses of single examples.

    By `torch.func.vmap`, or by a pass for each example where that cannot go through the model, as
    where it branches on values: then a warning says so, once.

    Args:
        objective: the per-example losses.
        chunk_size: examples at once, as everywhere; never more than fit.
        memory_gib: limit for the gradients held at once, in GiB; None: 1, or what one example
            takes.
    """

    def __init__(
        self, objective: Objective, chunk_size: ChunkSize = None, memory_gib: float | None = None
    ) -> None:
        self._objective, self._memory_gib = objective, memory_gib
        self._chunks = Chunks(objective, chunk_size, memory_gib)
        self._is_checked = self._is_one_by_one = False

    def reduced(
        self,
        function: Callable[[Params], Tensor],
        params: Params,
        batch: Batch,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """What `function` makes of each gradient, shape (N,).

        Args:
            function: gradients with a leading dimension n -> shape (n,).
            params: where to differentiate.
            batch: N examples.
            names: parameters to differentiate in; None: all.

        Raises:
            ValueError: the model is sharded, an example alone has another loss than in a batch, or
                the memory does not hold one gradient.
            FloatingPointError: a loss is not finite.
        """
        found = [function(grads) for grads in self._each(params, batch, names)]
        return torch.cat(found)

    def products(
        self,
        params: Params,
        batch: Batch,
        direction: Params,
        weights: Params,
    ) -> tuple[Tensor, Tensor]:
        """Inner products of the weighted gradients w g, with a direction and with each other.

        Where not all fit at once, those of later chunks are computed again for each chunk.

        Args:
            params: where to differentiate.
            batch: N examples.
            direction: of the parameters that count.
            weights: w, of the same names and shapes, or scalars.

        Returns:
            sum(w g * direction), shape (N,), and sum(w g_i * w g_j), shape (N, N).
        """
        names = list(direction)
        parts = list(self._parts(params, batch, names))
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + num_examples(part))
        along: list[Tensor] = []
        gram: Tensor | None = None
        for row, part in enumerate(parts):
            ours = self._gradients(params, part, names) * weights
            along.append(inner(ours, direction))
            if gram is None:
                gram = along[0].new_zeros((starts[-1], starts[-1]))
            for column in range(row, len(parts)):
                theirs = ours
                if column > row:
                    theirs = self._gradients(params, parts[column], names) * weights
                block = sum_products(ours, theirs)
                rows = slice(starts[row], starts[row + 1])
                columns = slice(starts[column], starts[column + 1])
                gram[rows, columns] = block
                gram[columns, rows] = block.T
        assert gram is not None
        return torch.cat(along), gram

    def of_output(self, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's output, and the gradient of each loss in it: one forward pass.

        Args:
            params: where.
            batch: N examples.

        Returns:
            Both of the output's shape, (N, ...).

        Raises:
            ValueError: the model is sharded, `loss_fn` does not call it once, or its output is no
                tensor (nor an object with one as its `logits`) of N rows that the losses depend on.
        """
        self._check_whole()
        parts = self._chunks.of(params, batch)
        found = [_output_gradients(self._objective, params, part) for part in parts]
        outputs, grads = zip(*found, strict=True)
        return torch.cat(outputs), torch.cat(grads)

    def _check_whole(self) -> None:
        if self._objective.layout.is_sharded:
            raise ValueError(
                "parameters must be whole for gradients of single examples, got sharded ones "
                f"(fully_shard); {_INSTEAD}"
            )

    def _each(self, params: Params, batch: Batch, names: Sequence[str] | None) -> Iterator[Params]:
        names = list(params) if names is None else list(names)
        for part in self._parts(params, batch, names):
            yield self._gradients(params, part, names)

    def _parts(self, params: Params, batch: Batch, names: Sequence[str]) -> Iterator[Batch]:
        self._check_whole()
        size = _COPIES * params.pick(names).num_bytes()
        most = num_fitting(self._memory_gib, size, 1)
        if most < 1:
            raise ValueError(
                f"memory_gib must be at least {size / 2**30:.3g} for gradients of single examples, "
                f"got {self._memory_gib}; raise it, score fewer `params`, or {_INSTEAD}"
            )
        by = Pass("example gradients", None, lambda part: self._gradients(params, part, names))
        return self._chunks.of(params, batch, most, by)

    def _gradients(self, params: Params, part: Batch, names: Sequence[str]) -> Params:
        """Gradient of each example of a chunk, with a leading dimension."""
        if not self._is_one_by_one:
            try:
                losses, grads = self._at_once(params, part, names)
                if self._is_checked or self._differ(params, part, losses) < _TOLERANCE:
                    self._is_checked = True
                    return grads
                why = "the loss uses entries of a batch that are no tensors, or its other examples"
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                why = f"torch.func.vmap cannot take them through the model ({error})"
            self._is_one_by_one = True
            _log.warning("gradients of single examples take a pass each, as %s", why)
        losses, grads = self._one_by_one(params, part, names)
        gap = 0.0 if self._is_checked else self._differ(params, part, losses)
        if gap >= _TOLERANCE:
            raise ValueError(
                "loss_fn must give an example alone the loss that it has in a batch, got losses "
                f"that differ by {gap:.2g} of their norm; {_INSTEAD}"
            )
        self._is_checked = True
        return grads

    def _at_once(self, params: Params, part: Batch, names: Sequence[str]) -> tuple[Tensor, Params]:
        params = self._objective.apart(params)
        single = take(part, slice(0, 1))
        columns: list[Tensor] = []

        def note(leaf: Tensor) -> Tensor:
            columns.append(leaf)
            return leaf

        map_tensors(note, part)

        def loss(at: dict[str, Tensor], rows: list[Tensor]) -> Tensor:
            of_one = iter(rows)
            example = map_tensors(lambda _: next(of_one)[None], single)
            return self._objective.pure(params | at, example).sum()

        each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))
        with plain_attention(), self._objective.restored(), torch.enable_grad():
            grads, losses = each(dict(params.pick(names)), columns)
        check_finite("losses", losses, part)
        return losses.detach(), Params(grads).detach()

    def _one_by_one(
        self, params: Params, part: Batch, names: Sequence[str]
    ) -> tuple[Tensor, Params]:
        size = num_examples(part)
        gradients = params.pick(names).map(lambda x: x.new_zeros(size, *x.shape))
        losses = []
        for place in range(size):
            alone = take(part, slice(place, place + 1))
            loss, grads = self._objective.gradients(params, alone, torch.ones_like, names)
            losses.append(loss)
            for name, grad in grads.items():
                if grad is not None:
                    gradients[name][place] = grad.to_dense()
        check_finite("losses", torch.cat(losses), part)
        return torch.cat(losses), gradients

    def _differ(self, params: Params, part: Batch, losses: Tensor) -> float:
        """How far losses of single examples are from those in a batch, relative to their norm."""
        among = self._objective.losses(params, part)
        return float((losses - among).norm() / among.norm().clamp(min=1e-30))


def inner(gradients: Params, direction: Params) -> Tensor:
    """Inner product of each gradient with a direction, over all parameters, shape (n,)."""
    parts = [gradients[k].flatten(1) @ direction[k].flatten() for k in gradients]
    return torch.stack(parts).sum(0)


def norms(gradients: Params) -> Tensor:
    """Euclidean norm of each gradient, over all parameters, shape (n,)."""
    parts = [gradients[k].flatten(1).square().sum(1) for k in gradients]
    return torch.stack(parts).sum(0).sqrt()


def sum_products(first: Params, second: Params) -> Tensor:
    """Inner product of each of the first with each of the second, shape (n, m)."""
    parts = [first[k].flatten(1) @ second[k].flatten(1).T for k in first]
    return torch.stack(parts).sum(0)


def _output_gradients(objective: Objective, params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []

    def cut(module: object, given: object, output: Any) -> object:
        del module, given
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise ValueError(
                "the model must return a tensor, or an object with one as its `logits`, to "
                f"differentiate in it, got {type(output).__name__}"
            )
        seen.append(logits.detach().requires_grad_())
        if logits is output:
            return seen[-1]
        output.logits = seen[-1]
        return output

    hook = objective.model.register_forward_hook(cut)
    try:
        with objective.restored(), torch.enable_grad():
            losses = objective.pure(objective.apart(params), batch)
    finally:
        hook.remove()
    if len(seen) != 1 or len(seen[0]) != len(losses) or not losses.requires_grad:
        raise ValueError(
            "loss_fn must call the model once, with one row of output for each example that the "
            f"loss depends on, got outputs of shapes {[tuple(x.shape) for x in seen]} for "
            f"{len(losses)} losses"
        )
    (grads,) = torch.autograd.grad(losses.sum(), seen)
    return seen[0].detach(), grads
