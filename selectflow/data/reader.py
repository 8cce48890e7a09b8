"""Samples read from shards at any row, each shard checked before its first sample is used."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import FileIO
from typing import Any, NamedTuple

import numpy as np

from selectflow.data.catalog import Catalog, Entry, Ints, damaged
from selectflow.data.fields import CODECS, PACKED, Sample
from selectflow.data.manifest import DataError
from selectflow.data.tar_index import Record, list_records


class Fault(NamedTuple):
    """A sample that cannot be read.

    Attributes:
        shard: name of its shard.
        row: its number in the catalog.
        message: what is wrong, where, and what to do.
    """

    shard: str
    row: int
    message: str


class ShardReader:
    """Reads samples by row. Holds the indexes of the shards used last, and no open files.

    Args:
        catalog: the shards.
        fields: extensions to decode; None: all.
        capacity: samples in the shards whose index is held, beyond the shard in use.
    """

    def __init__(
        self, catalog: Catalog, fields: Iterable[str] | None = None, capacity: int = 0
    ) -> None:
        self._catalog, self._capacity, self._held = catalog, capacity, 0
        self._fields = None if fields is None else frozenset(fields)
        self._opened: OrderedDict[int, _Opened | DataError] = OrderedDict()

    def read(self, rows: Ints) -> tuple[list[Sample], list[Fault]]:
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
        return [found[position] for position in sorted(found)], faults

    def _read(self, index: int, places: Ints) -> Iterator[Sample | DataError]:
        try:
            opened, file = self._open_file(index)
        except DataError as error:
            yield from [error] * len(places)
            return
        with file:
            for place in places.tolist():
                try:
                    yield opened.sample(file, place)
                except DataError as error:
                    yield error

    def _open_file(self, index: int) -> "tuple[_Opened, FileIO]":
        opened = self._open(index)
        if isinstance(opened, DataError):
            raise opened
        file = opened.file()
        if file is None:  # fetched again since, so checked again
            del self._opened[index]
            self._held -= int(self._catalog.counts[index])
            return self._open_file(index)
        return opened, file

    def _open(self, index: int) -> "_Opened | DataError":
        if index in self._opened:
            self._opened.move_to_end(index)
            return self._opened[index]
        entry = self._catalog.entries[index]
        try:
            self._opened[index] = _Opened(entry, self._fields)
        except DataError as error:
            self._opened[index] = error
        self._held += entry.shard.count
        while len(self._opened) > 1 and self._held > self._capacity + entry.shard.count:
            oldest, _ = self._opened.popitem(last=False)
            self._held -= int(self._catalog.counts[oldest])
        return self._opened[index]


class _Opened:
    """A shard that was found to be what the manifest says, and where its samples lie."""

    def __init__(self, entry: Entry, fields: frozenset[str] | None) -> None:
        self._entry = entry
        self._stem = entry.shard.name.removesuffix(".tar")
        self._fields = [f for f in entry.fields if fields is None or f in fields]
        self._columns: dict[tuple[int, str], Sequence[Any]] = {}  # decoded fields of packed records
        with _open_file(entry) as file:
            try:
                self._check(file)
                return
            except DataError:
                if not entry.is_remote:
                    raise
        entry.cache.forget(entry.url)  # a damaged copy: once more from where it comes
        with _open_file(entry) as file:
            self._check(file)

    def _check(self, file: FileIO) -> None:
        self._signature = _signature(file)
        self._records = _index(self._entry, file)

    def file(self) -> FileIO | None:
        """The file, opened; None for another copy of a remote one than was checked.

        Raises:
            DataError: it is gone, or another than the one that was checked.
        """
        file = _open_file(self._entry)
        if _signature(file) == self._signature:
            return file
        file.close()
        if self._entry.is_remote:
            return None
        raise damaged(self._entry.name, "stay as it is while it is read", "a change")

    def sample(self, file: FileIO, place: int) -> Sample:
        """The sample at `place` of the shard.

        Raises:
            DataError: it lacks a field, or one cannot be decoded.
        """
        pack, prefix = self._entry.pack, self._entry.prefix
        if pack == 1:
            record = self._records[place]
            sample: Sample = {"__key__": prefix + record.key}
            for field in self._fields:
                sample[field] = self._decode(file, record, field, CODECS[field][1])
            return sample
        index, row = divmod(place, pack)
        sample = {"__key__": f"{prefix}{self._stem}/{self._records[index].key}/{row}"}
        for field in self._fields:
            sample[field] = self._column(file, index, field)[row]
        return sample

    def _column(self, file: FileIO, index: int, field: str) -> Sequence[Any]:
        if (index, field) not in self._columns:
            record, pack = self._records[index], self._entry.pack
            column = self._decode(file, record, field, PACKED[field].decode)
            if len(column) != (size := min(pack, self._entry.shard.count - index * pack)):
                rule = f"hold {size} samples in field {field!r} of key {record.key!r}"
                raise damaged(self._entry.name, rule, f"{len(column)}")
            self._columns[index, field] = column
        return self._columns[index, field]

    def _decode(
        self, file: FileIO, record: Record, field: str, decode: Callable[[bytes], Any]
    ) -> Any:
        member = record.members.get(_extension(self._entry, field))
        if member is None:
            raise _missing(self._entry, record)
        try:
            return decode(os.pread(file.fileno(), member.size, member.offset))
        except Exception as error:  # decoders document no closed list of errors
            rule = f"hold a field {field!r} of key {record.key!r} that can be decoded"
            got = f"{type(error).__name__}: {error}"
            raise damaged(self._entry.name, rule, got) from error


def _open_file(entry: Entry) -> FileIO:
    try:
        return entry.path().open("rb", buffering=0)
    except FileNotFoundError:
        raise damaged(entry.name, "be present", "no such file") from None
    except OSError as error:
        raise damaged(entry.name, "be readable", f"{error.strerror}") from error


def _signature(file: FileIO) -> tuple[int, ...]:
    stat = os.fstat(file.fileno())
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _index(entry: Entry, file: FileIO) -> list[Record]:
    """The records of a shard.

    Raises:
        DataError: the shard is not what the manifest says. A wrong checksum is reported last,
            since it cannot tell what is wrong.
    """
    shard = entry.shard
    try:
        records = list_records(file)
    except ValueError as error:
        raise damaged(entry.name, f"be a tar file of {shard.bytes} bytes", f"{error}") from error
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        for record in records:
            if any(_extension(entry, field) not in record.members for field in entry.fields):
                raise _missing(entry, record)
    if len(records) != (count := -(-shard.count // entry.pack)):
        kind = "samples" if entry.pack == 1 else "records"
        raise damaged(entry.name, f"hold {count} {kind}", f"{len(records)}")
    if digest != shard.sha256:
        rule = f"have {shard.bytes} bytes and sha256 {shard.sha256}"
        raise damaged(entry.name, rule, f"{os.fstat(file.fileno()).st_size} bytes and {digest}")
    return records


def _missing(entry: Entry, record: Record) -> DataError:
    wanted = [_extension(entry, field) for field in entry.fields]
    rule = f"hold the fields {wanted} of key {record.key!r}"
    return damaged(entry.name, rule, f"none of {[e for e in wanted if e not in record.members]}")


def _extension(entry: Entry, field: str) -> str:
    return field if entry.pack == 1 else PACKED[field].extension
