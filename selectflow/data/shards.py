"""Samples to WebDataset tar shards, reproducible byte for byte and without pickle."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from selectflow.data.fields import CODECS, Sample
from selectflow.data.manifest import DataError, Shard, atomic_file

# A dot would end the key, a leading "__" marks a member that webdataset skips, and the tar format
# has room for 100 characters of name and extension.
_KEY = re.compile(r"(?!__)(?=.{1,90}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")


def write_split(
    root: str | Path, split: str, samples: Iterable[Sample], per_shard: int
) -> list[Shard]:
    """Write one split as shards `{split}-%06d.tar`, each of which appears only once it is whole.

    Equal samples give equal bytes: owner, mode and time of every member are fixed.

    Args:
        root: Dataset directory, made if missing.
        split: Name of the split: letters, digits, "_" and "-".
        samples: Each `{"__key__": str}` and the same fields, out of "npy" (array), "cls" (int)
            and "json" (what JSON can hold).
        per_shard: Samples in each shard but the last, >= 1.

    Returns:
        The shards written, in order.

    Raises:
        DataError: No samples; a key that is empty, has a dot or a stray "/", or came before; a
            field that is unknown, not in every sample, or not of its type.
    """
    if not _SPLIT.fullmatch(split):
        raise DataError(f"split must be letters, digits, _ and -, got {split!r}; rename it")
    if per_shard < 1:
        raise DataError(f"per_shard must be >= 1, got {per_shard}; 256 suits small samples")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    encoded = _encode(samples)
    shards: list[Shard] = []
    while chunk := list(islice(encoded, per_shard)):
        shards.append(_write_shard(root / f"{split}-{len(shards):06d}.tar", chunk))
    if not shards:
        raise DataError(f"samples of split {split!r} must be at least 1, got 0; check the source")
    return shards


def _encode(samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    fields: set[str] | None = None
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise DataError(
                "__key__ must be 1 to 90 letters, digits, _ and -, in parts joined by single /, "
                f"not starting with __, got {key!r}; rename the sample"
            )
        if key in seen:
            raise DataError(f"__key__ must be unique in its split, got {key!r} twice; rename one")
        seen.add(key)
        values = {field: value for field, value in sample.items() if field != "__key__"}
        fields = fields or set(values)
        if not values or values.keys() != fields or not fields <= CODECS.keys():
            raise DataError(
                f"fields must be the same for all samples and out of {sorted(CODECS)}, "
                f"got {sorted(values)} for key {key!r}; add the missing or rename the unknown"
            )
        yield {"__key__": key} | {f: _encode_field(key, f, v) for f, v in values.items()}


def _encode_field(key: str, field: str, value: Any) -> bytes:
    try:
        return CODECS[field][0](value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"field {field!r} of key {key!r} must be storable without pickle, "
            f"got {type(value).__name__} ({error}); convert it first"
        ) from error


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> Shard:
    tar = io.BytesIO()
    with TarWriter(tar, encoder=False, user="", group="", mtime=0.0) as writer:
        for sample in samples:
            writer.write(sample)
    data = tar.getvalue()
    with atomic_file(path) as file:
        file.write(data)
    return Shard(path.name, len(samples), len(data), hashlib.sha256(data).hexdigest())
