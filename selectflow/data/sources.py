"""From what a user names as data to local shards: found in folders, manifests, lists and patterns.

Remote shards are fetched whole, and kept on the local disk up to a size.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from braceexpand import braceexpand

from selectflow.core.files import atomic_file
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

Source = str | Path | Sequence[str | Path]
Sources = Source | Mapping[str, Source]

_PIPE = "pipe:"
_DESCRIPTION = 2  # version of what the cache remembers of a local shard


def is_remote(url: str) -> bool:
    """Whether a shard has to be fetched before it can be read."""
    return "://" in url or url.startswith(_PIPE)


def _default_directory() -> Path:
    return Path(os.environ.get("SELECTFLOW_CACHE", "~/.cache/selectflow")).expanduser()


@dataclass(frozen=True)
class Cache:
    """Where fetched shards are kept, and how they are fetched.

    Several processes may share a directory: a file appears only once it is whole. The files used
    longest ago are removed first.

    Args:
        directory: made if missing; by default $SELECTFLOW_CACHE, else ~/.cache/selectflow.
        max_gib: size above which shards are removed, in GiB, > 0; let it hold twice the shards
            that are shuffled together.
        attempts: times a shard is tried, >= 1.
        backoff_s: seconds before the second attempt, doubled before each further one, >= 0.
        timeout_s: an attempt over http or https ends once no byte has come for this many seconds,
            > 0; other file systems have limits of their own.
        allow_pipe: True runs the shell command of a `pipe:` source.

    Raises:
        DataError: an argument out of its range.
    """

    directory: Path = field(default_factory=_default_directory)
    max_gib: float = 20.0
    attempts: int = 4
    backoff_s: float = 0.5
    timeout_s: float = 60.0
    allow_pipe: bool = False

    def __post_init__(self) -> None:
        is_right = self.max_gib > 0 and self.attempts >= 1 and self.backoff_s >= 0
        if not (is_right and self.timeout_s > 0):
            raise DataError(
                "max_gib must be > 0, attempts >= 1, backoff_s >= 0 and timeout_s > 0, got "
                f"{self.max_gib}, {self.attempts}, {self.backoff_s} and {self.timeout_s}; see Cache"
            )

    def fetch(self, url: str, *, anew: bool = False) -> Path:
        """The local copy of a shard, fetched if there is none, or if `anew` is true.

        Raises:
            DataError: it cannot be fetched in all attempts, or it is a `pipe:` that is not
                allowed. Names the shard.
        """
        path = self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:40]}.shard"
        if is_new := anew or not path.exists():
            self._fetch(url, path)
        # the time of access is now; a reader tells by the time of change what it has checked
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        if is_new:
            self._shrink()
        return path

    def _fetch(self, url: str, path: Path) -> None:
        if url.startswith(_PIPE) and not self.allow_pipe:
            raise DataError(
                f"source must not run commands, got {url!r}; allow them by Cache(allow_pipe=True)"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, self.attempts + 1):
            try:
                with atomic_file(path) as file, _open(url, self.timeout_s) as stream:
                    shutil.copyfileobj(stream, file, 1 << 20)
                return
            except ImportError as error:
                raise DataError(
                    f"shard {url} must be of a file system that is installed, got {error}; "
                    "pip install 'selectflow[remote]'"
                ) from error
            except Exception as error:  # each file system has errors of its own
                if attempt == self.attempts or isinstance(error, FileNotFoundError):
                    raise DataError(
                        f"shard {url} must be readable, got {type(error).__name__}: {error} in "
                        f"attempt {attempt}; check the address and the connection"
                    ) from error
                time.sleep(self.backoff_s * 2 ** (attempt - 1))

    def _shrink(self) -> None:
        shards = []
        for path in self.directory.glob("*.shard"):
            with suppress(FileNotFoundError):  # removed by another process
                stat = path.stat()
                shards.append((stat.st_atime, stat.st_size, path))
        (_, used, _), *others = sorted(shards, reverse=True)
        for _, size, path in others:
            used += size
            if used > self.max_gib * 2**30:
                path.unlink(missing_ok=True)


@contextmanager
def _open(url: str, timeout_s: float) -> Iterator[IO[bytes]]:
    if not url.startswith(_PIPE):
        import fsspec  # noqa: PLC0415 - only remote data need it

        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            from aiohttp import ClientTimeout  # noqa: PLC0415

            # aiohttp's default is five minutes in all: too long for a server that hangs, too short
            # for a slow one
            timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            options["client_kwargs"] = {"timeout": timeout}
        with fsspec.open(url, "rb", **options) as stream:
            yield stream
        return
    command = url.removeprefix(_PIPE)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout
    if process.returncode:
        raise OSError(f"exit status {process.returncode}")


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

    @property
    def is_remote(self) -> bool:
        """Whether the shard has to be fetched."""
        return is_remote(self.url)

    def path(self) -> Path:
        """The local file, fetched if need be; the errors of `Cache.fetch`."""
        return self.cache.fetch(self.url) if self.is_remote else Path(self.url)


class Catalog:
    """Shards of one or more sources, at least one each, and a digest of their contents.

    Row i is the i-th sample of all of them in stored order.
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
        return Catalog([entries], fingerprint)
    if not source:
        raise DataError("source must name at least one dataset, got {}; add one")
    found = {name: _entries(each, split, f"{name}/", cache) for name, each in source.items()}
    check_alike({name: entries[0].schema for name, (entries, _) in found.items()})
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
    return parse_manifest((cache or Cache()).fetch(url, anew=True).read_bytes(), url)


