"""Batches as users have them: any nesting of tensors with one leading dimension.

`nested` says what of it goes with the examples.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectflow.core.nested import (
    INTO_ALL,
    each_leaf,
    has_entries,
    is_odd,
    map_leaves,
    num_rows,
    rows_at,
    usual_size,
)

Batch = Any
"""A nesting of tensors whose leading dimension counts examples."""

_KEY_NAMES = ("key", "__key__")  # the second is webdataset's


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """Batches that one optimizer update is made from: one batch of all their examples.

    They need not agree in anything but the loss that takes them, such as the padded length. Only
    `num_examples` and `chunks` look inside.

    Attributes:
        parts: the batches.
        weights: of their examples in order, shape (N,): the update is made from the mean of
            weight times loss; None: 1 each.
    """

    parts: Sequence[Batch]
    weights: Tensor | None = None


def weighted(batch: Batch, weights: Tensor | None) -> Batch:
    """A batch whose examples are trained on with these weights, shape (N,); None: as it is."""
    return batch if weights is None else MicroBatches([batch], weights)


def weights_of(batch: Batch) -> Tensor | None:
    """Weights of the examples in an update, shape (N,); None: 1 each."""
    return batch.weights if isinstance(batch, MicroBatches) else None


def as_one(parts: Sequence[Batch]) -> Batch:
    """The batch of the one update that all parts make together, with their weights."""
    if len(parts) == 1:
        return parts[0]
    given = [weights_of(part) for part in parts]
    if all(weights is None for weights in given):
        return MicroBatches(parts)
    like = next(weights for weights in given if weights is not None)
    every = [
        like.new_ones(num_examples(part)) if weights is None else weights.to(like)
        for part, weights in zip(parts, given, strict=True)
    ]
    return MicroBatches(parts, torch.cat(every))


def num_examples(batch: Batch) -> int:
    """Number of examples: the leading dimension that all tensors share.

    Raises:
        ValueError: no tensor, a tensor without dimensions, tensors that disagree, or one whose
            rows cannot be taken, as of a jagged tensor.
    """
    if isinstance(batch, MicroBatches):
        return sum(map(num_examples, batch.parts))
    if isinstance(batch, Tensor) and batch.ndim and not is_odd(batch):
        return len(batch)
    if (usual := usual_size(batch)) is not None:
        return usual
    # Sequences that may be entries of examples have no say, unless there is nothing else.
    sizes = num_rows(batch, None) or num_rows(batch, INTO_ALL)
    size = next(iter(sizes.values()), None)
    if size is not None:
        sizes |= num_rows(batch, size)
    if not sizes:
        raise ValueError(f"batch must hold at least one tensor, got {type(batch).__name__}")
    if size is None or len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path or 'batch'}: {rows}" for path, rows in sizes.items())
        raise ValueError(
            f"all tensors of a batch must have the same leading dimension, got {listed}; "
            "put what is not per example outside the batch"
        )
    return size


def tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a batch, each with its path."""
    for path, leaf in each_leaf(batch, INTO_ALL):
        if isinstance(leaf, Tensor):
            yield path, leaf


def num_kept(keep: int | float, size: int) -> int:
    """How many examples of a pool are kept.

    Args:
        keep: a count, or a float in (0, 1]: a fraction of the pool, at least one example.
        size: examples in the pool.

    Raises:
        ValueError: the pool is smaller than the count.
    """
    num = max(1, round(keep * size)) if isinstance(keep, float) else keep
    if size < num:
        raise ValueError(
            f"a pool must hold at least keep = {num} examples, got {size}; "
            "lower keep, give it as a fraction, or drop the last partial pool"
        )
    return num


def take(batch: Batch, index: Tensor | slice) -> Batch:
    """The examples at `index` (1-d int64 tensor, or a slice), in that order, as the same type.

    The index may be on any device: it is copied once to each other one that a leaf is on.
    """
    size = num_examples(batch)

    @cache
    def on(device: torch.device) -> Tensor | slice:
        return index if isinstance(index, slice) else index.to(device)

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return rows_at(leaf, on(leaf.device))
        if not isinstance(leaf, np.ndarray) and not has_entries(leaf, size):
            return leaf
        places = on(torch.device("cpu"))
        if isinstance(leaf, np.ndarray):
            return leaf[places if isinstance(places, slice) else places.numpy()]
        chosen = range(size)[places] if isinstance(places, slice) else places.tolist()
        entries = [leaf[place] for place in chosen]
        return type(leaf)(entries) if isinstance(leaf, list | tuple) else entries

    return map_leaves(pick, batch, size)


