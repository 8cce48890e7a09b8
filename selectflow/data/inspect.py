"""A look at what a dataset holds: whether it is whole, and its first samples."""

from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError
from selectflow.data.reader import Fault, ShardReader
from selectflow.data.sources import find_splits, open_catalog
from selectflow.data.splits import read_split

_CHUNK = 256  # samples decoded at once


def verify(root: str | Path) -> list[Fault]:
    """Read and decode every sample of every split.

    Args:
        root: Dataset directory or its URL, or a folder of shards.

    Returns:
        The samples that cannot be read; of a shard that cannot be used, its first alone.

    Raises:
        DataError: Nothing there, or a damaged shard without a manifest.
    """
    faults: dict[str, Fault] = {}
    for split in find_splits(root):
        catalog = open_catalog(root, split)
        reader = ShardReader(catalog)
        for start in range(0, catalog.num_samples, _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, catalog.num_samples))
            for fault in reader.read(rows)[1]:
                faults.setdefault(fault.message, fault)
    return list(faults.values())


def head(root: str | Path, split: str, count: int) -> list[Sample]:
    """The first samples of a split, in stored order.

    Args:
        root: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split.
        count: Samples, >= 1.

    Raises:
        DataError: count is below 1, or the samples cannot be read.
    """
    if count < 1:
        raise DataError(f"count must be >= 1, got {count}; ask for a few")
    return list(islice(read_split(root, split), count))


def contact_sheet(samples: list[Sample], path: str | Path, *, side: int = 96) -> None:
    """Save the images of samples as one PNG, a square grid in reading order.

    Args:
        samples: With a field "npy" or "png" or "jpg" of shape (1 or 3, height, width): bytes, or
            floats in [0, 1].
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
    pixels = next((sample[field] for field in ("png", "jpg", "npy") if field in sample), None)
    if pixels is None or pixels.ndim != 3 or len(pixels) not in (1, 3):
        got = "none" if pixels is None else f"an array of shape {pixels.shape}"
        raise DataError(
            f"sample {sample['__key__']!r} must have an image of 1 or 3 channels, got {got}; "
            "look at it without a contact sheet"
        )
    if pixels.dtype != np.uint8:
        pixels = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return image.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
