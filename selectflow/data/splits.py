"""Whole splits in stored order: for evaluation, for reports, and to look at."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selectflow.data.cache import Cache
from selectflow.data.fields import FIELDS, PICTURES, Batch, Ints, Sample, collate, finish
from selectflow.data.form import Rules
from selectflow.data.manifest import DataError, check_least
from selectflow.data.pixels import image_of
from selectflow.data.reader import Fault, ShardReader
from selectflow.data.sources import Sources, find_splits, open_catalog

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
    yield from _read(ShardReader(open_catalog(root, split, cache)), max_errors)


def _read(reader: ShardReader, max_errors: float = 0) -> Iterator[Sample]:
    num_errors = 0
    for _, samples, faults in read_chunks(reader):
        num_errors += len(faults)
        if num_errors > max_errors:
            raise DataError(faults[0].message)
        yield from samples


def read_chunks(reader: ShardReader) -> Iterator[tuple[Ints, list[Sample], list[Fault]]]:
    """Rows in stored order, some at a time: with their samples, and faults for unreadable ones."""
    for start in range(0, reader.num_samples, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, reader.num_samples))
        yield rows, *reader.read(rows)


def read_batches(
    root: Sources,
    split: str,
    batch_size: int,
    *,
    num_classes: int | None = None,
    cache: Cache | None = None,
) -> list[Batch]:
    """A split in stored order, such as the target or the test set.

    The other arguments and the errors are those of `read_split`.

    Args:
        batch_size: Examples in each batch but the last, >= 1.
        num_classes: Labels are below it; None: any from 0.

    Returns:
        Batches in the format of `PoolStream`, on the CPU.

    Raises:
        DataError: Besides, a label out of range, or an array of another shape or type than most.
    """
    check_least("batch_size", batch_size, 1, "256 suits small samples")
    catalog = open_catalog(root, split, cache)
    samples = _read(ShardReader(catalog, FIELDS, rules=Rules(num_classes)))
    batches = []
    while batch := list(islice(samples, batch_size)):
        batches.append(finish(collate(batch)))
    return batches


def read_metadata(
    root: Sources, split: str, *, max_errors: float = 0, cache: Cache | None = None
) -> dict[str, dict[str, Any]]:
    """What the writer recorded about each sample; for reports, never for selection.

    Arguments and errors are those of `read_split`.

    Returns:
        Sample key -> its json, of those that have one; empty, and nothing is read, if no shard has
        the field.

    Raises:
        DataError: As `read_split`, or a json that is no object.
    """
    catalog = open_catalog(root, split, cache)
    if not any("json" in entry.schema.names for entry in catalog.entries):
        return {}
    reader = ShardReader(catalog, ("json",), rules=Rules())
    samples = _read(reader, max_errors)
    return {sample["__key__"]: sample["json"] for sample in samples if "json" in sample}


def check_fields(
    root: Sources, split: str, wanted: Iterable[str], *, cache: Cache | None = None
) -> None:
    """Refuse a split whose batches would lack something, without reading a sample.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        wanted: Of "image", "label", "tokens" and "text".
        cache: Where remote shards are kept.

    Raises:
        DataError: It lacks one; names the shard.
    """
    stored = {
        "image": f"an image ({', '.join(PICTURES)}, or npy with cls)",
        "label": "a label (cls)",
    }
    for entry in open_catalog(root, split, cache).entries:
        if missing := [name for name in wanted if name not in entry.schema.batch_names]:
            needs = " and ".join(stored.get(name, name) for name in missing)
            raise DataError(
                f"samples of split {split!r} must have {needs}, got the fields "
                f"{list(entry.schema.names)} in shard {entry.name}; add what is missing"
            )


def read_labels(
    root: Sources, split: str, *, max_errors: float = 0, cache: Cache | None = None
) -> Ints:
    """The label of each sample of a split, in stored order, shape (N,), int64.

    Arguments and errors are those of `read_split`; a sample without a label is an error, too, and a
    label below 0.
    """
    labels = []
    reader = ShardReader(open_catalog(root, split, cache), ("cls",), rules=Rules())
    for sample in _read(reader, max_errors):
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
    """The samples with these keys; of the others only the headers are read.

    The other arguments are those of `read_split`.

    Returns:
        Key -> sample, as `read_split` yields it; without those that are not in the split or cannot
        be read.

    Raises:
        DataError: No manifest or no such split.
    """
    catalog, missing = open_catalog(root, split, cache), set(keys)
    found: list[int] = []
    for rows, samples, faults in read_chunks(ShardReader(catalog, ())):
        readable = np.setdiff1d(rows, [fault.row for fault in faults]).tolist()
        for row, sample in zip(readable, samples, strict=True):
            if sample["__key__"] in missing:
                missing.discard(sample["__key__"])
                found.append(row)
        if not missing:
            break
    samples, _ = ShardReader(catalog).read(np.array(found, dtype=np.int64))
    return {sample["__key__"]: sample for sample in samples}


def verify(root: str | Path) -> list[Fault]:
    """Read and decode every sample of every split, by the rules of training.

    Labels are at least 0, and the arrays of a split of one shape and type.

    Args:
        root: Dataset directory or its URL, or a folder of shards.

    Returns:
        The samples that cannot be read, or trained on with the others; the first alone of a shard
        that is damaged as a whole.

    Raises:
        DataError: Nothing there, or a damaged shard without a manifest.
    """
    faults: dict[str, Fault] = {}
    for split in find_splits(root):
        reader = ShardReader(open_catalog(root, split), rules=Rules())
        for _, _, found in read_chunks(reader):
            for fault in found:
                faults.setdefault(fault.message, fault)
    return list(faults.values())


def head(root: str | Path, split: str, count: int) -> list[Sample]:
    """The first samples of a split, in stored order.

    Args:
        count: Samples, >= 1.

    Raises:
        DataError: count is below 1, or the samples cannot be read.
    """
    check_least("count", count, 1, "ask for a few")
    return list(islice(read_split(root, split), count))


def contact_sheet(samples: list[Sample], path: str | Path, *, side: int = 96) -> None:
    """Save the images of samples as one PNG, a square grid in reading order.

    Args:
        samples: With a field "npy", "png", "jpg" or "jpeg" of shape (1 or 3, height, width):
            bytes, floats in [0, 1], or other integers, which are shown relative to their maximum.
        path: Where to write.
        side: Height and width of each image in pixels, enlarged or reduced to it.

    Raises:
        DataError: A sample without an image.
    """
    columns = int(np.ceil(np.sqrt(len(samples))))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for place, sample in enumerate(samples):
        row, column = divmod(place, columns)
        sheet.paste(picture(sample, side - 4), (column * side + 2, row * side + 2))
    sheet.save(path, "PNG")


def picture(sample: Sample, side: int) -> Image.Image:
    """The image of a sample, as in `contact_sheet`.

    Raises:
        DataError: It has none.
    """
    pixels = next((sample[field] for field in (*PICTURES, "npy") if field in sample), None)
    if pixels is None or pixels.ndim != 3 or len(pixels) not in (1, 3):
        got = "none" if pixels is None else f"an array of shape {pixels.shape}"
        raise DataError(
            f"sample {sample['__key__']!r} must have an image of 1 or 3 channels, got {got}; "
            "look at it without a contact sheet"
        )
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind != "f":  # in a range of their own, such as 16 bits
            pixels = pixels / max(1, int(pixels.max()))
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    return image_of(pixels).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
