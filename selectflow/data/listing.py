"""What a dataset holds, in lines of text."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from selectflow.data.grouping import Grouping
from selectflow.data.manifest import DataError
from selectflow.data.sources import find_manifest, find_splits, open_catalog


def list_splits(root: str | Path) -> Iterator[str]:
    """Splits of a dataset, their sizes, and how they were made.

    Raises:
        DataError: there is no such dataset.
    """
    yield f"{'split':12} {'shards':>8} {'samples':>10} {'MiB':>10}"
    for split in find_splits(root):
        held = open_catalog(root, split)
        size = held.num_bytes / 2**20
        yield f"{split:12} {len(held.entries):8} {held.num_samples:10} {size:10.2f}"
    first = held.entries[0]
    yield f"fields: {', '.join(first.schema.names)}; samples of a record: {first.pack}"
    try:
        manifest = find_manifest(root)
    except DataError:
        yield "made from: not known, without a manifest"
        return
    options = (f"{name}={value}" for name, value in manifest.options.items())
    yield f"made from: {' '.join(options)} seed={manifest.seed}"


def list_sources(source: str | Mapping[str, str], split: str, by: str | None) -> Iterator[str]:
    """Samples and share of each source, as `data.sources` or `data.by` make them of a split.

    Raises:
        DataError: a dataset is not there, or `by` is not to be read in it.
    """
    catalog = open_catalog(source, split)
    grouping = Grouping(catalog, by)
    width = max(len("source"), *map(len, grouping.names))
    yield f"{'source':{width}} {'shards':>8} {'samples':>10} {'share':>8}"
    for name, part in zip(grouping.names, grouping.parts, strict=True):
        share = part.size / catalog.num_samples
        yield f"{name:{width}} {len(part.counts):8} {part.size:10} {share:8.2%}"
