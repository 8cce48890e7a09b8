"""From what a user names as data to the shards to read: folders, manifests, lists and patterns."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from selectflow.core.files import atomic_file
from selectflow.data.cache import Cache, is_remote
from selectflow.data.fields import CODECS, Ints
from selectflow.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DataError,
    Manifest,
    Shard,
    damaged,
    parse_manifest,
    read_manifest,
)
from selectflow.data.tar_index import scan

Source = str | Path | Sequence[str | Path]
Sources = Source | Mapping[str, Source]


@dataclass(frozen=True)
class Entry:
    """One shard and how to read it.

    Attributes:
        url: a local path, a URL, or "pipe:" and a command.
        name: its name in messages.
        shard: its contents.
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
        fingerprint: digest of their contents.
    """

    def __init__(self, sources: Sequence[Sequence[Entry]], fingerprint: str) -> None:
        self.entries = tuple(entry for entries in sources for entry in entries)
        self.num_shards, self.fingerprint = tuple(map(len, sources)), fingerprint
        self.counts: Ints = np.array([entry.shard.count for entry in self.entries], dtype=np.int64)
        self._ends = self.counts.cumsum()
        self.num_samples = int(self._ends[-1])
        self.num_bytes = sum(entry.shard.bytes for entry in self.entries)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """Index of the shard of each row, and the row's place inside that shard."""
        shards = self._ends.searchsorted(rows, side="right")
        return shards, rows - (self._ends - self.counts)[shards]


def open_catalog(source: Sources, split: str, cache: Cache | None = None) -> Catalog:
    """The shards of one split.

    Args:
        source: a dataset directory or its manifest, local or remote; a folder of shards
            `<split>-*.tar`; a shard, a brace pattern like "part-{000..099}.tar", or a list of
            them, whose split is not asked for; or several of these by name, whose keys then start
            with "<name>/". Shards without a manifest are read once for their contents, which the
            cache remembers.
        split: name of the split in each of them.
        cache: for remote shards; None: the default one.

    Raises:
        DataError: no source, nothing there, no such split, or a damaged shard without a manifest.
    """
    cache = cache or Cache()
    if not isinstance(source, Mapping):
        entries, fingerprint = _entries(source, split, "", cache)
        return Catalog([entries], fingerprint)
    if not source:
        raise DataError("source must name at least one dataset, got {}; add one")
    found = {name: _entries(each, split, f"{name}/", cache) for name, each in source.items()}
    prints = {name: fingerprint for name, (_, fingerprint) in found.items()}
    return Catalog([entries for entries, _ in found.values()], _digest_of(prints))


def find_manifest(source: str | Path, cache: Cache | None = None) -> Manifest:
    """The manifest of a dataset directory, local or remote.

    Raises:
        DataError: there is none, or it is malformed.
    """
    root = _root_of(source)
    if not is_remote(root):
        return read_manifest(root)
    url = f"{root}/{MANIFEST_NAME}"
    return parse_manifest((cache or Cache()).fetch_anew(url).read_bytes(), url)


def read_tokenizer(root: str | Path, manifest: Manifest) -> bytes:
    """The tokenizer file of a dataset, local or remote, which its manifest gives the digest of.

    Raises:
        DataError: the file is missing, or another one.
    """
    name = f"{str(root).rstrip('/')}/{TOKENIZER_NAME}"
    path = Cache().fetch_anew(name) if is_remote(name) else Path(root, TOKENIZER_NAME)
    fix = "restore the file, or write the dataset again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} must be readable, got {error.strerror}; {fix}") from error
    if (digest := hashlib.sha256(data).hexdigest()) != (expected := manifest.tokenizer["sha256"]):
        raise DataError(
            f"{path} must be the tokenizer of the manifest, sha256 {expected[:12]}..., "
            f"got {digest[:12]}...: tokens would mean something else; {fix}"
        )
    return data