def find_splits(source: str | Path, cache: Cache | None = None) -> list[str]:
    """Names of the splits of a dataset directory, local or remote, or of a folder of shards.

    Raises:
        DataError: there is neither a manifest nor a local shard, or the manifest is malformed.
    """
    root = _root_of(source)
    if (
        not is_remote(root)
        and not Path(root, MANIFEST_NAME).exists()
        and (found := find_shards(root))
    ):
        return list(found)
    return list(find_manifest(source, cache).splits)


def _entries(source: Source, split: str, prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    if not isinstance(source, str | Path):
        return _listed([url for each in source for url in _expand(str(each))], prefix, cache)
    text = str(source).removeprefix("file://")
    if "{" in text or text.endswith(".tar") or text.startswith(_PIPE):
        return _listed(list(_expand(text)), prefix, cache)
    root = _root_of(text)
    is_plain = not is_remote(root) and not Path(root, MANIFEST_NAME).exists()
    if is_plain and (shards := find_shards(root).get(split)):
        return _listed([str(path) for path in shards], prefix, cache)
    manifest, entries = find_manifest(root, cache), []
    optional = manifest.optional.get(split, ())
    schema = Schema(tuple(f for f in manifest.fields if f not in optional), optional)
    for shard in manifest.shards(split):
        url = f"{root}/{shard.name}"
        name = url if is_remote(root) else shard.name
        entries.append(Entry(url, name, shard, schema, manifest.pack, prefix, cache))
    return entries, manifest.fingerprint()


def _root_of(source: str | Path) -> str:
    """The dataset directory of a directory or manifest."""
    return str(source).removesuffix(MANIFEST_NAME).rstrip("/") or "."


def _expand(text: str) -> Iterator[str]:
    return (url.removeprefix("file://") for url in braceexpand(text))


def _listed(urls: Sequence[str], prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    """Entries of shards without a manifest; those without samples are left out."""
    if twice := next((url for url, count in Counter(urls).items() if count > 1), None):
        raise DataError(f"source must list each shard once, got {twice} twice; leave one out")
    described = [(url, *_describe(url, cache)) for url in urls]
    schema = find_schema(census for _, _, census in described)
    if not schema.names:
        known = ", ".join(CODECS)
        raise DataError(
            f"source must hold samples with fields out of {known}, got none in {list(urls)[:3]}; "
            "correct the path or the pattern"
        )
    apart = _apart(urls) if has_equal_keys([census for _, _, census in described]) else {}
    entries = [
        Entry(url, url, shard, schema, 1, prefix + apart.get(url, ""), cache)
        for url, shard, _ in described
        if shard
    ]
    contents = [[entry.shard.count, entry.shard.sha256] for entry in entries]
    return entries, _digest_of([contents, schema.names])


def _apart(urls: Sequence[str]) -> dict[str, str]:
    """What tells equal keys of several shards apart: the name of the shard, and a slash."""
    # without what a URL asks, such as a signature
    plain = [url.partition("?")[0] if "://" in url else url for url in urls]
    names = [Path(url).name.removesuffix(".tar") for url in plain]
    if len(set(names)) < len(names):  # of several folders
        names = [str(index) for index in range(len(names))]
    return {url: f"{name}/" for url, name in zip(urls, names, strict=True)}


def _describe(url: str, cache: Cache) -> tuple[Shard | None, Census]:
    """The shard and what its records hold; of local ones, the cache remembers."""
    memory = None
    try:
        path = cache.fetch(url) if is_remote(url) else Path(url)
        with path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if not is_remote(url):
                digest = _digest_of([_DESCRIPTION, url, stat.st_size, stat.st_mtime_ns])
                memory = cache.directory / f"{digest[:40]}.json"
                if memory.exists():
                    known = json.loads(memory.read_bytes())
                    return Shard(**known["shard"]), Census(**known["census"])
            records, digest = scan(file)
    except DataError:
        raise
    except OSError as error:
        raise damaged(url, "be present and readable", f"{error.strerror}") from error
    except ValueError as error:
        raise damaged(url, "be a whole tar file", f"{error}") from error
    census = Census.of(records)
    if not records:
        return None, census
    shard = Shard(Path(url).name or "shard", len(records), stat.st_size, digest)
    if memory:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(memory) as out:
            out.write(json.dumps({"shard": asdict(shard), "census": asdict(census)}).encode())
    return shard, census


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
