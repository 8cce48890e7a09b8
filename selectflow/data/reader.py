"""Samples and pools read by row, each shard checked before its first sample is used."""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import FileIO
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from selectflow.data.fields import CODECS, PACKED, Batch, Ints, Sample, collate, finish, shared
from selectflow.data.form import (
    LOOKED_AT,
    NO_FORM,
    Form,
    Rules,
    check_sample,
    common_form,
    fit_quickly,
)
from selectflow.data.manifest import DataError, damaged
from selectflow.data.sources import Catalog, Entry
from selectflow.data.tar_index import Member, Record, scan


class Fault(NamedTuple):
    """A sample that cannot be read."""

    shard: str  # its name
    row: int  # of the catalog
    message: str  # what is wrong, where, and what to do


_UNWRITABLE = ("", "__key__")  # extensions that webdataset's writer does not take
_SHARDS_TRIED = 8  # for the first readable sample

_Read = tuple[list[Sample], list[Fault]]  # the readable samples, and the others


class ShardReader(Dataset[_Read]):
    """Reads samples by row. Keeps the indexes of the shards used last, and no files open.

    Args:
        catalog: the shards.
        fields: extensions to decode; None: all.
        capacity: samples in the shards whose index is kept, beyond the shard in use.
        rules: what the values of a sample must be; None: anything.
    """

    def __init__(
        self,
        catalog: Catalog,
        fields: Iterable[str] | None = None,
        capacity: int = 0,
        rules: Rules | None = None,
    ) -> None:
        self._catalog, self._capacity, self._rules = catalog, capacity, rules
        self._fields = None if fields is None else frozenset(fields)
        self._form: Form | None = None
        self._checked: OrderedDict[int, _CheckedShard | DataError] = OrderedDict()

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return self._catalog.num_samples

    def read(self, rows: Ints) -> _Read:
        """The samples at `rows`, in that order, without those that cannot be read."""
        shards, places = self._catalog.locate(rows)
        found: dict[int, Sample] = {}
        faults: list[Fault] = []
        for shard in dict.fromkeys(shards.tolist()):  # each file is opened once
            at = np.flatnonzero(shards == shard)
            for position, item in zip(at.tolist(), self._read(shard, places[at]), strict=True):
                if isinstance(item, DataError):
                    name = self._catalog.entries[shard].name
                    faults.append(Fault(name, int(rows[position]), str(item)))
                else:
                    found[position] = item
        samples = [found[position] for position in sorted(found)]
        if self._rules is None or not samples:
            return samples, faults
        has_json = self._fields is None or "json" in self._fields
        if not has_json and fit_quickly(samples, self.form(), self._rules):
            return samples, faults
        return self._fitting(found, rows, shards, faults, self._rules)

    def _fitting(
        self,
        found: dict[int, Sample],
        rows: Ints,
        shards: Ints,
        faults: list[Fault],
        rules: Rules,
    ) -> _Read:
        """The samples that can be in one batch; the others are faults, too."""
        samples = []
        for position in sorted(found):
            name = self._catalog.entries[shards[position]].name
            try:
                check_sample(found[position], self.form(), rules, name)
                samples.append(found[position])
            except DataError as error:
                faults.append(Fault(name, int(rows[position]), str(error)))
        return samples, faults

    __getitem__ = read  # how a DataLoader asks

    def form(self) -> Form:
        """Shape and type of most arrays among the first samples of the first readable shard."""
        if self._form is None:
            self._form = NO_FORM
            for index, count in enumerate(self._catalog.counts[:_SHARDS_TRIED].tolist()):
                items = self._read(index, np.arange(min(count, LOOKED_AT)))
                samples = [item for item in items if not isinstance(item, DataError)]
                if samples:
                    self._form = common_form(samples)
                    break
        return self._form

    def stored(self, rows: Ints) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Key and members, by extension as it is written, of the samples at `rows`, in that order.

        Raises:
            DataError: a record that differs from the others, or is of several samples.
        """
        shards, places = self._catalog.locate(rows)
        for index, place in zip(shards.tolist(), places.tolist(), strict=True):
            shard, file = self._open(index)
            with file:
                yield shard.stored(file, place)

    def _read(self, index: int, places: Ints) -> Iterator[Sample | DataError]:
        try:
            shard, file = self._open(index)
        except DataError as error:
            yield from [error] * len(places)
            return
        with file:
            for place in places.tolist():
                try:
                    yield shard.sample(file, place)
                except DataError as error:
                    yield error

    def _open(self, index: int) -> "tuple[_CheckedShard, FileIO]":
        # the file that was checked, since another process may remove it at any time
        file = None if index in self._checked else self._check(index)
        self._checked.move_to_end(index)
        shard = self._checked[index]
        if isinstance(shard, DataError):
            raise shard
        file = file or shard.file()
        if file is None:  # fetched again since it was checked: check the new copy
            del self._checked[index]
            return self._open(index)
        return shard, file

    def _check(self, index: int) -> FileIO | None:
        entry, counts = self._catalog.entries[index], self._catalog.counts
        file = None
        try:
            self._checked[index], file = _open_checked(entry, self._fields)
        except DataError as error:
            self._checked[index] = error
        most = self._capacity + entry.shard.count
        while len(self._checked) > 1 and counts[list(self._checked)].sum() > most:
            self._checked.popitem(last=False)
        return file


def _open_checked(entry: Entry, fields: frozenset[str] | None) -> "tuple[_CheckedShard, FileIO]":
    """A shard and its open file; a local copy that is damaged is fetched once more."""
    for anew in (False, True) if entry.is_remote else (False,):
        file = entry.open(anew=anew)
        try:
            return _CheckedShard(entry, fields, file), file
        except DataError as error:
            problem = error
            with file:
                if entry.forget(file):
                    fix = "or start again, since what was remembered of the shard is forgotten now"
                    problem = DataError(f"{error}; {fix}")
    raise problem


class _CheckedShard:
    """A shard that agrees with the manifest, and where its samples lie."""

    def __init__(self, entry: Entry, fields: frozenset[str] | None, file: FileIO) -> None:
        self._entry = entry
        self._stem = entry.shard.name.removesuffix(".tar")
        self._fields = [f for f in entry.schema.names if fields is None or f in fields]
        self._plain = [(field, CODECS[field][1]) for field in self._fields]
        self._columns: dict[tuple[int, str], Sequence[Any]] = {}  # decoded fields of packed records
        self._signature, self._records = _signature(file), _index(entry, file)
        self._odd = _find_odd(entry, self._records)

    def file(self) -> FileIO | None:
        """The file, opened; None if it is a remote one that was fetched again since its check."""
        file = self._entry.open()
        if _signature(file) == self._signature:
            return file
        file.close()
        if self._entry.is_remote:
            return None
        raise damaged(self._entry.name, "stay as it is while it is read", "a change")

    def sample(self, file: FileIO, place: int) -> Sample:
        """The sample at `place`, or the DataError that says what it lacks."""
        pack, prefix = self._entry.pack, self._entry.prefix
        if self._odd and place // pack in self._odd:
            raise self._odd[place // pack]
        if pack == 1:
            record = self._records[place]
            sample: Sample = {"__key__": prefix + record.key}
            for field, decode in self._plain:
                if member := record.members.get(field):  # else it is optional
                    sample[field] = self._decode(file, record, field, member, decode)
            return sample
        index, row = divmod(place, pack)
        sample = {"__key__": f"{prefix}{self._stem}/{self._records[index].key}/{row}"}
        for field in self._fields:
            sample[field] = self._column(file, index, field)[row]
        return sample

    def stored(self, file: FileIO, place: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of the sample at `place`, without what is no file and is never read."""
        if place in self._odd:
            raise self._odd[place]
        record, members = self._records[place], {}
        for member in record.members.values():
            extension = member.name[len(record.key) + 1 :]
            if member.is_file and extension not in _UNWRITABLE:
                members[extension] = os.pread(file.fileno(), member.size, member.offset)
        return self._entry.prefix + record.key, members

    def _column(self, file: FileIO, index: int, field: str) -> Sequence[Any]:
        if (index, field) not in self._columns:
            record, pack = self._records[index], self._entry.pack
            member = record.members[PACKED[field].extension]
            column = self._decode(file, record, field, member, PACKED[field].decode)
            if len(column) != (size := min(pack, self._entry.shard.count - index * pack)):
                rule = f"hold {size} samples in field {field!r} of key {record.key!r}"
                raise damaged(self._entry.name, rule, f"{len(column)}")
            self._columns[index, field] = column
        return self._columns[index, field]

    def _decode(
        self,
        file: FileIO,
        record: Record,
        field: str,
        member: Member,
        decode: Callable[[bytes], Any],
    ) -> Any:
        try:
            return decode(os.pread(file.fileno(), member.size, member.offset))
        except Exception as error:  # decoders document no closed list of errors
            rule = f"hold a field {field!r} of key {record.key!r} that can be decoded"
            got = f"{type(error).__name__}: {error}"
            raise damaged(self._entry.name, rule, got) from error


