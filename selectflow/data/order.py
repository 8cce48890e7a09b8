"""The order of the samples, a pure function of seed, epoch and position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selectflow.data.fields import Ints
from selectflow.data.manifest import check_least, check_seed

_MIX_BLOCK = 4096  # choices of a source that are drawn at once
_MIX = 2**31  # keeps their random numbers apart from those of the sources' own orders


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is ordered: the options of `PoolStream` that have these names."""

    seed: int
    shuffle: bool = True
    buffer: int = 4096
    resample: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_least("buffer", self.buffer, 1, "use shuffle=False for the stored order")


class SourceOrder:
    """The endless order of one source: epochs without a gap between them.

    The shards of an epoch are permuted and cut into groups of at least `buffer` samples; the rows
    of a group are permuted. So a row's place is a function of (epoch, position) alone, and at most
    two groups of shards are in use at once. The source's `index` sets its random numbers apart,
    `first` is the row of its first sample, `counts` the samples of each shard.
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
        size = int(self._counts[shards].sum())
        if not 0 <= position < size:
            raise ValueError(f"position must be in [0, {size}), got {position}")
        self.epoch, self.position = epoch, position
        self._groups = self._groups_from(epoch, position, shards)
        self._rows = next(self._groups)

    def take(self, count: int) -> Ints:
        """As `Order.take`, of this source alone."""
        drawn, done = np.empty((2, count), np.int64), 0
        while done < count:
            left = count - done
            part, self._rows = self._rows[:left], self._rows[left:]
            drawn[0, done : done + len(part)] = part
            drawn[1, done : done + len(part)] = self.epoch
            done += len(part)
            self.position += len(part)
            if not len(self._rows):
                group = next(self._groups, None)
                if group is None:
                    self.seek(self.epoch + 1, 0)
                else:
                    self._rows = group
        return drawn

    def _groups_from(self, epoch: int, position: int, shards: Ints) -> Iterator[Ints]:
        """The rows of each group of an epoch, without the first `position`."""
        ends = self._counts[shards].cumsum()
        first = start = 0  # number of the group's first shard, and of the samples before it
        while first < len(shards):
            full = start + self._options.buffer  # a group ends with the first shard that fills it
            last = min(int(ends.searchsorted(full)), len(ends) - 1)
            if position < ends[last]:
                rows = np.concatenate(
                    [np.arange(self._counts[s]) + self._starts[s] for s in shards[first : last + 1]]
                )
                if self._options.shuffle:
                    rows = self._random(epoch, 1 + first).permutation(rows)
                yield rows[max(position - start, 0) :]
            first, start = last + 1, int(ends[last])

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

    `counts` has the samples of each shard of all sources, `num_shards` the shards of each source,
    `weights` the share of each source, on any positive scale. Without weights all sources are
    ordered as one, so that an epoch holds every sample of all of them once.
    """

    def __init__(
        self,
        counts: Ints,
        num_shards: Sequence[int],
        options: Shuffle,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._seed, self._drawn = options.seed, 0
        self._block = (-1, np.empty(0, np.int64))  # number of the block of choices, and these
        self._shares = None if weights is None else np.array(weights) / np.sum(weights)
        ends = np.cumsum(num_shards if weights is not None else [len(counts)])
        firsts = np.concatenate([[0], counts.cumsum()])
        self._sources = [
            SourceOrder(index, int(firsts[start]), counts[start:end], options)
            for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]

    def take(self, count: int) -> Ints:
        """The next `count` samples: their rows and their epochs, shape (2, count)."""
        if len(self._sources) == 1:
            self._drawn += count
            return self._sources[0].take(count)
        mix = self._mix(count)
        self._drawn += count
        drawn = np.empty((2, count), np.int64)
        for index, source in enumerate(self._sources):
            chosen = mix == index
            drawn[:, chosen] = source.take(int(chosen.sum()))
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
            if self._block[0] != block:
                random = np.random.default_rng([self._seed, _MIX, block])
                size = len(self._sources)
                self._block = (block, random.choice(size, size=_MIX_BLOCK, p=self._shares))
            parts.append(self._block[1][at : at + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)
