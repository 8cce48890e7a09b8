"""How many examples a pass may take: a number, or as many as fit under a memory limit.

The size of what autograd saves for the backward pass is exact arithmetic over shapes, the same on
every device: two small passes, of one example and of two, tell the share of an example. To that
comes, at the height of the backward pass, the gradient of the largest saved tensor and a temporary
of its size (for a language model, its logits). Workspaces of kernels, and what the allocator
holds back, come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from selectflow.batches import Batch, MicroBatches, chunks, num_examples, take, tensors
from selectflow.objective import Objective
from selectflow.params import Params

GIB = 2**30
ChunkSize = int | Literal["auto"] | None


class Chunks:
    """Splits batches into parts that one pass takes.

    Args:
        objective: whose gradient a pass computes.
        size: examples of a part; None: all; "auto": as many as fit.
        memory_gib: limit for the memory of one gradient pass, in GiB ("auto").

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, objective: Objective, size: ChunkSize, memory_gib: float = 1.0) -> None:
        if isinstance(size, str) and size != "auto":
            raise ValueError(f"chunk_size must be an integer >= 1, 'auto' or None, got {size!r}")
        if isinstance(size, int) and size < 1:
            raise ValueError(f"chunk_size must be at least 1, 'auto' or None, got {size}")
        self._objective, self._size, self._memory_gib = objective, size, memory_gib
        self._fitting: dict[object, int] = {}

    def of(self, params: Params, batch: Batch, most: int | None = None) -> Iterator[Batch]:
        """Consecutive parts of a batch.

        Args:
            params: where the passes will be.
            batch: N examples.
            most: upper bound for the examples of a part.
        """
        if isinstance(batch, MicroBatches):
            for part in batch.parts:
                yield from self.of(params, part, most)
            return
        size = self._fit(params, batch) if self._size == "auto" else self._size
        assert size is None or isinstance(size, int)
        yield from chunks(batch, min((n for n in (size, most) if n is not None), default=None))

    def _fit(self, params: Params, batch: Batch) -> int:
        # A function of the shapes alone, so that a resumed run splits as the first one did.
        key = tuple((path, leaf.shape[1:], leaf.dtype) for path, leaf in tensors(batch))
        if key not in self._fitting:
            self._fitting[key] = examples_that_fit(self._objective, params, batch, self._memory_gib)
        return self._fitting[key]


def examples_that_fit(objective: Objective, params: Params, batch: Batch, memory_gib: float) -> int:
    """How many examples like those of `batch` a gradient pass takes within `memory_gib`.

    Raises:
        ValueError: not even one.
    """
    one, largest = _saved_bytes(objective, params, take(batch, slice(0, 1)))
    two, _ = _saved_bytes(objective, params, take(batch, slice(0, 2)))
    each = two - one if num_examples(batch) > 1 else one
    fixed, per_example = max(0, one - each), max(1, each + 2 * largest)
    num = int((memory_gib * GIB - fixed) / per_example)
    if num < 1:
        raise ValueError(
            f"memory_gib must be at least {(fixed + per_example) / GIB:.3g} for chunk_size='auto', "
            f"which one example of this model takes, got {memory_gib}; raise it, or score on a "
            "smaller score_view"
        )
    return num


def _saved_bytes(objective: Objective, params: Params, batch: Batch) -> tuple[int, int]:
    """Bytes that autograd saves for a gradient pass: of all tensors, and of the largest.

    Parameters and the batch itself, which are there in any case, do not count.
    """
    leaves = params.map(lambda tensor: tensor.detach().requires_grad_())
    there = [*leaves.values(), *objective.model.parameters(), *(leaf for _, leaf in tensors(batch))]
    present = {tensor.untyped_storage().data_ptr() for tensor in there}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in present:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective.losses(leaves, batch)
    del losses  # until here no address was used twice
    return sum(saved.values()), max(saved.values(), default=0)
