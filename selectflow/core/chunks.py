"""How many examples a pass may take: a number, or as many as fit under a memory limit.

What a pass holds is found from two small ones, of one example and of two, whose difference is the
share of an example.

For a gradient pass it is exact arithmetic over shapes, the same on every device: what autograd
saves, and at the height of the backward pass the gradient of the largest saved tensor and a
temporary of its size (for a language model, its logits). Workspaces of kernels come on top.

Forward mode carries a tangent with each tensor, and attention by its plain formula: an exact
Hessian product takes several times a gradient pass, more with longer sequences. There the tensors
that live at once are counted while the small passes run.

What the process takes from the system is more than its tensors: `_HELD_BACK` times as much.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selectflow.core.batches import Batch, MicroBatches, chunks, num_examples, take, tensors
from selectflow.core.counts import is_count
from selectflow.core.params import Params
from selectflow.core.passes import Objective

ChunkSize = int | Literal["auto"] | None

GIB = 2**30
USUAL_GIB = 1.0  # where no limit is given

# Growth of resident memory over what is counted, over many passes in a row: up to 2.3 as printed by
# tests/benchmarks/chunk_memory.py. malloc keeps freed blocks. No GPU was measured.
_HELD_BACK = 3.0


def num_fitting(
    limit_gib: float | None, num_bytes: float, least: int, *, fixed: float = 0.0
) -> int:
    """How many pieces of `num_bytes` fit into a limit beside `fixed` bytes.

    With fewer than `least` the caller cannot go on, and says so. Without a limit, None, there is
    room for `least` in any case: a default must not stop those who train larger models.
    """
    if limit_gib is None:
        return max(least, num_fitting(USUAL_GIB, num_bytes, least, fixed=fixed))
    return int((limit_gib * GIB - fixed) / num_bytes)


class Pass(NamedTuple):
    """A pass other than that of a gradient, whose memory is to be counted.

    Attributes:
        name: with `queries`, passes of one name take the same memory for the same shapes.
        queries: directions at once; None: one.
        run: the pass on a batch.
    """

    name: str
    queries: int | None
    run: Callable[[Batch], object]


class Chunks:
    """Splits batches into parts that one pass takes.

    Args:
        objective: whose gradient a pass computes.
        size: examples of a part; None: all; "auto": as many as fit.
        memory_gib: limit for the memory of one pass, in GiB ("auto"); None: 1, or what one example
            takes.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, objective: Objective, size: ChunkSize, memory_gib: float | None = None
    ) -> None:
        if size is not None and size != "auto":
            if not is_count(size):
                raise ValueError(
                    f"chunk_size must be an integer >= 1, 'auto' or None, got {size!r}"
                )
            size = int(size)
        self._objective, self.size, self._memory_gib = objective, size, memory_gib
        self._fitting: dict[object, int] = {}

    def of(
        self, params: Params, batch: Batch, most: int | None = None, by: Pass | None = None
    ) -> Iterator[Batch]:
        """Consecutive parts of a batch.

        Args:
            params: where the passes will be.
            batch: N examples.
            most: upper bound for the examples of a part.
            by: the pass that takes them; None: a gradient pass.
        """
        if isinstance(batch, MicroBatches):
            for part in batch.parts:
                yield from self.of(params, part, most, by)
            return
        size = self._fit(params, batch, by) if self.size == "auto" else self.size
        assert size is None or isinstance(size, int)
        yield from chunks(batch, min((n for n in (size, most) if n is not None), default=None))

    def _fit(self, params: Params, batch: Batch, by: Pass | None) -> int:
        # A function of the shapes alone, so that a resumed run splits as the first one did.
        shapes = tuple((path, leaf.shape[1:], leaf.dtype) for path, leaf in tensors(batch))
        key = by and by[:2], shapes
        if key not in self._fitting:
            limits = self._objective, params, batch, self._memory_gib
            self._fitting[key] = examples_that_fit(*limits, by)
        return self._fitting[key]


def examples_that_fit(
    objective: Objective,
    params: Params,
    batch: Batch,
    memory_gib: float | None,
    by: Pass | None = None,
) -> int:
    """How many examples like those of `batch` a pass takes within `memory_gib`.

    Args:
        objective: whose gradient a pass computes.
        params: where.
        batch: examples of the shapes that will come.
        memory_gib: limit for the resident memory of the pass; None: 1, or what one example takes.
        by: the pass; None: a gradient pass.

    Raises:
        ValueError: not even one.
    """
    alone, pair = take(batch, slice(0, 1)), take(batch, slice(0, 2))
    largest = 0
    if by is None:
        one, largest = _saved_bytes(objective, params, alone)
        two, _ = _saved_bytes(objective, params, pair)
    else:
        one, two = (_live_bytes(objective, params, few, by.run) for few in (alone, pair))
    each = two - one if num_examples(batch) > 1 else one
    fixed, per_example = max(0, one - each), max(1, each + 2 * largest)
    num = num_fitting(memory_gib, _HELD_BACK * per_example, 1, fixed=_HELD_BACK * fixed)
    if num < 1:
        needed = _HELD_BACK * (fixed + per_example) / GIB
        raise ValueError(
            f"memory_gib must be at least {needed:.3g} for chunk_size='auto', which one example of "
            f"this model takes, got {memory_gib}; raise it, or score on a smaller score_view"
        )
    return num


def _present(objective: Objective, params: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """What is there in any case, and does not count."""
    of_model = [*objective.model.parameters(), *objective.model.buffers()]
    return [*params.values(), *of_model, *(leaf for _, leaf in tensors(batch))]


def _saved_bytes(objective: Objective, params: Params, batch: Batch) -> tuple[int, int]:
    """Bytes that autograd saves for a gradient pass: of all tensors, and of the largest."""
    leaves = params.map(lambda tensor: tensor.detach().requires_grad_())
    there = _present(objective, leaves, batch)
    present = {storage.data_ptr() for tensor in there for storage in _storages(tensor)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in present:
                saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective.pure(leaves, batch)
    del losses  # until here no address was used twice
    return sum(saved.values()), max(saved.values(), default=0)


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Where a tensor's numbers are; a sparse one has several places."""
    parts: tuple[Tensor, ...] = ()
    if tensor.layout is torch.strided:
        parts = (tensor,)
    elif tensor.layout is torch.sparse_coo:
        parts = (tensor._indices(), tensor._values())
    elif tensor.layout is torch.sparse_csr:
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout is torch.sparse_csc:
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return [part.untyped_storage() for part in parts]


def _live_bytes(
    objective: Objective, params: Params, batch: Batch, run: Callable[[Batch], object]
) -> int:
    """The most bytes of tensors that live at once while `run` is at work."""
    with _no_collection(), _LiveBytes(_present(objective, params, batch)) as live:
        run(batch)
    return int(live.most)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the collection of cycles, whose times depend on all that went before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make, for as long as they live."""

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._now = 0
        self._known = {each._cdata for tensor in present for each in _storages(tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                for storage in _storages(tensor):
                    self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, place, size).atexit = False

    def _forget(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._now -= size
