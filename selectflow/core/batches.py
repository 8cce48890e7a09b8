"""Batches as users have them: any nesting of tensors with one leading dimension.

A batch may be a tensor, a tuple, list or named tuple, a mapping (dict, Hugging Face
BatchEncoding) or a dataclass of these. Lists of other things (keys, texts) with one entry per
example are indexed along, and so are tuples of strings, which torch's collate makes of them;
everything else passes through.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = Any
"""A nesting of tensors whose leading dimension counts examples."""

_KEY_NAMES = ("key", "__key__")  # the second is webdataset's


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """Batches that one optimizer update is made from: one batch of all their examples.

    They need not agree in anything but the loss that takes them, such as the padded length. Only
    `num_examples` and `chunks` look inside.
    """

    parts: Sequence[Batch]


def num_examples(batch: Batch) -> int:
    """Number of examples: the leading dimension that all tensors share.

    Raises:
        ValueError: no tensor, a tensor without dimensions, or tensors that disagree.
    """
    if isinstance(batch, MicroBatches):
        return sum(map(num_examples, batch.parts))
    if isinstance(batch, Tensor) and batch.ndim:
        return len(batch)
    sizes = {
        path: len(leaf) if leaf.ndim else None
        for path, leaf in _leaves(batch)
        if isinstance(leaf, Tensor | np.ndarray)
    }
    if not sizes:
        raise ValueError(f"batch must hold at least one tensor, got {type(batch).__name__}")
    if len(set(sizes.values())) > 1 or None in sizes.values():
        listed = ", ".join(f"{path or 'batch'}: {size}" for path, size in sizes.items())
        raise ValueError(
            f"all tensors of a batch must have the same leading dimension, got {listed}; "
            "put what is not per example outside the batch"
        )
    return next(size for size in sizes.values() if size is not None)


def tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a batch, each with its path."""
    yield from ((path, leaf) for path, leaf in _leaves(batch) if isinstance(leaf, Tensor))


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
    """The examples at `index` (1-d int64 tensor, or a slice), in that order, as the same type."""
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device) if isinstance(index, Tensor) else index]
    size = num_examples(batch)

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index.to(leaf.device) if isinstance(index, Tensor) else index]
        if isinstance(leaf, np.ndarray):
            return leaf[index.numpy(force=True) if isinstance(index, Tensor) else index]
        if isinstance(leaf, list | tuple) and len(leaf) == size:
            if isinstance(index, slice):
                return leaf[index]
            return type(leaf)(leaf[i] for i in index.tolist())
        return leaf

    return _map(pick, batch)


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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; without a copy where they are there already."""
    return _map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


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
    if isinstance(batch, Mapping):
        for name in _KEY_NAMES:
            keys = batch.get(name)
            if isinstance(keys, list | tuple) and len(keys) == num_examples(batch):
                return "keys " + ", ".join(str(keys[i]) for i in index[:8].tolist())
    return "positions " + ", ".join(str(i) for i in index[:8].tolist())


class Cycle:
    """The target's batches, again and again, by position.

    Args:
        batches: any iterable; one that ends for good, such as a generator, is kept as a list.

    Raises:
        ValueError: it never ends, or is a single batch.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Mapping):  # iterated, it would give the names of its fields
            raise ValueError(
                f"target must be an iterable of batches, got one batch, a {type(batches).__name__} "
                "of " + ", ".join(map(str, batches)) + "; put it into a list"
            )
        if isinstance(batches, cycle):
            raise ValueError(
                "target must come to an end, got itertools.cycle; pass what it repeats, which is "
                "iterated again and again"
            )
        # Not by iter(), at which a DataLoader draws a random number and starts its workers.
        if isinstance(batches, Iterator):  # a generator ends once and for all
            batches = list(batches)
        self._batches = batches
        self._iterator: Iterator[Batch] = iter(())
        self._at = -1  # where the iterator is; -1: it was not opened

    def draw(self, position: int) -> tuple[Batch, int]:
        """The batch at a position of a round, and the next position; after the last, the first.

        Raises:
            ValueError: there is none.
        """
        if position != self._at:
            self._iterator = islice(iter(self._batches), position, None)
        for batch in islice(self._iterator, 1):
            self._at = position + 1
            return batch, self._at
        if position:
            return self.draw(0)
        raise ValueError("target must yield at least one batch, got none; pass a list of batches")


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


def _is_leaf(node: Any) -> bool:
    if isinstance(node, Tensor | np.ndarray | str | int):  # most nodes, and the quickest test
        return True
    if isinstance(node, list):  # a list of tensors is a batch, a list of keys is one leaf
        return not any(isinstance(item, Tensor | np.ndarray) for item in node)
    if type(node) is tuple and node and all(isinstance(item, str | bytes) for item in node):
        return True
    is_record = dataclasses.is_dataclass(node) and not isinstance(node, type)
    return not (isinstance(node, tuple | Mapping) or is_record)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif dataclasses.is_dataclass(node):
        yield from ((field.name, getattr(node, field.name)) for field in dataclasses.fields(node))
    else:
        yield from ((str(position), value) for position, value in enumerate(node))


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if _is_leaf(node):
        yield path, node
        return
    for name, child in _children(node):
        yield from _leaves(child, f"{path}.{name}" if path else name)


def _map(function: Callable[[Any], Any], node: Any) -> Any:
    if _is_leaf(node):
        return function(node)
    if isinstance(node, Mapping):
        items = {key: _map(function, value) for key, value in node.items()}
        if type(node) is dict or not isinstance(node, MutableMapping):
            return items
        mapped = copy.copy(node)  # keeps what a BatchEncoding or defaultdict is beside its items
        mapped.update(items)
        return mapped
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        given = [field.name for field in dataclasses.fields(node) if field.init]
        return dataclasses.replace(
            node, **{name: _map(function, getattr(node, name)) for name in given}
        )
    parts = [_map(function, child) for child in node]
    return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)