def in_parts(pool: Batch, num: int, generator: torch.Generator) -> list[Batch]:
    """All of a pool, in random order, in `num` batches whose sizes differ by one at most."""
    order = torch.randperm(num_examples(pool), generator=generator, device="cpu")
    return [take(pool, index) for index in order.tensor_split(num)]


def through(view: Callable[[Batch], Batch] | None, batch: Batch) -> Batch:
    """What `view` makes of a batch: another batch of the same examples. None: the batch itself.

    Raises:
        ValueError: it has another number of examples.
    """
    if view is None:
        return batch
    seen, expected = view(batch), num_examples(batch)
    if num_examples(seen) != expected:
        raise ValueError(
            f"score_view must return the same {expected} examples, got {num_examples(seen)}; "
            "cut inside each example, not examples"
        )
    return seen


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with `function` of each of its tensors in its place, in one order."""
    return map_leaves(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch, INTO_ALL
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; without a copy where they are there already.

    To an accelerator from pinned memory the copy runs beside what is computed there; back to the
    processor it is waited for.
    """
    goes_on = device.type != "cpu"
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=goes_on), batch)


def device_of(batch: Batch) -> torch.device:
    """Where the tensors of a batch are; the first one's place speaks for all."""
    return next((leaf.device for _, leaf in tensors(batch)), torch.device("cpu"))


def join(batches: Sequence[Batch]) -> Batch:
    """The examples of all batches in one, of the first one's type.

    Raises:
        ValueError: rows that differ in shape.
    """
    batches = [batch for batch in batches if num_examples(batch)] or batches[:1]
    columns: list[list[Any]] = []
    for batch in batches:
        size = num_examples(batch)
        leaves: list[Any] = []

        def note(leaf: Any, leaves: list[Any] = leaves, size: int = size) -> Any:
            leaves.append(list(leaf) if has_entries(leaf, size) else leaf)
            return leaf

        map_leaves(note, batch, size)
        columns.append(leaves)
    joined = iter([_joined(column) for column in zip(*columns, strict=True)])

    def replaced(leaf: Any) -> Any:
        found = next(joined)
        return type(leaf)(found) if isinstance(leaf, list | tuple) else found

    return map_leaves(replaced, batches[0], num_examples(batches[0]))


def _joined(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, Tensor | np.ndarray):
        shapes = {tuple(leaf.shape[1:]) for leaf in leaves}
        if len(shapes) > 1:
            raise ValueError(
                "examples of one batch must have one shape, got "
                f"{' and '.join(map(str, sorted(shapes)))} in two pools; pad all pools to one "
                "length, or use scope='local'"
            )
        return torch.cat(list(leaves)) if isinstance(first, Tensor) else np.concatenate(leaves)
    return [entry for leaf in leaves for entry in leaf] if isinstance(first, list) else first


def chunks(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Consecutive parts of at most `size` examples; None: the batch itself."""
    if isinstance(batch, MicroBatches):
        for part in batch.parts:
            yield from chunks(part, size)
        return
    total = 0 if size is None else num_examples(batch)
    if size is None or total <= size:
        yield batch
        return
    for start in range(0, total, size):
        yield take(batch, slice(start, start + size))


def describe(batch: Batch, index: Tensor) -> str:
    """Names of the examples at `index` for messages: their keys where the batch has keys."""
    size, places = num_examples(batch), index[:8].tolist()
    for path, leaf in each_leaf(batch, size):
        if path.rpartition(".")[2] in _KEY_NAMES:
            keys = leaf.tolist() if isinstance(leaf, Tensor | np.ndarray) else leaf
            if has_entries(keys, size):
                return "keys " + ", ".join(str(keys[place]) for place in places)
    return "positions " + ", ".join(map(str, places))


class PeekedPools:
    """A stream of pools that can be looked ahead in: none is lost, none is used twice.

    Args:
        pools: the stream; its end is met once.
        peeked: pools drawn and not handed out yet, in order; is written to.
    """

    def __init__(self, pools: Iterable[Batch], peeked: deque[Batch]) -> None:
        self._source, self._peeked = iter(pools), peeked

    def __iter__(self) -> Iterator[Batch]:
        """All pools, those that were peeked at first."""
        while self._peeked or self._draw():
            yield self._peeked.popleft()

    def upcoming(self) -> Iterator[Batch]:
        """The pools after the one that was handed out last, remembered as they are drawn."""
        position = 0
        while position < len(self._peeked) or self._draw():
            yield self._peeked[position]
            position += 1

    def _draw(self) -> bool:
        before = len(self._peeked)
        self._peeked.extend(islice(self._source, 1))
        return len(self._peeked) > before
