"""From what a user names as data to shards: found in folders, manifests, lists and patterns."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from selectflow.data.cache import Cache
from selectflow.data.fields import CODECS, Ints
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    damaged,
    find_shards,
    parse_manifest,
    read_manifest,
)
from selectflow.data.schema import Census, Schema, check_alike, find_schema, has_equal_keys
from selectflow.data.tar_index import scan
from selectflow.data.urls import expand, is_listed, is_remote, member, name_of, root_of

_AT_ONCE = 8  # shards whose versions are requested at once
_FORMAT = 3  # of what is remembered of a shard
_SETTLED_NS = 50_000_000  # a file that changed so lately may change again at an equal time

Source = str | Path | Sequence[str | Path]
Sources = Source | Mapping[str, Source]


@dataclass(frozen=True)
class Entry:
    """One shard and how to read it."""

    url: str  # a local path, a URL, or "pipe:" and a command
    name: str  # in messages
    shard: Shard
    schema: Schema  # of its samples
    pack: int  # samples of a record
    prefix: str  # put before each key, to tell sources apart
    cache: Cache  # where a remote shard is kept
    version: str  # of a remote shard, as the cache knows it

    @property
    def is_remote(self) -> bool:
        """Whether the shard has to be fetched."""
        return is_remote(self.url)

    def open(self, *, anew: bool = False) -> FileIO:
        """The file, to be closed; a remote one is fetched if need be, or if `anew` is true.

        Raises:
            DataError: it is missing or cannot be read or fetched.
        """
        return _open(self.url, self.name, self.cache, self.version, anew)

    def forget(self, file: FileIO) -> bool:
        """Whether anything was remembered of the open file, which must be wrong; it is dropped."""
        return self.cache.forget(_note(self.url, self.version, os.fstat(file.fileno())))


def _open(url: str, name: str, cache: Cache, version: str, anew: bool) -> FileIO:
    if is_remote(url):
        return cache.open(url, version, anew=anew)
    try:
        return FileIO(url)
    except FileNotFoundError:
        raise damaged(name, "be present", "no such file") from None
    except OSError as error:
        raise damaged(name, "be readable", f"{error.strerror}") from error


class Catalog:
    """Shards of one or more sources, at least one each, and a digest of their contents.

    Row i is the i-th sample of all of them in stored order.
    """

    def __init__(self, sources: Mapping[str, tuple[list[Entry], str]], fingerprint: str) -> None:
        self.names = tuple(sources)  # ("",) of one source without a name
        self.fingerprints = {name: digest for name, (_, digest) in sources.items()}
        self.entries = tuple(entry for entries, _ in sources.values() for entry in entries)
        self.num_shards = tuple(len(entries) for entries, _ in sources.values())
        self.fingerprint = fingerprint
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
            `<split>-<digits>.tar`; a shard, a brace pattern like "part-{000..099}.tar", or a list
            of them, whose split is not asked for; or several of these by name, whose keys then
            start with "<name>/". Shards without a manifest are read once for their contents, which
            the cache remembers: their fields are those of most samples, and where a key is in
            several of them, all keys start with the name of their shard.
        split: name of the split in each of them.
        cache: for remote shards; None: the default one.

    Raises:
        DataError: no source, nothing there, no such split, a shard named twice, sources of
            different fields, or a damaged shard without a manifest.
    """
    cache = cache or Cache()
    if not isinstance(source, Mapping):
        entries, fingerprint = _entries(source, split, "", cache)
        return Catalog({"": (entries, fingerprint)}, fingerprint)
    if not source:
        raise DataError("source must name at least one dataset, got {}; add one")
    found = {name: _entries(each, split, f"{name}/", cache) for name, each in source.items()}
    check_alike({name: entries[0].schema for name, (entries, _) in found.items()})
    prints = {name: fingerprint for name, (_, fingerprint) in found.items()}
    return Catalog(found, _digest_of(prints))


def find_manifest(source: str | Path, cache: Cache | None = None) -> Manifest:
    """The manifest of a dataset directory, local or remote.

    Raises:
        DataError: there is none, or it is malformed.
    """
    root = root_of(source)
    if not is_remote(root):
        return read_manifest(root)
    url = member(root, MANIFEST_NAME)
    return parse_manifest((cache or Cache()).read(url), url)


def find_splits(source: str | Path, cache: Cache | None = None) -> list[str]:
    """Names of the splits of a dataset directory, local or remote, or of a folder of shards.

    Raises:
        DataError: there is neither a manifest nor a local shard, or the manifest is malformed.
    """
    root = root_of(source)
    is_plain = not is_remote(root) and not Path(root, MANIFEST_NAME).exists()
    if is_plain and (found := find_shards(root)):
        return list(found)
    return list(find_manifest(root, cache).splits)


