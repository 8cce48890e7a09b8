"""Candidate pools for training, in an order that can be resumed."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any, Self

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from selectflow.data.cache import Cache
from selectflow.data.fields import FIELDS, Batch, Ints, Sample, collate, finish, num_bytes, pick
from selectflow.data.form import Rules
from selectflow.data.manifest import DataError, check_least
from selectflow.data.order import Order, Shuffle
from selectflow.data.reader import Fault, PoolRead, ShardReader, read_pools
from selectflow.data.sources import Sources, open_catalog

_log = logging.getLogger(__name__)

_AT_ONCE = 1 << 20  # bytes of pools taken from memory at once

# rows and epochs of the samples asked for in a pool, shape (2, P), and the position after it
_Drawn = tuple[Ints, dict[str, Any]]


class PoolStream(IterableDataset[Batch]):
    """An endless sequence of candidate pools.

    The order is a function of the options below and of the dataset alone: not of the number of
    workers, nor of the pool size or number of ranks, which only cut it into pieces. Each epoch
    holds every sample once. Epochs are joined without a gap, so that every pool is full and all
    ranks take as many steps as they like; one pool may span several epochs.

    Data that fit `memory_gib` are decoded once and held as stacked arrays, from which each pool is
    taken. Other data are read from their shards pool by pool.

    The stream has workers of its own. A `DataLoader` with workers around it keeps the order, but
    only torchdata's `StatefulDataLoader` learns the position from them. Lightning draws one batch
    ahead of the step unless `limit_train_batches` is a number: set it, for exact checkpoints.

    Args:
        source: Dataset directory or its manifest, folder of shards, brace pattern or list of
            shards, local or remote; or several of these by name, whose keys then start with
            "<name>/".
        split: Name of the split, in each of them; unused where shards are listed.
        pool: Examples in each pool of each rank, P >= 1.
        seed: Seed of the order, >= 0.
        shuffle: False gives stored order in every epoch.
        buffer: Samples that are shuffled together, >= 1. The shards of an epoch are shuffled, then
            the samples of consecutive shards in groups of this size. The first pool waits for the
            headers and checksums of the shards of a group.
        resample: True draws the shards of an epoch with replacement.
        weights: Share of each source, by name, on any positive scale; a source that ends starts
            its next epoch. None: an epoch holds every sample of all sources once.
        rank: This process, in [0, world_size): it gets every world_size-th pool.
        world_size: Processes that share the stream, >= 1.
        num_workers: Processes that read and decode, >= 0; unused for data in memory. They help
            where decoding takes long; packed records are read faster without.
        memory_gib: Limit for decoded data to be held in memory, in GiB, >= 0.
        max_errors: Unreadable samples that are left out of their pools before the stream raises,
            >= 0. So are those with other fields than most, with an array of another shape or type
            than most of the first 64 samples of the first shard, and with a label out of range.
        num_classes: Labels are below it; None: any from 0.
        cache: Where remote shards are kept; None: the default `Cache`.

    Raises:
        DataError: An argument is out of its range, or the split cannot be read.
    """

    def __init__(
        self,
        source: Sources,
        split: str = "train",
        *,
        pool: int,
        seed: int,
        shuffle: bool = True,
        buffer: int = 4096,
        resample: bool = False,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        memory_gib: float = 1.0,
        max_errors: int = 0,
        num_classes: int | None = None,
        cache: Cache | None = None,
    ) -> None:
        check_least("num_workers", num_workers, 0, "0 reads in this process")
        check_least("memory_gib", memory_gib, 0, "0 holds nothing in memory")
        check_least("max_errors", max_errors, 0, "0 stops at the first")
        if num_classes is not None:
            check_least("num_classes", num_classes, 1, "leave it out for any")
        check_least("pool", pool, 1, "it is the number of candidates")
        if not 0 <= rank < world_size:
            rule = f"rank must be in [0, {world_size}), got {rank}"
            raise DataError(f"{rule}; check world_size")
        # the pools of this process: of every `world_size` consecutive ones, the one at `rank`
        self._share = {"pool": pool, "rank": rank, "world_size": world_size}
        self._shuffle = Shuffle(seed, shuffle, buffer, resample)
        self._num_workers, self._max_errors = num_workers, max_errors
        self._catalog = open_catalog(source, split, cache)
        self._weights = _checked(weights, source)
        # everything that the order depends on, besides the position
        self._order_identity = {
            "fingerprint": self._catalog.fingerprint,
            "split": split,
            **asdict(self._shuffle),
            "weights": self._weights,
        }
        # a source uses at most two groups of shards at once: see SourceOrder
        in_use = 2 * (buffer + int(self._catalog.counts.max())) * len(self._weights or [1])
        self._reader = ShardReader(self._catalog, FIELDS, in_use, Rules(num_classes))
        self._faults: dict[int, str] = {}  # row -> shard
        self._logged: set[str] = set()
        self._position = self._new_order().position()
        self._batches: Iterator[PoolRead] | None = None
        self._memory = self._load(memory_gib)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the pools depend on, in plain values: dataset, order, pool size and rank."""
        return self._order_identity | self._share

    @property
    def num_samples(self) -> int:
        """Samples in the split, of all sources."""
        return self._catalog.num_samples

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the array of each sample, for which the first shard is read; None: no array."""
        return self._reader.form().shape

    @property
    def errors(self) -> dict[str, int]:
        """Unreadable samples met so far, by shard."""
        return dict(Counter(self._faults.values()))

    def __iter__(self) -> Self:
        """The stream itself: iteration goes on after the last pool handed out."""
        return self

    def __next__(self) -> Batch:
        """The next pool.

        Returns:
            "image" float32 (P, ...) and "label" int64 (P,), or "tokens" int64 (P, ...), or "text"
            list of P strings; "key" list of P strings; "epoch" list of P integers, the epoch of
            its source that each example is of, from 0. Images stored as bytes are in [0, 1].

        Raises:
            DataError: More samples than `max_errors` cannot be read; names shard and key.
        """
        if self._batches is None:
            self._batches = self._start()
        try:
            batch, faults = next(self._batches)
            (rows, epochs), position = self._drawn.popleft()
            self._count(faults)
            if isinstance(batch, DataError):
                raise batch
        except BaseException:  # also Ctrl-C, after which a notebook may go on
            self._batches = None  # stay at the last pool handed out
            raise
        self._position = position
        if faults:
            epochs = epochs[~np.isin(rows, [fault.row for fault in faults])]
        return batch | {"epoch": epochs.tolist()}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last pool handed out. The same on every rank.

        Returns:
            "epoch" and "position" (samples of that epoch handed out to all ranks) of each source,
            "drawn" (samples of the whole stream), "errors" (shards of the unreadable rows), and
            what the order depends on. The stream that resumes may have another pool size and other
            numbers of ranks and workers.
        """
        faults = {str(row): shard for row, shard in self._faults.items()}
        return self._order_identity | self._position | {"errors": faults}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same dataset and order was.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The state is of another dataset or order, is incomplete, or lies outside
                the epoch; the stream then stays where it was.
        """
        for name, value in self._order_identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"{name} must be {value!r} as in this stream, got {state.get(name)!r} in the "
                    "state; resume with the dataset and options of the run that wrote the state"
                )
        order = self._new_order()
        try:
            order.seek(state)
            faults = {int(row): str(shard) for row, shard in state["errors"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"state must be of a stream like this: {error}; pass what state_dict returned"
            ) from error
        self._position, self._faults, self._batches = order.position(), faults, None

    def _new_order(self) -> Order:
        catalog = self._catalog
        return Order(catalog.counts, catalog.num_shards, self._shuffle, self._weights)

    def _start(self) -> Iterator[PoolRead]:
        """The pools after the present position; `_drawn` gets the samples asked for in each."""
        order = self._new_order()
        order.seek(self._position)
        self._drawn: deque[_Drawn] = deque()
        rows = _draw(order, self._drawn, **self._share)
        if self._memory is not None:
            return _from_memory(self._memory, rows, self._share["pool"])
        # a worker of a DataLoader around the stream cannot start workers
        return read_pools(self._reader, rows, 0 if get_worker_info() else self._num_workers)

    def _count(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._faults[fault.row] = fault.shard
            if len(self._faults) > self._max_errors:
                raise DataError(
                    f"{fault.message}; or raise max_errors, {self._max_errors}, to go on without "
                    f"such samples, so far {self.errors}"
                )
            if fault.message not in self._logged:  # one message for all samples of a damaged shard
                _log.warning("unreadable sample: %s", fault.message)
                self._logged.add(fault.message)

    def _load(self, memory_gib: float) -> Batch | None:
        """All samples stacked; None if they do not fit or some may be left out as unreadable."""
        limit = memory_gib * 2**30
        if self._catalog.num_bytes > 4 * limit:  # far from fitting, even as uncompressed arrays
            return None
        first, faults = self._reader.read(np.arange(1))
        if not faults and num_bytes(collate(first)) * self.num_samples > limit:
            return None
        samples: list[Sample] = []
        ends = self._catalog.counts.cumsum()
        for rows in np.split(np.arange(self.num_samples), ends[:-1]):
            found, faults = self._reader.read(rows)
            if faults and self._max_errors:
                return None  # each is then counted when its pool is read
            self._count(faults)
            samples += found
        return collate(samples)


def _draw(
    order: Order, drawn: deque[_Drawn], pool: int, rank: int, world_size: int
) -> Iterator[Ints]:
    """The rows of each pool; appends the pool's draw and the position after it to `drawn`.

    It must not refer to the stream: a DataLoader in a reference cycle is collected late, and then
    takes seconds to stop.
    """
    worker = get_worker_info()  # of a DataLoader around the stream
    index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    shape = (workers, world_size, pool)
    while True:
        draw = order.take(math.prod(shape)).reshape(2, *shape)[:, index, rank]
        drawn.append((draw, order.position()))
        yield draw[0]


def _from_memory(memory: Batch, rows: Iterator[Ints], pool: int) -> Iterator[PoolRead]:
    """Pools of data in memory, small ones several at a time.

    Taken one by one, each would find this code evicted from the processor's caches by a training
    step.
    """
    size = pool * num_bytes(memory) // len(memory["key"])
    num = max(1, min(16, _AT_ONCE // max(1, size)))
    while True:
        yield from [(finish(pick(memory, each)), []) for each in islice(rows, num)]


def _checked(weights: Mapping[str, float] | None, source: Sources) -> list[float] | None:
    if weights is None:
        return None
    names = list(source) if isinstance(source, Mapping) else []
    if set(weights) != set(names) or not all(0 < weights[name] < math.inf for name in names):
        raise DataError(
            f"weights must be a positive number for each of the sources {names}, "
            f"got {dict(weights)}; leave it out for one epoch over all of them"
        )
    return [float(weights[name]) for name in names]
