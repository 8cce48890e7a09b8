"""Candidate pools for training, in an order that can be resumed."""

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from selectflow.data.catalog import Ints, Sources
from selectflow.data.collate import FIELDS, Batch, collate, finish, num_bytes, pick, shared
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError
from selectflow.data.order import Draw, Order, Shuffle
from selectflow.data.reader import Fault, ShardReader
from selectflow.data.remote import Cache
from selectflow.data.sources import open_catalog

_log = logging.getLogger(__name__)

_AT_ONCE = 1 << 20  # bytes

_Read = tuple[Batch | DataError, list[Fault]]  # a pool, and its samples that cannot be read

_Drawn = tuple[Draw, dict[str, Any]]  # what a pool was asked for, and the position after it


class PoolStream(IterableDataset[Batch]):
    """An endless sequence of candidate pools.

    The order is a function of the options below and of the dataset alone: not of the number of
    workers, nor of the pool size or number of ranks, which only cut it into pieces. Each epoch
    holds every sample once. Epochs are joined without a gap, so that every pool is full and all
    ranks take as many steps as they like; one pool may span several epochs.

    Data that fit `memory_gib` are decoded once and held as stacked tensors; a pool is then one
    index_select. Others are read from their shards as they are needed.

    It has workers of its own. A `DataLoader` with workers around it keeps the order, but only
    torchdata's `StatefulDataLoader` learns the position from them. Lightning looks one batch ahead
    of a stream unless `limit_train_batches` is a number of batches: its checkpoints are then exact.

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
        num_workers: Processes that read and decode, >= 0; unused for data in memory. They pay
            where decoding takes long; packed records come faster without.
        memory_gib: Limit for decoded data to be held in memory, in GiB, >= 0.
        max_errors: Samples that may be unreadable before the stream raises, >= 0. A pool lacks
            those that are.
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
        cache: Cache | None = None,
    ) -> None:
        _check_range("pool", pool, 1, "it is the number of candidates")
        _check_range("seed", seed, 0, "numpy takes no negative seeds")
        _check_range("buffer", buffer, 1, "use shuffle=False for the stored order")
        _check_range("num_workers", num_workers, 0, "0 reads in this process")
        _check_range("memory_gib", memory_gib, 0, "0 holds nothing in memory")
        _check_range("max_errors", max_errors, 0, "0 stops at the first")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be in [0, {world_size}), got {rank}; check world_size")
        self._pool, self._rank, self._world_size = pool, rank, world_size
        self._num_workers, self._max_errors = num_workers, max_errors
        self._catalog = open_catalog(source, split, cache)
        self._options = Shuffle(seed, shuffle, buffer, resample)
        self._weights = _shares(weights, source)
        # everything that the order depends on, besides the position
        self._identity = {
            "fingerprint": self._catalog.fingerprint,
            "split": split,
            "seed": seed,
            "shuffle": shuffle,
            "buffer": buffer,
            "resample": resample,
            "weights": self._weights,
        }
        capacity = 2 * (buffer + int(self._catalog.counts.max()))  # two groups: see Lane
        lanes = len(self._weights or [1])
        self._reader = ShardReader(self._catalog, FIELDS, capacity * lanes)
        self._faults: dict[int, str] = {}  # row -> shard
        self._logged: set[str] = set()
        self._position = self._new_order().position()
        self._batches: Iterator[_Read] | None = None
        self._memory = self._load(memory_gib)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the pools depend on, in plain values: dataset, order, pool size and rank."""
        shared = {"pool": self._pool, "rank": self._rank, "world_size": self._world_size}
        return self._identity | shared

    @property
    def num_samples(self) -> int:
        """Samples in the split, of all sources."""
        return self._catalog.num_samples

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
            list of P strings; "key" list of P strings; "epoch" list of the P epochs, from 0, of
            its source that each example belongs to. Images stored as bytes are in [0, 1].

        Raises:
            DataError: More samples than `max_errors` cannot be read; names shard and key.
        """
        if self._batches is None:
            self._batches = self._start()
        try:
            batch, faults = next(self._batches)
            draw, position = self._drawn.popleft()
            self._count(faults)
            if isinstance(batch, DataError):
                raise batch
        except BaseException:  # Ctrl-C, too, after which a notebook may go on
            self._batches = None  # stay at the last pool handed out
            raise
        self._position = position
        return batch | {"epoch": _epochs(draw, faults)}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after the last pool handed out. The same on every rank.

        Returns:
            "epoch" and "position" (samples of that epoch handed out to all ranks) of each lane,
            "drawn" (samples of the whole stream), "errors" (shards of the unreadable rows), and
            what the order depends on. Pool size and numbers of ranks and workers are free to
            change.
        """
        faults = {str(row): shard for row, shard in self._faults.items()}
        return self._identity | self._position | {"errors": faults}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same dataset and order was.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The state is of another dataset or order, is incomplete, or lies outside
                the epoch; the stream then stays where it was.
        """
        for name, value in self._identity.items():
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
        return Order(catalog.counts, catalog.lanes, self._options, self._weights)

    def _start(self) -> Iterator[_Read]:
        """The pools after the present position, and in `_drawn` what each was asked for."""
        order = self._new_order()
        order.seek(self._position)
        self._drawn: deque[_Drawn] = deque()
        rows = _draw(order, self._drawn, self._pool, self._rank, self._world_size)
        if self._memory is not None:
            return _from_memory(self._memory, rows, self._pool)
        read = partial(_read_pool, self._reader)
        if self._num_workers == 0 or get_worker_info():  # a worker cannot start workers
            return _finished(map(read, rows))
        loader = DataLoader(
            _ByRows(read),
            batch_size=None,
            sampler=rows,
            num_workers=self._num_workers,
            collate_fn=_unchanged,
            worker_init_fn=partial(_end_with_parent, os.getpid()),
            generator=torch.Generator(),  # else it would draw from the generator of the training
        )
        return _finished(iter(loader))

    def _count(self, faults: list[Fault]) -> None:
        for fault in faults:
            self._faults[fault.row] = fault.shard
            if len(self._faults) > self._max_errors:
                raise DataError(
                    f"{fault.message}; or raise max_errors, {self._max_errors}, to go on without "
                    f"such samples, so far {self.errors}"
                )
            if fault.message not in self._logged:  # a damaged shard has one for all its samples
                _log.warning("unreadable sample: %s", fault.message)
                self._logged.add(fault.message)

    def _load(self, memory_gib: float) -> Batch | None:
        """All samples, if they are readable and fit."""
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
                return None  # each is then counted when it is its turn
            self._count(faults)
            samples += found
        return collate(samples)


def _draw(
    order: Order, drawn: deque[_Drawn], pool: int, rank: int, world_size: int
) -> Iterator[Ints]:
    """The rows of each pool of this process, and in `drawn` more about it.

    No method: in a reference cycle a DataLoader is collected late, and takes seconds to stop.
    """
    worker = get_worker_info()  # of a DataLoader around the stream
    share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
    while True:
        taken = order.take(shares * world_size * pool)
        draw = Draw(*(each.reshape(shares, world_size, pool)[share, rank] for each in taken))
        drawn.append((draw, order.position()))
        yield draw.rows


def _finished(pools: Iterator[_Read]) -> Iterator[_Read]:
    """Pools of the reader with their batches as a model takes them."""
    for batch, faults in pools:
        yield (finish(batch) if isinstance(batch, dict) else batch), faults


def _from_memory(memory: Batch, rows: Iterator[Ints], pool: int) -> Iterator[_Read]:
    """Pools of data in memory, small ones several at a time.

    Between two pools a training step drives this code out of the processor's caches.
    """
    size = pool * num_bytes(memory) // len(memory["key"])
    num = max(1, min(16, _AT_ONCE // max(1, size)))
    while True:
        yield from [(finish(pick(memory, each)), []) for each in islice(rows, num)]


def _epochs(draw: Draw, faults: list[Fault]) -> list[int]:
    """The epoch of each sample of a pool but those that could not be read."""
    kept = ~np.isin(draw.rows, [fault.row for fault in faults]) if faults else slice(None)
    epochs: list[int] = draw.epochs[kept].tolist()
    return epochs


def _end_with_parent(parent: int, _: int) -> None:
    """End this worker soon after the process that started it, however that came to its end.

    torch looks as well, but leaves a worker for ever that was writing to a pipe that is full.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _ByRows(Dataset[_Read]):
    """What a DataLoader's worker runs."""

    def __init__(self, read: Callable[[Ints], _Read]) -> None:
        self._read = read

    def __getitem__(self, rows: Ints) -> _Read:
        batch, faults = self._read(rows)
        return (shared(batch) if isinstance(batch, dict) else batch), faults


def _read_pool(reader: ShardReader, rows: Ints) -> _Read:
    samples, faults = reader.read(rows)
    if not samples:
        rule = f"a pool must hold a readable sample, got {len(rows)} that are not"
        return DataError(f"{rule}; the first: {faults[0].message}"), faults
    try:
        return collate(samples), faults
    except DataError as error:  # returned, since a DataLoader would wrap it in a traceback
        return error, faults


def _unchanged(item: Any) -> Any:
    return item


def _check_range(name: str, value: float, least: int, hint: str) -> None:
    if not value >= least:
        raise DataError(f"{name} must be >= {least}, got {value}; {hint}")


def _shares(weights: Mapping[str, float] | None, source: Sources) -> list[float] | None:
    if weights is None:
        return None
    names = list(source) if isinstance(source, Mapping) else []
    if set(weights) != set(names) or not all(0 < weights[name] < math.inf for name in names):
        raise DataError(
            f"weights must be a positive number for each of the sources {names}, "
            f"got {dict(weights)}; leave it out for one epoch over all of them"
        )
    return [float(weights[name]) for name in names]