def _entries(source: Source, split: str, prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    if not isinstance(source, str | Path):
        return _listed([url for each in source for url in expand(str(each))], prefix, cache)
    if is_listed(str(source)):
        return _listed(list(expand(str(source))), prefix, cache)
    root = root_of(source)
    is_plain = not is_remote(root) and not Path(root, MANIFEST_NAME).exists()
    if is_plain and (shards := find_shards(root).get(split)):
        return _listed([str(path) for path in shards], prefix, cache)
    manifest, entries = find_manifest(root, cache), []
    optional = manifest.optional.get(split, ())
    schema = Schema(tuple(f for f in manifest.fields if f not in optional), optional)
    for shard in manifest.shards(split):
        url = member(root, shard.name)
        name = url if is_remote(root) else shard.name
        about = (schema, manifest.pack, prefix, cache)
        entries.append(Entry(url, name, shard, *about, version=shard.sha256))
    return entries, manifest.fingerprint()


def _listed(urls: Sequence[str], prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    """Entries of shards without a manifest; those without samples are left out."""
    if twice := next((url for url, count in Counter(urls).items() if count > 1), None):
        raise DataError(f"source must list each shard once, got {twice} twice; leave one out")
    versions = _versions(urls, cache)
    described = [
        (url, version, *_describe(url, version, cache))
        for url, version in zip(urls, versions, strict=True)
    ]
    censuses = [census for *_, census in described]
    schema = find_schema(censuses)
    if not schema.names:
        known = ", ".join(CODECS)
        raise DataError(
            f"source must hold samples with fields out of {known}, got none in {list(urls)[:3]}; "
            "correct the path or the pattern"
        )
    apart = _apart(urls) if has_equal_keys(censuses) else {}
    entries = [
        Entry(url, url, shard, schema, 1, prefix + apart.get(url, ""), cache, version)
        for url, version, shard, _ in described
        if shard
    ]
    contents = [[entry.shard.count, entry.shard.sha256] for entry in entries]
    return entries, _digest_of([contents, schema.names])


def _versions(urls: Sequence[str], cache: Cache) -> list[str]:
    """The version of each remote shard, "" for local ones."""
    if not any(map(is_remote, urls)):
        return [""] * len(urls)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda url: cache.version(url) if is_remote(url) else "", urls))


def _apart(urls: Sequence[str]) -> dict[str, str]:
    """What tells equal keys of several shards apart: the name of the shard, and a slash."""
    names = [name_of(url).removesuffix(".tar") for url in urls]
    if len(set(names)) < len(names):  # of several folders
        names = [str(index) for index in range(len(names))]
    return {url: f"{name}/" for url, name in zip(urls, names, strict=True)}


def _describe(
    url: str, version: str, cache: Cache, *, anew: bool = False
) -> tuple[Shard | None, Census]:
    """The shard and what its records hold, which the cache remembers."""
    anew = anew or not version  # of no version, a copy may be of any age
    if is_remote(url) and version and (known := _recalled(_note(url, version), cache)):
        return known
    with _open(url, url, cache, version, anew) as file:
        stat = os.fstat(file.fileno())
        if not is_remote(url) and (known := _recalled(_note(url, version, stat), cache)):
            return known
        try:
            records, digest = scan(file)
        except ValueError as error:
            if is_remote(url) and not anew:  # the local copy is damaged
                return _describe(url, version, cache, anew=True)
            raise damaged(url, "be a whole tar file", f"{error}") from error
    census = Census.of(records)
    if not records:
        return None, census
    shard = Shard(name_of(url) or "shard", len(records), stat.st_size, digest)
    is_settled = version if is_remote(url) else time.time_ns() > stat.st_ctime_ns + _SETTLED_NS
    if is_settled:
        found = {"shard": asdict(shard), "census": asdict(census)}
        cache.remember(_note(url, version, stat), found)
    return shard, census


def _note(url: str, version: str, stat: os.stat_result | None = None) -> list[object]:
    """The name of what is remembered of a shard: all that changes when the shard does."""
    name = [_FORMAT, sorted(CODECS), url, version]
    if stat is None or is_remote(url):
        return name
    # the time of change (ctime) tells a file that was replaced with its date kept
    return [*name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _recalled(name: object, cache: Cache) -> tuple[Shard, Census] | None:
    known = cache.recall(name)
    try:
        return (Shard(**known["shard"]), Census(**known["census"])) if known else None
    except (DataError, KeyError, TypeError):  # not written by this version of the program
        return None


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
