"""The shards that a stream draws from, their samples numbered through as rows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selectflow.data.manifest import DataError, Shard, read_manifest

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entry:
    """One shard and how to read it.

    Attributes:
        path: the file.
        shard: what it holds, by the manifest.
        fields: extensions of every sample.
        pack: samples of a record.
        prefix: put before each key, to tell sources apart.
    """

    path: Path
    shard: Shard
    fields: tuple[str, ...]
    pack: int = 1
    prefix: str = ""


class Catalog:
    """Shards of one or more sources; row i is the i-th sample of all of them in stored order.

    Args:
        entries: the shards, at least one.
        lanes: number of shards of each source.
        fingerprint: digest of the manifests they come from.
    """

    def __init__(self, entries: Sequence[Entry], lanes: Sequence[int], fingerprint: str) -> None:
        self.entries, self.lanes, self.fingerprint = tuple(entries), tuple(lanes), fingerprint
        self.counts: Ints = np.array([entry.shard.count for entry in entries], dtype=np.int64)
        self._ends = self.counts.cumsum()
        self.num_samples = int(self._ends[-1])
        self.num_bytes = sum(entry.shard.bytes for entry in entries)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """Index of the shard of each row, and the row's place inside that shard."""
        shards = self._ends.searchsorted(rows, side="right")
        return shards, rows - (self._ends - self.counts)[shards]


def open_catalog(source: str | Path | Mapping[str, str | Path], split: str) -> Catalog:
    """The shards of one split.

    Args:
        source: a dataset directory, or several by name; keys then start with "<name>/".
        split: name of the split in each of them.

    Raises:
        DataError: no source, or one without a manifest or without that split.
    """
    if not isinstance(source, Mapping):
        return Catalog(*_entries(source, split, ""))
    if not source:
        raise DataError("source must name at least one dataset, got {}; add one")
    entries: list[Entry] = []
    lanes, prints = [], {}
    for name, root in source.items():
        found, (count,), prints[name] = _entries(root, split, f"{name}/")
        entries += found
        lanes.append(count)
    digest = hashlib.sha256(json.dumps(prints).encode()).hexdigest()
    return Catalog(entries, lanes, digest)


def _entries(root: str | Path, split: str, prefix: str) -> tuple[list[Entry], list[int], str]:
    manifest = read_manifest(root)
    entries = [
        Entry(Path(root, shard.name), shard, manifest.fields, manifest.pack, prefix)
        for shard in manifest.shards(split)
    ]
    return entries, [len(entries)], manifest.fingerprint()
