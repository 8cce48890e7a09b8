"""Candidate pools for training, in an order that can be resumed."""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, Self

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from selectflow.data.cache import Cache
from selectflow.data.fields import FIELDS, Batch, Ints, Sample, collate, finish, num_bytes, pick
from selectflow.data.form import Rules
from selectflow.data.grouping import Grouping, Part
from selectflow.data.manifest import DataError, check_least
from selectflow.data.order import Order, Shuffle
from selectflow.data.reader import Fault, PoolRead, ShardReader, read_pools
from selectflow.data.shares import Selected, ShareOptions, Shares, checked_shares, plain_shares
from selectflow.data.sources import Sources, open_catalog
from selectflow.distributed import ALONE, here

_log = logging.getLogger(__name__)

_NO_FAULTS: list[Fault] = []
_AT_ONCE = 1 << 20  # bytes of pools taken from memory at once

# rows and epochs of the samples asked for in a pool, shape (2, P), and the position after it
_Drawn = tuple[Ints, dict[str, Any]]


class PoolStream(IterableDataset[Batch]):
    """An endless sequence of candidate pools.

    The order is a function of the options below and of the dataset alone: not of the number of
    workers, nor of the pool size or number of ranks, which only cut it into pieces. Each epoch
    holds every sample once. Epochs are joined without a gap, so that every pool is full and all
    ranks take as many steps as they like; one pool may span several epochs.

    With shares that change, and where `max_epochs` ends a source, it is one of the pools, too. With
    live shares ("auto") it also depends on what was kept, which `follow` tells the stream once for
    each pool; `Selector.stream` and runs do so themselves. Live shares are those that keep the most
    by the target set's measure: what the target set does not show, they do not see.

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
        by: What names the source of each sample of one dataset: "shard", its file; "key", what
            stands before the first slash of its key; "json.<field>", a field of its json, for which
            (as for "key") all samples are read once. None: sources are those given by name.
        shares: Share of each source in the pools; a source that ends starts its next epoch. A
            number for each by name, on any positive scale; "size": in proportion to its samples; a
            `ShareSchedule`; "auto" or `AutoShares`: in proportion to size at first, then following
            what is kept (`selectflow.control.shares`); "loss": following the losses, a baseline.
            None: an epoch holds every sample of all sources once.
        max_epochs: Times that a sample may come at most; a source that has come so often is left
            to the others, and where they cannot fill a pool the stream ends. None: any number.
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
        by: str | None = None,
        shares: ShareOptions | None = None,
        max_epochs: int | None = None,
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
        self._cut = {"pool": pool, "rank": rank, "world_size": world_size}
        self._shuffle = Shuffle(seed, shuffle, buffer, resample, max_epochs)
        self._num_workers, self._max_errors = num_workers, max_errors
        self._catalog = open_catalog(source, split, cache)
        self._grouping = Grouping(self._catalog, by)
        names, parts = self._grouping.names, self._grouping.parts
        self._option = checked_shares(shares, names)
        if self._option is None:  # ordered as one
            parts = [Part(self._catalog.counts, 0, None, self._catalog.num_samples)]
        self._parts = parts
        self._shares = self._new_shares()
        # pools that may be drawn ahead of what live shares follow
        self._delay = self._shares.delay if self._shares else None
        if self._delay is not None and num_workers > self._delay:
            raise DataError(
                f"num_workers must be <= {self._delay}, the delay of live shares, of which each "
                f"reads a pool ahead, got {num_workers}; raise AutoShares(delay=)"
            )
        prints = self._catalog.fingerprints
        self._prints = {name: prints.get(name, self._catalog.fingerprint) for name in names}
        # everything that the order depends on, besides the position
        self._order_identity = {
            "fingerprint": self._catalog.fingerprint,
            "split": split,
            **asdict(self._shuffle),
            "by": by,
            "shares": plain_shares(self._option),
        }
        in_use = sum(_num_in_use(part, buffer) for part in parts)
        self._reader = ShardReader(self._catalog, FIELDS, in_use, Rules(num_classes))
        self._faults: dict[int, str] = {}  # row -> shard
        self._logged: set[str] = set()
        self._position = self._new_order().position()
        self._batches: Iterator[PoolRead] | None = None
        self._memory = self._load(memory_gib)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the pools depend on, in plain values: dataset, order, pool size and rank."""
        return self._order_identity | self._cut

    @property
    def num_samples(self) -> int:
        """Samples in the split, of all sources."""
        return self._catalog.num_samples

    @property
    def sources(self) -> list[str]:
        """Names of the sources; [""] where there is one without a name."""
        return list(self._grouping.names)

    @property
    def shares(self) -> dict[str, float]:
        """The newest share of each source, in sum 1; {} where all are ordered as one."""
        return self._shares.now(self._position["rounds"]) if self._shares else {}

    @property
    def max_peeked(self) -> int | None:
        """Pools after the next one to be told of that may be drawn; None: any number."""
        if self._delay is None or self._memory is not None:
            return self._delay
        return self._delay - self._num_workers * self._prefetched

    @property
    def _prefetched(self) -> int:
        """Pools that each worker reads ahead: together at most half of the delay, or one each."""
        return 2 if self._delay is None or 4 * self._num_workers <= self._delay else 1

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
            its source that each example is of, from 0; where sources have names, "source" list of
            P strings. Images stored as bytes are in [0, 1].

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
            found = ~np.isin(rows, [fault.row for fault in faults])
            rows, epochs = rows[found], epochs[found]
        return batch | {"epoch": epochs.tolist()} | self._sources_of(rows)

    def follow(self, selection: Selected) -> None:
        """Let live shares follow what was kept of a pool.

        To be called once for each pool, in their order, also where nothing was scored: the shares
        then stay. Of several processes all call it, and get the same shares, from the counts of
        all. Other shares take no notice.

        Args:
            selection: of the pool: `selector.last`.

        Raises:
            DataError: it is called more often than pools were handed out, the pool has lost its
                "source", or other processes than those of `world_size` are joined.
        """
        if self._shares is None or self._shares.follows is None:
            return
        if self._shares.num_told >= self._position["rounds"]:
            raise DataError(
                f"follow must be called once for each pool, got a call more than the "
                f"{self._position['rounds']} that were handed out; leave it out where "
                "`Selector.stream` is given the stream itself"
            )
        world_size = self._cut["world_size"]
        group = here() if world_size > 1 else ALONE
        if group.size != world_size:
            raise DataError(
                f"live shares need all {world_size} processes of the stream joined in "
                f"torch.distributed, and no others, got {group.size}; or give fixed shares"
            )
        told = self._shares.counts_of(selection)
        self._shares.tell(group.numbers(told.flatten().tolist()).sum(0).numpy().reshape(told.shape))

    def state_dict(self) -> dict[str, Any]:
        """The position after the last pool handed out. The same on every rank.

        Returns:
            "epoch" and "position" (samples of that epoch handed out to all ranks) of each source,
            "drawn" (samples of the whole stream), "rounds" (pools of each rank), "errors" (shards
            of the unreadable rows), "told" (what live shares go on from), "sources" (a digest of
            each), and what the order depends on. The stream that resumes may have another pool size
            and other numbers of ranks and workers; where it has shares, also further sources after
            these.
        """
        faults = {str(row): shard for row, shard in self._faults.items()}
        told = self._shares.state_dict() if self._shares else {}
        also = {"errors": faults, "told": told, "sources": self._prints}
        return self._order_identity | self._position | also

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same dataset and order was.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The state is of another dataset or order, is incomplete, or lies outside
                the epoch; the stream then stays where it was.
        """
        new = self._num_new(state)
        may_differ = {"fingerprint", "shares"} if new else set()
        for name, value in self._order_identity.items():
            if name not in may_differ and state.get(name) != value:
                raise DataError(
                    f"{name} must be {value!r} as in this stream, got {state.get(name)!r} in the "
                    "state; resume with the dataset and options of the run that wrote the state"
                )
        order = self._new_order()
        shares = self._new_shares()
        try:
            begun = {name: [*state[name], *[0] * new] for name in ("epoch", "position")}
            order.seek(state | begun)
            faults = {int(row): str(shard) for row, shard in state["errors"].items()}
            if shares is not None:
                shares.load_state_dict(state.get("told", {}))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"state must be of a stream like this: {error}; pass what state_dict returned"
            ) from error
        self._position, self._faults, self._batches = order.position(), faults, None
        self._shares = shares

    def _num_new(self, state: dict[str, Any]) -> int:
        """How many of the sources the stream of a state did not have: the last ones."""
        ours, theirs = list(self._prints.items()), list(state.get("sources", {}).items())
        is_grown = self._shares is not None and 0 < len(theirs) < len(ours)
        return len(ours) - len(theirs) if is_grown and ours[: len(theirs)] == theirs else 0

    def _new_shares(self) -> Shares | None:
        if self._option is None:
            return None
        sizes = np.array([part.size for part in self._parts])
        return Shares(self._option, self._grouping.names, sizes)

    def _new_order(self) -> Order:
        return Order(self._parts, self._shuffle, self._shares)

    def _start(self) -> Iterator[PoolRead]:
        """The pools after the present position; `_drawn` gets the samples asked for in each."""
        order, is_live = self._new_order(), self._delay is not None
        order.seek(self._position)
        self._drawn: deque[_Drawn] = deque()
        worker = get_worker_info()  # of a DataLoader around the stream
        if worker and is_live:
            raise DataError(
                "live shares need the stream in the process that selects, got one in a worker of a "
                "DataLoader; give the stream workers of its own (num_workers), or fixed shares"
            )
        rows = _draw(order, self._drawn, **self._cut)
        if self._memory is not None:
            return _from_memory(self._memory, rows, 1 if is_live else self._num_at_once())
        # a worker of a DataLoader around the stream cannot start workers
        return read_pools(self._reader, rows, 0 if worker else self._num_workers, self._prefetched)

    def _num_at_once(self) -> int:
        """Pools that are taken from memory at once, small ones several at a time.

        Taken one by one, each would find this code evicted from the processor's caches by a
        training step.
        """
        assert self._memory is not None
        size = self._cut["pool"] * num_bytes(self._memory) // len(self._memory["key"])
        return max(1, min(16, _AT_ONCE // max(1, size)))

    def _sources_of(self, rows: Ints) -> Batch:
        """The "source" of each row, where sources have names."""
        names = self._grouping.names
        if names == [""]:
            return {}
        return {"source": [names[place] for place in self._grouping.of(rows)]}

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
    size = world_size * pool
    while order.left >= workers * size:
        rounds = [order.take(size).reshape(2, world_size, pool) for _ in range(workers)]
        draw = rounds[index][:, rank]
        drawn.append((draw, order.position()))
        yield draw[0]


def _from_memory(memory: Batch, rows: Iterator[Ints], num: int) -> Iterator[PoolRead]:
    """Pools of data in memory, `num` at a time."""
    while pools := [(finish(pick(memory, each)), _NO_FAULTS) for each in islice(rows, num)]:
        yield from pools


def _num_in_use(part: Part, buffer: int) -> int:
    """Samples of shards that a source uses at once: of two groups (see `SourceOrder`), or all."""
    group = buffer * part.in_shards // part.size + int(part.counts.max())
    return min(2 * group, part.in_shards)