def find_splits(source: str | Path, cache: Cache | None = None) -> list[str]:
    """Names of the splits of a dataset directory, local or remote, or of a folder of shards.

    Raises:
        DataError: there is neither a manifest nor a local shard, or the manifest is malformed.
    """
    root = Path(str(source).removesuffix(MANIFEST_NAME))
    if not is_remote(str(source)) and not (root / MANIFEST_NAME).exists():
        names = {path.name.rpartition("-")[0] for path in root.glob("[!.]*-*.tar")}
        if names:
            return sorted(names)
    return list(find_manifest(source, cache).splits)


def _entries(source: Source, split: str, prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    if not isinstance(source, str | Path):
        return _listed([url for each in source for url in _expand(str(each))], prefix, cache)
    text = str(source).removeprefix("file://")
    if "{" in text or text.endswith(".tar") or text.startswith("pipe:"):
        return _listed(list(_expand(text)), prefix, cache)
    root = _root_of(text)
    shards = [] if is_remote(root) else sorted(Path(root).glob(f"{split}-*.tar"))
    if shards and not Path(root, MANIFEST_NAME).exists():
        return _listed([str(path) for path in shards], prefix, cache)
    return _described(root, find_manifest(root, cache), split, prefix, cache)


def _root_of(source: str | Path) -> str:
    """The dataset directory of a directory or manifest."""
    return str(source).removesuffix(MANIFEST_NAME).rstrip("/") or "."


def _expand(text: str) -> Iterator[str]:
    return (url.removeprefix("file://") for url in braceexpand(text))


def _described(
    root: str, manifest: Manifest, split: str, prefix: str, cache: Cache
) -> tuple[list[Entry], str]:
    entries = [
        Entry(
            f"{root}/{shard.name}",
            f"{root}/{shard.name}" if is_remote(root) else shard.name,
            shard,
            manifest.fields,
            manifest.pack,
            prefix,
            cache,
        )
        for shard in manifest.shards(split)
    ]
    return entries, manifest.fingerprint()


def _listed(urls: Sequence[str], prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    """Entries of shards without a manifest; those without samples are left out."""
    entries = []
    fields: tuple[str, ...] = ()
    for url in urls:
        shard, found = _describe(url, cache)
        fields = fields or found
        if shard:
            entries.append(Entry(url, url, shard, fields, 1, prefix, cache))
    if not entries or not fields:
        known = ", ".join(CODECS)
        raise DataError(
            f"source must hold samples with fields out of {known}, got none in {list(urls)[:3]}; "
            "correct the path or the pattern"
        )
    contents = [[entry.shard.count, entry.shard.sha256] for entry in entries]
    return entries, _digest_of([contents, fields])


def _describe(url: str, cache: Cache) -> tuple[Shard | None, tuple[str, ...]]:
    """The shard and the known fields of its first record; of local ones, the cache remembers."""
    try:
        path = cache.fetch(url) if is_remote(url) else Path(url)
        with path.open("rb", buffering=0) as file:
            if is_remote(url):
                return _scanned(url, file)
            stat = os.fstat(file.fileno())
            digest = _digest_of([url, stat.st_size, stat.st_mtime_ns])
            memory = cache.directory / f"{digest[:40]}.json"
            if memory.exists():
                known = json.loads(memory.read_bytes())
                return Shard(**known["shard"]), tuple(known["fields"])
            shard, fields = _scanned(url, file)
    except OSError as error:
        raise damaged(url, "be present and readable", f"{error.strerror}") from error
    if shard:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(memory) as out:
            out.write(json.dumps({"shard": asdict(shard), "fields": fields}).encode())
    return shard, fields


def _scanned(url: str, file: FileIO) -> tuple[Shard | None, tuple[str, ...]]:
    try:
        records, digest = scan(file)
    except ValueError as error:
        raise damaged(url, "be a whole tar file", f"{error}") from error
    if not records:
        return None, ()
    size = os.fstat(file.fileno()).st_size
    fields = tuple(sorted(CODECS.keys() & records[0].members.keys()))
    return Shard(Path(url).name or "shard", len(records), size, digest), fields


def _digest_of(value: object) -> str:
    """Hex digest of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