def _signature(file: FileIO) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _index(entry: Entry, file: FileIO) -> list[Record]:
    """The records of a shard that agrees with the manifest."""
    shard = entry.shard
    try:
        records, digest = scan(file)
    except ValueError as error:
        raise damaged(entry.name, f"be a tar file of {shard.bytes} bytes", f"{error}") from error
    if digest != shard.sha256 and (odd := _find_odd(entry, records)):
        raise next(iter(odd.values()))
    if len(records) != (count := -(-shard.count // entry.pack)):
        kind = "samples" if entry.pack == 1 else "records"
        raise damaged(entry.name, f"hold {count} {kind}", f"{len(records)}")
    if digest != shard.sha256:  # last, since it does not say what is wrong
        rule = f"have {shard.bytes} bytes and sha256 {shard.sha256}"
        raise damaged(entry.name, rule, f"{os.fstat(file.fileno()).st_size} bytes and {digest}")
    return records


def _find_odd(entry: Entry, records: Sequence[Record]) -> dict[int, DataError]:
    """What is wrong with each record that the schema does not allow, by its place."""
    known: dict[tuple[str, ...], str | None] = {}  # most records have the same extensions
    odd = {}
    for place, record in enumerate(records):
        names = tuple(record.members)
        if names not in known:
            known[names] = _fault(entry, names)
        if got := known[names]:
            wanted = [_extension(entry, field) for field in entry.schema.fields]
            odd[place] = damaged(entry.name, f"hold the fields {wanted} of key {record.key!r}", got)
        for extension, member in record.members.items():
            if not member.is_file and (extension in CODECS or entry.pack > 1):
                rule = f"hold a file as member {member.name!r} of key {record.key!r}"
                odd[place] = damaged(entry.name, rule, "a link or device; pack with --dereference")
    return odd


def _fault(entry: Entry, extensions: Sequence[str]) -> str | None:
    if entry.pack == 1:
        return entry.schema.fault(extensions)
    wanted = [_extension(entry, field) for field in entry.schema.fields]
    missing = [extension for extension in wanted if extension not in extensions]
    return f"none of {missing}" if missing else None


def _extension(entry: Entry, field: str) -> str:
    return field if entry.pack == 1 else PACKED[field].extension


PoolRead = tuple[Batch | DataError, list[Fault]]
"""A pool, or why there is none, and its samples that cannot be read."""


def read_pools(
    reader: ShardReader, rows: Iterator[Ints], num_workers: int, prefetched: int = 2
) -> Iterator[PoolRead]:
    """Read a pool for each array of rows, as a model takes it: here, or in `num_workers` others.

    Args:
        num_workers: processes that read.
        prefetched: pools that each of them reads ahead, >= 1.
    """
    pools: Iterator[PoolRead]
    if num_workers == 0:
        pools = map(_pool, map(reader.read, rows))
    else:
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=rows,
            num_workers=num_workers,
            prefetch_factor=prefetched,
            collate_fn=_shared_pool,
            worker_init_fn=partial(_end_with_parent, os.getpid()),
            generator=torch.Generator(),  # else it draws from the generator that training uses
        )
        pools = iter(loader)
    for batch, faults in pools:
        yield (finish(batch) if isinstance(batch, dict) else batch), faults


def _pool(read: _Read) -> PoolRead:
    samples, faults = read
    if not samples:
        rule = f"a pool must hold a readable sample, got {len(faults)} that are not"
        return DataError(f"{rule}; the first: {faults[0].message}"), faults
    try:
        return collate(samples), faults
    except DataError as error:  # returned, since a DataLoader would wrap it in a traceback
        return error, faults


def _shared_pool(read: Any) -> PoolRead:  # of torch's type for `collate_fn`
    batch, faults = _pool(read)
    return (shared(batch) if isinstance(batch, dict) else batch), faults


def _end_with_parent(parent: int, _: int) -> None:
    """End this worker soon after the process that started it, even if that was killed.

    torch does so too, but not for a worker that is blocked writing to a full pipe.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
