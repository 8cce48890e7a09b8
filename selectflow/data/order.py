"""The order of the samples, a pure function of seed, epoch and position."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selectflow.data.fields import Ints
from selectflow.data.grouping import Part
from selectflow.data.manifest import DataError, check_least, check_seed
from selectflow.data.shares import Floats, Shares

_MIX_BLOCK = 4096  # choices of a source that are drawn at once
_MIX = 2**31  # with the next: keeps these numbers apart from those of the sources' own orders


@dataclass(frozen=True)
class Shuffle:
    """How an epoch is ordered: the options of `PoolStream` that have these names."""

    seed: int
    shuffle: bool = True
    buffer: int = 4096
    resample: bool = False
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_least("buffer", self.buffer, 1, "use shuffle=False for the stored order")
        if self.max_epochs is not None:
            check_least("max_epochs", self.max_epochs, 1, "leave it out for an endless stream")
            if self.resample:
                raise DataError(
                    "max_epochs must be left out with resample, got "
                    f"{self.max_epochs}; shards drawn with replacement come any number of times"
                )


class SourceOrder:
    """The endless order of one source: epochs without a gap between them.

    The shards of an epoch are permuted and cut into groups of at least `buffer` samples; the rows
    of a group are permuted. So a row's place is a function of (epoch, position) alone, and at most
    two groups of shards are in use at once. The source's `index` sets its random numbers apart.
    """

    def __init__(self, index: int, part: Part, options: Shuffle) -> None:
        self._index, self._counts, self._options = index, part.counts, options
        self._starts = part.first + part.counts.cumsum() - part.counts
        self._size, self._table = part.size, part.rows
        self.seek(0, 0)

    @property
    def left(self) -> float:
        """Samples up to its last epoch; inf where there is none."""
        most = self._options.max_epochs
        return math.inf if most is None else (most - self.epoch) * self._size - self.position

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
                if self._table is not None:
                    rows = self._table[rows]
                if self._options.shuffle:
                    rows = self._random(epoch, 1 + first).permutation(rows)
                yield rows[max(position - start, 0) :]
            first, start = last + 1, int(ends[last])

    def _shard_order(self, epoch: int) -> Ints:
        count = len(self._counts)
        if self._options.resample:
            return self._random(epoch, 0).integers(count, size=count)
        if self._options.shuffle and count > 1:
            return self._random(epoch, 0).permutation(count)
        return np.arange(count)

    def _random(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self._options.seed, self._index, *what])


class Order:
    """The rows of a stream: of one source, or of several mixed at random by their shares.

    A round is what is drawn at once: a pool of each process. All sources may be one `part`: then an
    epoch holds every sample of all of them once. Else each pool has the `shares` of its number.
    """

    def __init__(
        self, parts: Sequence[Part], options: Shuffle, shares: Shares | None = None
    ) -> None:
        self._seed, self._shares = options.seed, shares
        self._is_endless = options.max_epochs is None
        self._drawn = self._rounds = 0
        self._block: tuple[int, Floats] = (-1, np.empty(0))  # its number, and its random numbers
        self._sources = [SourceOrder(index, part, options) for index, part in enumerate(parts)]

    @property
    def left(self) -> float:
        """Samples that are left of all sources; inf where they are repeated without end."""
        return math.inf if self._is_endless else sum(source.left for source in self._sources)

    def take(self, count: int) -> Ints:
        """The next round of `count` samples: their rows and their epochs, shape (2, count)."""
        if self._shares is None:
            drawn = self._sources[0].take(count)
        else:
            drawn = np.empty((2, count), np.int64)
            mix = self._mix(self._shares.at(self._rounds), count)
            places = mix.argsort(kind="stable")  # of each source together: hundreds may be absent
            present, starts = np.unique(mix[places], return_index=True)
            for index, chosen in zip(present, np.split(places, starts[1:]), strict=True):
                drawn[:, chosen] = self._sources[index].take(len(chosen))
        self._drawn += count
        self._rounds += 1
        return drawn

    def position(self) -> dict[str, Any]:
        """Where the order is: samples and rounds drawn, and epoch and position of each source."""
        return {
            "drawn": self._drawn,
            "rounds": self._rounds,
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
        self._drawn, self._rounds = position["drawn"], position.get("rounds", 0)

    def _mix(self, shares: Floats, count: int) -> Ints:
        """The source of each of the next `count` samples, shape (count,).

        From where a source ends on, its samples are drawn from the others.
        """
        if self._is_endless:
            return _inverse(shares, self._random_numbers(count))
        left = np.array([source.left for source in self._sources])
        shares = _without_ended(shares, left)
        mix = _inverse(shares, self._random_numbers(count))
        while count > left.min() and (late := _late(mix, left)).size:
            shares = _without_ended(shares, left - np.bincount(mix, minlength=len(left)))
            random = np.random.default_rng([self._seed, _MIX + 1, self._drawn + int(late[0])])
            mix[late] = _inverse(shares, random.random(len(late)))
        return mix

    def _random_numbers(self, count: int) -> Floats:
        """Those in [0, 1) of the next `count` samples."""
        parts, start, end = [], self._drawn, self._drawn + count
        while start < end:
            block, at = divmod(start, _MIX_BLOCK)
            if self._block[0] != block:
                random = np.random.default_rng([self._seed, _MIX, block])
                self._block = (block, random.random(_MIX_BLOCK))
            parts.append(self._block[1][at : at + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)


def _inverse(shares: Floats, numbers: Floats) -> Ints:
    """The source that each number in [0, 1) falls to."""
    ends = shares.cumsum()
    return np.asarray((ends / ends[-1]).searchsorted(numbers, side="right"))


def _without_ended(shares: Floats, left: Floats) -> Floats:
    """The shares of the sources that have samples left; alike where none of these has a share."""
    found = np.where(left > 0, shares, 0.0)
    return found if found.any() else (left > 0).astype(np.float64)


def _late(mix: Ints, left: Floats) -> Ints:
    """Places of the samples that are drawn from a source which has none left by then, rising."""
    order = mix.argsort(kind="stable")
    ranked = mix[order]
    rank = np.arange(len(mix)) - ranked.searchsorted(ranked)  # among those of its source
    return np.sort(order[rank >= left[ranked]])
