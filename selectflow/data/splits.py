"""Whole splits in stored order: for evaluation, for reports, and sample by sample."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from selectflow.data.catalog import Catalog, Ints, Sources
from selectflow.data.collate import FIELDS, Batch, collate, finish
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError
from selectflow.data.reader import ShardReader
from selectflow.data.remote import Cache
from selectflow.data.sources import open_catalog

_CHUNK = 256  # samples decoded at once


def read_split(
    root: Sources, split: str, *, max_errors: float = 0, cache: Cache | None = None
) -> Iterator[Sample]:
    """Read the samples of one split in stored order.

    A shard is checked against the manifest before its first sample is handed out.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        max_errors: Samples that may be unreadable, and are then left out.
        cache: Where remote shards are kept.

    Yields:
        `{"__key__": str}` and the decoded fields: "npy" an array, "cls" an int, "json" a dict.

    Raises:
        DataError: No manifest or no such split; beyond `max_errors`, a shard that is missing,
            truncated or altered, a sample without a field, or with one that cannot be decoded.
            Names shard and key.
    """
    yield from _read(open_catalog(root, split, cache), max_errors=max_errors)


def _read(
    catalog: Catalog, fields: Iterable[str] | None = None, max_errors: float = 0
) -> Iterator[Sample]:
    """All samples in stored order; as `read_split`."""
    return (sample for _, sample in _read_rows(catalog, fields, max_errors))


def _read_rows(
    catalog: Catalog, fields: Iterable[str] | None, max_errors: float
) -> Iterator[tuple[int, Sample]]:
    """All samples in stored order, with their rows."""
    reader, num_errors = ShardReader(catalog, fields), 0
    for start in range(0, catalog.num_samples, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, catalog.num_samples))
        samples, faults = reader.read(rows)
        num_errors += len(faults)
        if num_errors > max_errors:
            raise DataError(faults[0].message)
        yield from zip(np.setdiff1d(rows, [f.row for f in faults]).tolist(), samples, strict=True)


def read_batches(
    root: Sources, split: str, batch_size: int, *, cache: Cache | None = None
) -> list[Batch]:
    """A split in stored order, such as the target or the test set.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        batch_size: Examples in each batch but the last, >= 1.
        cache: Where remote shards are kept.

    Returns:
        Batches in the format of `PoolStream`.

    Raises:
        DataError: batch_size is below 1, or the split cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be >= 1, got {batch_size}; 256 suits small samples")
    samples = _read(open_catalog(root, split, cache), FIELDS)
    batches = []
    while batch := list(islice(samples, batch_size)):
        batches.append(finish(collate(batch)))
    return batches


def read_metadata(
    root: Sources, split: str, *, max_errors: float = 0, cache: Cache | None = None
) -> dict[str, dict[str, Any]]:
    """What the writer recorded about each sample; for reports, never for selection.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        max_errors: Samples that may be unreadable, and are then left out.
        cache: Where remote shards are kept.

    Returns:
        Sample key -> its json. Where no shard has any, nothing is read and nothing returned.

    Raises:
        DataError: The split cannot be read.
    """
    catalog = open_catalog(root, split, cache)
    if not any("json" in entry.fields for entry in catalog.entries):
        return {}
    samples = _read(catalog, ("json",), max_errors)
    return {sample["__key__"]: sample.get("json", {}) for sample in samples}


def read_labels(
    root: Sources, split: str, *, max_errors: float = 0, cache: Cache | None = None
) -> Ints:
    """The label of each sample of a split, in stored order, shape (N,), int64.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        max_errors: Samples that may be unreadable, and are then left out.
        cache: Where remote shards are kept.

    Raises:
        DataError: The split cannot be read, or its samples have no labels.
    """
    labels = []
    for sample in _read(open_catalog(root, split, cache), ("cls",), max_errors):
        if "cls" not in sample:
            raise DataError(
                f"samples of split {split!r} must have a label, got key {sample['__key__']!r} "
                "without the field 'cls'; add it"
            )
        labels.append(sample["cls"])
    return np.array(labels, dtype=np.int64)


def read_samples(
    root: Sources, split: str, keys: Iterable[str], *, cache: Cache | None = None
) -> dict[str, Sample]:
    """Some samples of a split; the contents of the others are not read.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        keys: Of the samples.
        cache: Where remote shards are kept.

    Returns:
        Key -> sample, as `read_split` yields it, without those that the split does not hold, or
        that cannot be read.

    Raises:
        DataError: No manifest or no such split.
    """
    catalog, missing = open_catalog(root, split, cache), set(keys)
    rows = []
    for row, sample in _read_rows(catalog, (), math.inf):
        if not missing:
            break
        if sample["__key__"] in missing:
            missing.discard(sample["__key__"])
            rows.append(row)
    samples, _ = ShardReader(catalog).read(np.array(rows, dtype=np.int64))
    return {sample["__key__"]: sample for sample in samples}
