"""Datasets built once: written whole, then reused by whoever asks for the same options."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectflow.data.fields import Sample
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    read_manifest,
    write_manifest,
)
from selectflow.data.shards import write_split


@dataclass(frozen=True)
class Layout:
    """How samples are laid out in shards.

    Attributes:
        per_shard: samples that close a shard, >= 1.
        pack: samples of a record, >= 1.
        max_bytes: bytes of contents that close a shard; None: no limit.
    """

    per_shard: int = 256
    pack: int = 1
    max_bytes: int | None = None

    def options(self) -> dict[str, Any]:
        """Those that are not the default, and always `per_shard`."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name == "per_shard" or value != getattr(Layout, name)
        }


def build(
    root: str | Path,
    make_splits: Callable[[], Mapping[str, Iterable[Sample]]],
    options: Mapping[str, Any],
    seed: int,
    layout: Layout,
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the splits and then the manifest, or reuse what is there.

    Args:
        root: Dataset directory, made if missing.
        make_splits: The samples of each split; not called where the dataset is there already.
        options: What the samples are made from, the builder's own name under "name".
        seed: Seed of the builder.
        layout: How to lay them out.
        tokenizer: What the manifest says of the tokenizer; read once the splits are made.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: The directory holds another dataset, or the samples cannot be written.
    """
    options = {**options, **layout.options()}
    if Path(root, MANIFEST_NAME).exists():
        return _reuse(root, options | {"seed": seed})
    shards, fields = {}, set()
    for split, samples in make_splits().items():
        written = _Fields(samples)
        shards[split] = tuple(
            write_split(
                root, split, written, layout.per_shard, pack=layout.pack, max_bytes=layout.max_bytes
            )
        )
        fields |= written.names
    manifest = Manifest(
        shards, tuple(sorted(fields)), options, seed, layout.pack, dict(tokenizer or {})
    )
    write_manifest(root, manifest)  # last: its presence says that the dataset is whole
    return manifest


class _Fields:
    """Samples, and the names of the fields that went by."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples, self.names = samples, set[str]()

    def __iter__(self) -> Any:
        for sample in self._samples:
            self.names |= sample.keys() - {"__key__"}
            yield sample


def _reuse(root: str | Path, wanted: dict[str, Any]) -> Manifest:
    manifest = read_manifest(root)
    held = manifest.options | {"seed": manifest.seed}
    for option in wanted | held:  # the builder's name first
        if held.get(option) != wanted.get(option):
            raise DataError(
                f"{option} must be {held.get(option)!r} as in the dataset at {str(root)!r}, "
                f"got {wanted.get(option)!r}; choose another root, or delete that directory"
            )
    return manifest
