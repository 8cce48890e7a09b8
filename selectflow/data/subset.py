"""A part of a dataset as a dataset of its own."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selectflow.data.build import Layout, build
from selectflow.data.catalog import Sources
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError, Manifest
from selectflow.data.sources import open_catalog
from selectflow.data.splits import read_split
from selectflow.data.tokenizers import copy_tokenizer

_DEFAULT_LAYOUT = Layout()


def write_subset(
    root: str | Path,
    source: Sources,
    split: str,
    keys: Iterable[str],
    made_from: Mapping[str, Any],
    *,
    seed: int = 0,
    copied: Iterable[str] = (),
    layout: Layout = _DEFAULT_LAYOUT,
) -> Manifest:
    """Write the samples of one split that have certain keys, or reuse those that are there.

    Samples keep their fields, metadata and stored order. The options in the manifest say what
    they were made from: `source`, the fingerprint of the dataset, `split`, the other splits that
    were `copied`, if any, and `made_from`.

    Args:
        root: Dataset directory, made if missing.
        source: Dataset directory, or any other source of `PoolStream`.
        split: Name of the split, in both.
        keys: Of the samples to write, at least one.
        made_from: How they were chosen, as JSON can hold it.
        seed: Of that choice.
        copied: Names of splits of the source that are copied whole.
        layout: How to lay them out.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: The source cannot be read or lacks a key; no keys; the directory holds another
            dataset.
    """
    options = {
        "name": "subset",
        "source": open_catalog(source, split).fingerprint,
        "split": split,
        **made_from,
    }
    if others := sorted(set(copied)):
        options["copied"] = others
    splits = {split: _chosen(source, split, set(keys))}
    splits |= {other: read_split(source, other) for other in others}
    tokenizer = copy_tokenizer(source, root)
    return build(root, lambda: splits, options, seed, layout, tokenizer)


def _chosen(source: Sources, split: str, keys: set[str]) -> Iterator[Sample]:
    missing = set(keys)
    for sample in read_split(source, split, max_errors=math.inf):
        if sample["__key__"] in keys:
            missing.discard(sample["__key__"])
            yield sample
    if missing:
        raise DataError(
            f"keys must be of readable samples of split {split!r}, got {min(missing)!r} and "
            f"{len(missing) - 1} others that are not; pass the dataset that was scored"
        )
