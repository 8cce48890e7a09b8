"""The order of the samples, a pure function of seed, epoch and position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from selectflow.data.fields import Ints
from selectflow.data.manifest import check_least, check_seed

_MIX_BLOCK = 4096  # choices of a source that are drawn at once
_MIX = 2**31  # keeps their random numbers apart from those of the sources' own orders


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is ordered.

    Attributes:
        seed: of the order, >= 0.
        shuffle: False keeps the stored order.
        buffer: samples shuffled together, >= 1; at least one shard.
        resample: draw the shards of an epoch with replacement.

    Raises:
        DataError: seed or buffer is out of its range.
    """

    seed: int
    shuffle: bool = True
    buffer: int = 4096
    resample: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_least("buffer", self.buffer, 1, "use shuffle=False for the stored order")


class Draw(NamedTuple):
    """Samples drawn from an order.

    Attributes:
        rows: their numbers in the catalog, shape (N,).
        epochs: the epoch of each, of its source, shape (N,).
    """

    rows: Ints
    epochs: Ints


class SourceOrder:
    """The endless order of one source: epochs without a gap between them.

    The shards of an epoch are permuted and cut into groups of at least `buffer` samples; the rows
    of a group are permuted. So a row's place is a function of (epoch, position) alone, and at most
    two groups of shards are in use at once.

    Args:
        index: number of the source, which sets its random numbers apart.
        first: row of its first sample.
        counts: samples of each shard.
        options: how to shuffle.
    """

    def __init__(self, index: int, first: int, counts: Ints, options: Shuffle) -> None:
        self._index, self._counts, self._options = index, counts, options
        self._starts = first + counts.cumsum() - counts
        self.seek(0, 0)

    def seek(self, epoch: int, position: int) -> None:
        """Go to where `position` samples of the epoch have been taken.

        Raises:
            ValueError: epoch below 0, or a position that the epoch does not have.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        shards = self._shard_order(epoch)
        ends = self._counts[shards].cumsum()
        if not 0 <= position < ends[-1]:
            raise ValueError(f"position must be in [0, {ends[-1]}), got {position}")
        self.epoch, self._shards, self._ends = epoch, shards, ends
        self._enter_group(position)

    def take(self, count: int) -> Draw:
        """The next `count` samples."""
        rows, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            part = self._rows[self._at : self._at + count - done]
            rows[done : done + len(part)] = part
            epochs[done : done + len(part)] = self.epoch
            done += len(part)
            self._at += len(part)
            if self._at == len(self._rows):
                self._leave_group()
        return Draw(rows, epochs)

    @property
    def position(self) -> int:
        """Samples of the epoch that have been taken."""
        return self._group_start + self._at

    def _leave_group(self) -> None:
        end = self._group_start + len(self._rows)
        if end == self._ends[-1]:
            self.seek(self.epoch + 1, 0)
        else:
            self._enter_group(end, self._next_first, end)

    def _enter_group(self, position: int, first: int = 0, start: int = 0) -> None:
        """Lay out the rows of the group that holds `position`.

        A group ends with the first shard that fills it. So groups are counted from the start of
        the epoch, or from a known one: its first shard, and the number of samples before it.
        """
        while True:
            full = start + self._options.buffer
            last = min(int(self._ends.searchsorted(full)), len(self._ends) - 1)
            if position < self._ends[last]:
                break
            first, start = last + 1, int(self._ends[last])
        shards = self._shards[first : last + 1]
        rows = np.concatenate(
            [np.arange(self._starts[s], self._starts[s] + self._counts[s]) for s in shards]
        )
        if self._options.shuffle:
            rows = self._random(self.epoch, 1 + first).permutation(rows)
        self._rows, self._group_start, self._at = rows, start, position - start
        self._next_first = last + 1

    def _shard_order(self, epoch: int) -> Ints:
        count = len(self._counts)
        if self._options.resample:
            return self._random(epoch, 0).integers(count, size=count)
        if self._options.shuffle:
            return self._random(epoch, 0).permutation(count)
        return np.arange(count)

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._options.seed, self._index, *what])


class Order:
    """The rows of a stream: of one source, or of several mixed at random by weight.

    Args:
        counts: samples of each shard of all sources.
        num_shards: number of shards of each source.
        options: how to shuffle.
        weights: share of each source in the stream, any positive scale; None: all sources are
            ordered as one, so that an epoch holds every sample of all of them once.
    """

    def __init__(
        self,
        counts: Ints,
        num_shards: Sequence[int],
        options: Shuffle,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._seed, self._drawn, self._block = options.seed, 0, (-1, np.empty(0, np.int64))
        self._shares = None if weights is None else np.array(weights) / np.sum(weights)
        ends = np.cumsum(num_shards if weights is not None else [len(counts)])
        firsts = np.concatenate([[0], counts.cumsum()])
        self._sources = [
            SourceOrder(index, int(firsts[start]), counts[start:end], options)
            for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]

    def take(self, count: int) -> Draw:
        """The next `count` samples."""
        if len(self._sources) == 1:
            self._drawn += count
            return self._sources[0].take(count)
        mix = self._mix(count)
        self._drawn += count
        drawn = Draw(np.empty(count, np.int64), np.empty(count, np.int64))
        for index, source in enumerate(self._sources):
            chosen = mix == index
            drawn.rows[chosen], drawn.epochs[chosen] = source.take(int(chosen.sum()))
        return drawn

    def position(self) -> dict[str, Any]:
        """Where the order is: samples drawn, and epoch and position of each source."""
        return {
            "drawn": self._drawn,
            "epoch": [source.epoch for source in self._sources],
            "position": [source.position for source in self._sources],
        }

    def seek(self, position: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            ValueError: it lies outside an epoch, or is of another number of sources.
        """
        if len(position["epoch"]) != (size := len(self._sources)):
            raise ValueError(f"epoch must have {size} items, got {position['epoch']}")
        places = zip(self._sources, position["epoch"], position["position"], strict=True)
        for source, epoch, place in places:
            source.seek(epoch, place)
        self._drawn = position["drawn"]

    def _mix(self, count: int) -> Ints:
        """The source of each of the next `count` samples, shape (count,)."""
        parts, start, end = [], self._drawn, self._drawn + count
        while start < end:
            block, at = divmod(start, _MIX_BLOCK)
            parts.append(self._choices(block)[at : at + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _choices(self, block: int) -> Ints:
        if self._block[0] != block:
            random = np.random.default_rng([self._seed, _MIX, block])
            size = len(self._sources)
            self._block = (block, random.choice(size, size=_MIX_BLOCK, p=self._shares))
        return self._block[1]
