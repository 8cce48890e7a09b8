"""Which samples are of which source: of several datasets, or of one whose records name theirs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selectflow.data.fields import Ints
from selectflow.data.form import Rules
from selectflow.data.manifest import DataError
from selectflow.data.reader import ShardReader
from selectflow.data.sources import Catalog
from selectflow.data.urls import name_of

_CHUNK = 4096  # samples whose names are read at once


@dataclass(frozen=True)
class Part:
    """The samples of one source.

    Attributes:
        counts: of each of its shards, >= 1.
        first: its first row, where its rows follow each other.
        rows: its rows in stored order, where they do not.
        in_shards: samples of all sources in its shards.
    """

    counts: Ints
    first: int
    rows: Ints | None
    in_shards: int

    @property
    def size(self) -> int:
        """Its samples."""
        return int(self.counts.sum())


class Grouping:
    """The sources of the samples of a catalog.

    Args:
        catalog: the shards.
        by: what names the source of a sample: "shard", the file; "key", what stands before the
            first slash of its key; "json.<field>", a field of its json. None: the catalog's own
            sources.

    Attributes:
        names: of the sources; [""] where there is one without a name.
        parts: the samples of each.

    Raises:
        DataError: `by` is none of these, the catalog has sources already, or a sample does not say.
    """

    def __init__(self, catalog: Catalog, by: str | None = None) -> None:
        if by is None:
            self.names, self._labels = list(catalog.names), None
            ends = np.cumsum(catalog.num_shards)
            firsts = np.concatenate([[0], catalog.counts.cumsum()])
            self.parts = []
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                counts = catalog.counts[start:end]
                self.parts.append(Part(counts, int(firsts[start]), None, int(counts.sum())))
            self._ends: Ints = np.cumsum([part.size for part in self.parts])
            return
        if catalog.names != ("",):
            raise DataError(
                f"by must be left out where sources are given by name, got {by!r} and "
                f"{list(catalog.names)}; give one dataset, or the sources alone"
            )
        found = list(_named(catalog, by))
        self.names = sorted(set(found))
        places = {name: place for place, name in enumerate(self.names)}
        self._labels = np.array([places[name] for name in found], dtype=np.int64)
        self.parts = [_part(catalog, np.flatnonzero(self._labels == i)) for i in places.values()]

    def of(self, rows: Ints) -> Ints:
        """Place in `names` of the source of each row."""
        if self._labels is not None:
            return self._labels[rows]
        return np.asarray(self._ends.searchsorted(rows, side="right"))


def _part(catalog: Catalog, rows: Ints) -> Part:
    shards, counts = np.unique(catalog.locate(rows)[0], return_counts=True)
    return Part(counts, 0, rows, int(catalog.counts[shards].sum()))


def _named(catalog: Catalog, by: str) -> Iterator[str]:
    """The name of the source of each row, in order."""
    kind, _, field = by.partition(".")
    if by == "shard":
        for entry in catalog.entries:
            yield from [name_of(entry.name).removesuffix(".tar")] * entry.shard.count
    elif by == "key":
        for sample in _read(catalog, ()):
            yield sample["__key__"].partition("/")[0]
    elif kind == "json" and field:
        for sample in _read(catalog, ("json",)):
            if field not in sample.get("json", {}):
                raise DataError(
                    f"by must be what each sample says, got {by!r}, which key "
                    f"{sample['__key__']!r} lacks; add it, or use 'shard' or 'key'"
                )
            yield str(sample["json"][field])
    else:
        raise DataError(f"by must be 'shard', 'key' or 'json.<field>', got {by!r}; choose one")


def _read(catalog: Catalog, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All samples, of each these fields alone."""
    reader = ShardReader(catalog, fields, rules=Rules() if fields else None)
    for start in range(0, catalog.num_samples, _CHUNK):
        samples, faults = reader.read(np.arange(start, min(start + _CHUNK, catalog.num_samples)))
        if faults:
            raise DataError(f"{faults[0].message}; or name sources by 'shard', unread")
        yield from samples
