"""The manifest of a dataset directory: which shards it holds, and the options it was made with."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selectflow.core.files import atomic_file

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MANIFEST_VERSION = 1

_SHARD = re.compile(r"(?P<split>[^.].*?)-\d+(-of-\d+)?\.tar")
_ARCHIVE = re.compile(r"(?P<split>[^.].*?)(-[^-]*)?\.(tar|tar\.gz|tgz)", re.IGNORECASE)


class DataError(ValueError):
    """A dataset that cannot be written or read as asked; the message says where and the fix."""


def damaged(shard: str, rule: str, got: str) -> DataError:
    """The error for a shard that breaks a rule."""
    fix = "restore the file, or write the dataset again"
    return DataError(f"shard {shard} must {rule}, got {got}; {fix}")


def split_of(name: str) -> str | None:
    """The split that a shard belongs to by its file name, `<split>-<digits>.tar`; None: to none.

    After the digits there may be "-of-" and digits, as many tools write.
    """
    match = _SHARD.fullmatch(name)
    return match["split"] if match else None


def find_shards(root: str | Path) -> dict[str, list[Path]]:
    """The shards of each split in a local folder, both in the order of their names.

    Raises:
        DataError: a tar file is named almost like a shard of those splits.
    """
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(Path(root).glob("*")):
        if split := split_of(path.name):
            found.setdefault(split, []).append(path)
        elif match := _ARCHIVE.fullmatch(path.name):
            others.append((match["split"], path.name))
    if doubtful := next((name for split, name in others if split in found or not found), None):
        raise DataError(
            f"shards in {str(root)!r} must be named <split>-<digits>.tar, got {doubtful!r}; "
            "rename or unpack it, move it away, or list the shards by a pattern"
        )
    return {split: found[split] for split in sorted(found)}


def check_least(name: str, value: float, least: int, hint: str) -> None:
    """Refuse an argument below its least value, or NaN, by a DataError that names it."""
    if not value >= least:
        raise DataError(f"{name} must be >= {least}, got {value}; {hint}")


def check_seed(seed: int) -> None:
    """Refuse a seed below 0 by a DataError."""
    check_least("seed", seed, 0, "numpy takes no negative seeds")


@dataclass(frozen=True)
class Shard:
    """One tar file of a split.

    Args:
        name: File name inside the dataset directory.
        count: Number of samples, >= 1.
        bytes: Size of the file.
        sha256: Hex digest of the file.
    """

    name: str
    count: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        for name, kind in {"name": str, "count": int, "bytes": int, "sha256": str}.items():
            if not isinstance(getattr(self, name), kind):
                raise DataError(f"{name} must be of type {kind.__name__} in {self}")
        if self.count < 1 or Path(self.name).name != self.name:
            raise DataError(f"count must be >= 1 and name a plain file name in {self}")


@dataclass(frozen=True)
class Manifest:
    """What a dataset directory holds.

    Args:
        splits: Shards of each split, in stored order.
        fields: Extensions of the samples, such as "npy" and "cls".
        optional: By split, those that not all of its samples have.
        options: The builder's options, its own name under "name".
        seed: Seed of the builder.
        pack: Samples in each record of a shard but the last, >= 1; above 1 a sample's key is
            "<shard>/<record>/<row>".
        tokenizer: Of a dataset of tokens: "name", "num_tokens" (ids are below it), "end" (id that
            ends a document), and "sha256" of the file beside the shards; else empty.
        version: Version of this format.
    """

    splits: dict[str, tuple[Shard, ...]]
    fields: tuple[str, ...]
    options: dict[str, Any]
    seed: int
    pack: int = 1
    tokenizer: dict[str, Any] = field(default_factory=dict)
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.pack, int) or self.pack < 1:
            raise DataError(f"pack must be an integer >= 1, got {self.pack!r}")

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Shards of one split.

        Raises:
            DataError: The split is not in the manifest.
        """
        if not self.splits.get(split):
            held = sorted(name for name, shards in self.splits.items() if shards)
            raise DataError(f"split must be one of {held}, got {split!r}; rename it")
        return self.splits[split]

    def num_samples(self, split: str) -> int:
        """Number of samples of one split; the errors of `shards`."""
        return sum(shard.count for shard in self.shards(split))

    @property
    def sizes(self) -> str:
        """Samples of each split, for people."""
        return ", ".join(f"{split} {self.num_samples(split)}" for split in self.splits)

    def fingerprint(self) -> str:
        """Hex digest of the manifest: equal if and only if samples, order and options are equal."""
        return hashlib.sha256(_to_json(self).encode()).hexdigest()


def write_manifest(root: str | Path, manifest: Manifest) -> None:
    """Write the manifest of a directory; a reader sees the whole of it or the one before."""
    with atomic_file(Path(root) / MANIFEST_NAME) as file:
        file.write(_to_json(manifest).encode())


def read_manifest(root: str | Path) -> Manifest:
    """The manifest of a local dataset directory.

    Raises:
        DataError: The directory or its manifest is missing, malformed or of another version.
    """
    path = Path(root) / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"root must be a dataset directory with a {MANIFEST_NAME}, got {str(root)!r}; "
            "write the dataset there first, or correct the path"
        ) from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in the contents of the file `where`; the errors of `read_manifest`."""
    try:
        raw = json.loads(text)
        if raw["version"] != MANIFEST_VERSION:
            raise DataError(f"version {raw['version']}")
        return Manifest(
            splits={
                split: tuple(Shard(**shard) for shard in shards)
                for split, shards in raw["splits"].items()
            },
            fields=tuple(raw["fields"]),
            options=dict(raw["options"]),
            seed=int(raw["seed"]),
            pack=raw.get("pack", 1),
            tokenizer=dict(raw.get("tokenizer", {})),
            optional={name: tuple(some) for name, some in raw.get("optional", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} must be a manifest of version {MANIFEST_VERSION}, "
            f"got {type(error).__name__}: {error}; delete the directory and write the dataset again"
        ) from error


def _to_json(manifest: Manifest) -> str:
    values = asdict(manifest)
    for name in ("tokenizer", "optional"):
        if not values[name]:
            del values[name]  # of datasets without, as it has always been
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
