"""Samples to WebDataset shards, reproducible byte for byte and without pickle."""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from webdataset import TarWriter

from selectflow.core.files import atomic_file
from selectflow.data.fields import CODECS, PACKED, Sample
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    check_least,
    read_manifest,
    write_manifest,
)

# A dot would end the key, a leading "__" marks a member that webdataset skips, and the tar format
# has room for 100 characters of name and extension.
_KEY = re.compile(r"(?!__)(?=.{1,90}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")


class Stored(NamedTuple):
    """A record as it is stored."""

    key: str
    members: dict[str, bytes]  # by extension
    num_samples: int = 1


def write_split(
    root: str | Path,
    split: str,
    samples: Iterable[Sample],
    per_shard: int,
    *,
    pack: int = 1,
    max_bytes: int | None = None,
) -> list[Shard]:
    """Write one split as shards `{split}-%06d.tar`, each of which appears only once it is whole.

    Equal samples give equal bytes: owner, mode and time of every member are fixed.

    Args:
        root: Dataset directory, made if missing.
        split: Name of the split: letters, digits, "_" and "-".
        samples: Each `{"__key__": str}` and the same fields: "npy" (array), "cls" (int), "json"
            (what JSON can hold), "txt" (str), "png" (uint8 of shape (1 or 3, height, width)),
            "jpg" (the bytes of a file).
        per_shard: Samples that close a shard, >= 1; a record is never divided.
        pack: Samples of a record, >= 1. Above 1 each field of a record is one member, and the
            key of a sample is "<shard>/<record>/<row>".
        max_bytes: Bytes of contents that close a shard, >= 1; None: no limit.

    Returns:
        The shards written, in order.

    Raises:
        DataError: No samples; a key that is empty, has a dot or a stray "/", or is repeated; a
            field that is unknown, not in every sample, not of its type, or cannot be packed.
    """
    if not _SPLIT.fullmatch(split):
        raise DataError(f"split must be letters, digits, _ and -, got {split!r}; rename it")
    for name, value in {"per_shard": per_shard, "pack": pack, "max_bytes": max_bytes}.items():
        if value is not None:
            check_least(name, value, 1, "leave it out for the default")
    return write_records(root, split, _records(_checked(samples, pack), pack), per_shard, max_bytes)


