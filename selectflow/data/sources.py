"""From what a user names as data to the shards to read: folders, manifests, lists and patterns."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from braceexpand import braceexpand

from selectflow.core.files import atomic_file
from selectflow.data.catalog import Catalog, Entry, Source, Sources, damaged, digest_of
from selectflow.data.fields import CODECS
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    parse_manifest,
    read_manifest,
)
from selectflow.data.remote import Cache, is_remote
from selectflow.data.tar_index import list_records


def open_catalog(source: Sources, split: str, cache: Cache | None = None) -> Catalog:
    """The shards of one split.

    Args:
        source: a dataset directory or its manifest, local or remote; a folder of shards
            `<split>-*.tar`; a shard, a brace pattern like "part-{000..099}.tar", or a list of
            them, whose split is not asked for; or several of these by name, whose keys then start
            with "<name>/". Shards without a manifest are read once to find what they hold, which
            the cache remembers.
        split: name of the split in each of them.
        cache: for remote shards; None: the default one.

    Raises:
        DataError: no source, nothing there, no such split, or a damaged shard without a manifest.
    """
    cache = cache or Cache()
    if not isinstance(source, Mapping):
        return Catalog(*_one(_entries(source, split, "", cache)))
    if not source:
        raise DataError("source must name at least one dataset, got {}; add one")
    found = {name: _entries(each, split, f"{name}/", cache) for name, each in source.items()}
    prints = {name: fingerprint for name, (_, fingerprint) in found.items()}
    return Catalog([entries for entries, _ in found.values()], digest_of(prints))


def find_manifest(source: str | Path, cache: Cache | None = None) -> Manifest:
    """The manifest of a dataset directory, local or remote.

    Raises:
        DataError: there is none, or it is malformed.
    """
    root = str(source).removesuffix(MANIFEST_NAME).rstrip("/") or "."
    return _remote_manifest(root, cache or Cache()) if is_remote(root) else read_manifest(root)


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


def _one(found: tuple[list[Entry], str]) -> tuple[list[list[Entry]], str]:
    return [found[0]], found[1]


def _entries(source: Source, split: str, prefix: str, cache: Cache) -> tuple[list[Entry], str]:
    if not isinstance(source, str | Path):
        return _listed([url for each in source for url in _expand(str(each))], prefix, cache)
    text = str(source).removeprefix("file://")
    if "{" in text or text.endswith(".tar") or text.startswith("pipe:"):
        return _listed(list(_expand(text)), prefix, cache)
    root = text.removesuffix(MANIFEST_NAME).rstrip("/") or "."
    if is_remote(text):
        return _described(root, _remote_manifest(root, cache), split, prefix, cache)
    shards = sorted(Path(root).glob(f"{split}-*.tar"))
    if shards and not Path(root, MANIFEST_NAME).exists():
        return _listed([str(path) for path in shards], prefix, cache)
    return _described(root, read_manifest(root), split, prefix, cache)


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


def _remote_manifest(root: str, cache: Cache) -> Manifest:
    url = f"{root}/{MANIFEST_NAME}"
    cache.forget(url)  # it may have changed, and the shards are checked against it
    return parse_manifest(cache.fetch(url).read_bytes(), url)


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
    return entries, digest_of([contents, fields])


def _describe(url: str, cache: Cache) -> tuple[Shard | None, tuple[str, ...]]:
    """What a shard holds, and the known fields of its first record; remembered in the cache."""
    try:
        path = cache.fetch(url) if is_remote(url) else Path(url)
        with path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            memory = (
                cache.directory / f"{digest_of([url, stat.st_size, stat.st_mtime_ns])[:40]}.json"
            )
            if not is_remote(url) and memory.exists():
                known = json.loads(memory.read_bytes())
                return Shard(**known["shard"]), tuple(known["fields"])
            shard, fields = _scan(url, file, stat.st_size)
    except OSError as error:
        raise damaged(url, "be present and readable", f"{error.strerror}") from error
    if shard and not is_remote(url):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(memory) as out:
            out.write(json.dumps({"shard": asdict(shard), "fields": fields}).encode())
    return shard, fields


def _scan(url: str, file: FileIO, size: int) -> tuple[Shard | None, tuple[str, ...]]:
    try:
        records = list_records(file)
    except ValueError as error:
        raise damaged(url, "be a whole tar file", f"{error}") from error
    if not records:
        return None, ()
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = Path(url).name or "shard"
    fields = tuple(sorted(CODECS.keys() & records[0].members.keys()))
    return Shard(name, len(records), size, digest), fields
