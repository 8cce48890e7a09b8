"""Chosen samples of a dataset as a dataset of their own, copied byte for byte."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selectflow.data.fields import CODECS, FIELDS, Sample
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    read_manifest,
    write_manifest,
)
from selectflow.data.reader import ShardReader
from selectflow.data.sources import Catalog, Sources, open_catalog
from selectflow.data.splits import read_chunks, read_split
from selectflow.data.tar_index import split_name
from selectflow.data.tokenizers import copy_tokenizer
from selectflow.data.write import Layout, Stored, build, find_built, write_records


def write_subset(
    root: str | Path,
    source: Sources,
    split: str,
    keys: Iterable[str],
    made_from: Mapping[str, Any],
    *,
    seed: int = 0,
    copied: Iterable[str] = (),
    layout: Layout | None = None,
) -> Manifest:
    """Write the samples of one split that have certain keys, or reuse those written before.

    Samples keep their keys, stored order and the bytes of all their members, also of those that
    are not read here. Only packed records, here or there, are decoded and encoded again. The
    options in the manifest say what they were made from: `source`, the fingerprint of the dataset,
    `split`, the other splits that were `copied`, if any, and `made_from`.

    Args:
        root: Dataset directory, made if missing.
        source: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split, in both.
        keys: Keys of the samples to write, at least one.
        made_from: How they were chosen, as JSON can hold it.
        seed: Seed of that choice.
        copied: Names of splits of the source that are copied whole.
        layout: How to lay them out.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: The source cannot be read or lacks a key; no keys; the directory holds another
            dataset; a field that cannot be packed.
    """
    others = sorted(set(copied))
    catalogs = {name: open_catalog(source, name) for name in [split, *others]}
    fingerprint = catalogs[split].fingerprint
    options = {"name": "subset", "source": fingerprint, "split": split, **made_from}
    if others:
        options["copied"] = others
    tokenizer = {}
    if isinstance(source, str | Path) and Path(source, MANIFEST_NAME).exists():
        manifest = read_manifest(source)
        copy_tokenizer(source, manifest, root)
        tokenizer = manifest.tokenizer
    layout, wanted = layout or Layout(), set(keys)
    entries = [entry for catalog in catalogs.values() for entry in catalog.entries]
    if layout.pack > 1 or any(entry.pack > 1 for entry in entries):
        splits = {split: _decoded(source, split, wanted)}
        splits |= {other: read_split(source, other) for other in others}
        return build(root, lambda: splits, options, seed, layout, tokenizer)
    options |= layout.options()
    if built := find_built(root, options, seed):
        return built
    shards, everywhere, fields = {}, {}, set[str]()
    for name, catalog in catalogs.items():
        held = set[frozenset[str]]()
        records = _note_fields(_stored(catalog, name, wanted if name == split else None), held)
        shards[name] = tuple(write_records(root, name, records, layout.per_shard, layout.max_bytes))
        everywhere[name] = frozenset.intersection(*held)
        fields.update(*held)
    rest = {name: tuple(sorted(fields - all_have)) for name, all_have in everywhere.items()}
    optional = {name: some for name, some in rest.items() if some}
    manifest = Manifest(shards, tuple(sorted(fields)), options, seed, 1, tokenizer, optional)
    write_manifest(root, manifest)  # last: its presence says that the dataset is whole
    return manifest


def _stored(catalog: Catalog, split: str, wanted: set[str] | None) -> Iterator[Stored]:
    """The records of the samples with these keys, or of all; each can be read for training."""
    names, reader = ShardReader(catalog, ()), ShardReader(catalog, FIELDS)
    missing, seen = set(wanted or ()), set[str]()
    for rows, samples, faults in read_chunks(names):
        if faults and wanted is None:
            raise DataError(faults[0].message)
        readable = np.setdiff1d(rows, [fault.row for fault in faults])
        keys = [sample["__key__"] for sample in samples]
        chosen = readable[[wanted is None or key in wanted for key in keys]]
        _, unread = reader.read(chosen)
        if unread and wanted is None:
            raise DataError(unread[0].message)
        for key, members in reader.stored(np.setdiff1d(chosen, [fault.row for fault in unread])):
            missing.discard(key)
            _check_names(key, members, seen)
            yield Stored(key, members)
    _check_found(split, missing)


def _check_names(key: str, extensions: Iterable[str], seen: set[str]) -> None:
    if key in seen:
        raise DataError(f"__key__ must be unique in its split, got {key!r} twice; rename one")
    seen.add(key)
    for extension in extensions:
        if split_name(f"{key}.{extension}") != (key, extension):
            raise DataError(
                f"__key__ must be one that WebDataset reads, got {key!r}; rename the source"
            )


def _note_fields(records: Iterable[Stored], held: set[frozenset[str]]) -> Iterator[Stored]:
    for record in records:
        held.add(frozenset(CODECS.keys() & map(str.lower, record.members)))
        yield record


def _decoded(source: Sources, split: str, keys: set[str]) -> Iterator[Sample]:
    missing = set(keys)
    for sample in read_split(source, split, max_errors=math.inf):
        if sample["__key__"] in keys:
            missing.discard(sample["__key__"])
            yield sample
    _check_found(split, missing)


def _check_found(split: str, missing: set[str]) -> None:
    if missing:
        raise DataError(
            f"keys must be of readable samples of split {split!r}, got {min(missing)!r} and "
            f"{len(missing) - 1} others that are not; pass the dataset that was scored"
        )