def write_records(
    root: str | Path, split: str, records: Iterable[Stored], per_shard: int, max_bytes: int | None
) -> list[Shard]:
    """Write one split of records that are checked; otherwise as `write_split`."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    for chunk in _chunks(records, per_shard, max_bytes):
        shards.append(_write_shard(root / f"{split}-{len(shards):06d}.tar", chunk))
    if not shards:
        raise DataError(f"samples of split {split!r} must be at least 1, got 0; check the source")
    return shards


def _chunks(
    records: Iterable[Stored], per_shard: int, max_bytes: int | None
) -> Iterator[list[Stored]]:
    chunk: list[Stored] = []
    count = size = 0
    for record in records:
        chunk.append(record)
        count += record.num_samples
        size += sum(map(len, record.members.values()))
        if count >= per_shard or (max_bytes and size >= max_bytes):
            yield chunk
            chunk, count, size = [], 0, 0
    if chunk:
        yield chunk


def _checked(samples: Iterable[Sample], pack: int) -> Iterator[Sample]:
    known = CODECS.keys() if pack == 1 else PACKED.keys()
    seen: set[str] = set()
    fields: set[str] | None = None
    for sample in samples:
        key = sample.get("__key__")
        # a packed record has a key of its own
        if not isinstance(key, str) or not (pack > 1 or _KEY.fullmatch(key)):
            raise DataError(
                "__key__ must be 1 to 90 letters, digits, _ and -, in parts joined by single /, "
                f"not starting with __, got {key!r}; rename the sample"
            )
        if key in seen:
            raise DataError(f"__key__ must be unique in its split, got {key!r} twice; rename one")
        seen.add(key)
        given = sample.keys() - {"__key__"}
        fields = fields or given
        if not given or given != fields or not fields <= known:
            packed = " that can be packed" if pack > 1 else ""
            raise DataError(
                f"fields must be the same for all samples and out of {sorted(known)}{packed}, "
                f"got {sorted(given)} for key {key!r}; add the missing or rename the unknown"
            )
        yield sample


def _records(samples: Iterator[Sample], pack: int) -> Iterator[Stored]:
    for index, chunk in enumerate(iter(lambda: list(islice(samples, pack)), [])):
        first, last = chunk[0]["__key__"], chunk[-1]["__key__"]
        fields = sorted(chunk[0].keys() - {"__key__"})
        if pack == 1:
            members = {f: _encode(first, f, CODECS[f][0], chunk[0][f]) for f in fields}
            yield Stored(first, members, 1)
            continue
        keys = first if len(chunk) == 1 else f"{first} to {last}"
        members = {
            PACKED[f].extension: _encode(keys, f, PACKED[f].encode, [s[f] for s in chunk])
            for f in fields
        }
        yield Stored(f"{index:06d}", members, len(chunk))


def _encode(key: str, field: str, encode: Callable[[Any], bytes], value: Any) -> bytes:
    try:
        return encode(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"field {field!r} of key {key!r} must be storable without pickle, "
            f"got {type(value).__name__} ({error}); convert it first"
        ) from error


def _write_shard(path: Path, records: list[Stored]) -> Shard:
    tar = io.BytesIO()
    # mtime as an int: a float takes an extended header, two blocks for every member
    plain = {"encoder": False, "user": "", "group": "", "mtime": 0}
    with TarWriter(tar, keep_meta=True, **plain) as writer:
        for record in records:
            writer.write({"__key__": record.key} | record.members)
    data = tar.getvalue()
    with atomic_file(path) as file:
        file.write(data)
    count = sum(record.num_samples for record in records)
    return Shard(path.name, count, len(data), hashlib.sha256(data).hexdigest())


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
        """The values that differ from their defaults, and always `per_shard`."""
        changed = {n: value for n, value in asdict(self).items() if value != getattr(Layout, n)}
        return {"per_shard": self.per_shard} | changed


def build(
    root: str | Path,
    make_splits: Callable[[], Mapping[str, Iterable[Sample]]],
    options: Mapping[str, Any],
    seed: int,
    layout: Layout | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the splits and then the manifest, or reuse the dataset that was written before.

    Args:
        root: Dataset directory, made if missing.
        make_splits: The samples of each split; not called if the dataset is reused.
        options: What the samples are made from, the builder's own name under "name".
        seed: Seed of the builder.
        layout: How to lay them out.
        tokenizer: What the manifest says of the tokenizer; read after the splits are written.

    Raises:
        DataError: The directory holds another dataset, or the samples cannot be written.
    """
    layout = layout or Layout()
    options = {**options, **layout.options()}
    if manifest := find_built(root, options, seed):
        return manifest
    shards, fields = {}, set[str]()
    for split, samples in make_splits().items():
        noted = _note_fields(samples, fields)
        shards[split] = tuple(write_split(root, split, noted, **asdict(layout)))
    manifest = Manifest(
        shards, tuple(sorted(fields)), options, seed, layout.pack, dict(tokenizer or {})
    )
    write_manifest(root, manifest)  # last: its presence says that the dataset is whole
    return manifest


def find_built(root: str | Path, options: Mapping[str, Any], seed: int) -> Manifest | None:
    """The manifest of a dataset that was written with these options; None: there is none.

    Raises:
        DataError: the directory holds another dataset.
    """
    if not Path(root, MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(root)
    held, wanted = manifest.options | {"seed": manifest.seed}, {**options, "seed": seed}
    for option in wanted | held:  # the builder's name first
        if held.get(option) != wanted.get(option):
            raise DataError(
                f"{option} must be {held.get(option)!r} as in the dataset at {str(root)!r}, "
                f"got {wanted.get(option)!r}; choose another root, or delete that directory"
            )
    return manifest


def _note_fields(samples: Iterable[Sample], fields: set[str]) -> Iterator[Sample]:
    """The samples; `fields` gets the names of their fields as they pass."""
    for sample in samples:
        fields |= sample.keys() - {"__key__"}
        yield sample
