"""The shards that a stream draws from, their samples numbered through as rows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selectflow.data.manifest import DataError, Shard
from selectflow.data.remote import Cache, is_remote

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entry:
    """One shard and how to read it.

    Attributes:
        url: a local path, a URL, or "pipe:" and a command.
        name: what messages call it.
        shard: what it holds.
        fields: extensions of every sample.
        pack: samples of a record.
        prefix: put before each key, to tell sources apart.
        cache: where a remote shard is kept.
    """

    url: str
    name: str
    shard: Shard
    fields: tuple[str, ...]
    pack: int
    prefix: str
    cache: Cache

    @property
    def is_remote(self) -> bool:
        """Whether the shard has to be fetched."""
        return is_remote(self.url)

    def path(self) -> Path:
        """The local file, fetched if need be.

        Raises:
            DataError: it cannot be fetched.
        """
        return self.cache.fetch(self.url) if self.is_remote else Path(self.url)


class Catalog:
    """Shards of one or more sources; row i is the i-th sample of all of them in stored order.

    Args:
        sources: the shards of each source, at least one each.
        fingerprint: digest of what they hold.
    """

    def __init__(self, sources: Sequence[Sequence[Entry]], fingerprint: str) -> None:
        self.entries = tuple(entry for entries in sources for entry in entries)
        self.lanes, self.fingerprint = tuple(map(len, sources)), fingerprint
        self.counts: Ints = np.array([entry.shard.count for entry in self.entries], dtype=np.int64)
        self._ends = self.counts.cumsum()
        self.num_samples = int(self._ends[-1])
        self.num_bytes = sum(entry.shard.bytes for entry in self.entries)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """Index of the shard of each row, and the row's place inside that shard."""
        shards = self._ends.searchsorted(rows, side="right")
        return shards, rows - (self._ends - self.counts)[shards]


def damaged(name: str, rule: str, got: str) -> DataError:
    """The error of a shard that breaks a rule."""
    fix = "restore the file, or write the dataset again"
    return DataError(f"shard {name} must {rule}, got {got}; {fix}")


def digest_of(value: object) -> str:
    """Hex digest of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


Source = str | Path | Sequence[str | Path]
Sources = Source | Mapping[str, Source]
