"""Samples to WebDataset tar shards and back, reproducible byte for byte and without pickle."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from selectflow.data.manifest import DataError, Shard, atomic_file, read_manifest

Sample = dict[str, Any]

# A dot would end the key, a leading "__" marks a member that webdataset skips, and the tar format
# has room for 100 characters of name and extension.
_KEY = re.compile(r"(?!__)(?=.{1,90}\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")


def _encode_npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
    return file.getvalue()


def _decode_npy(data: bytes) -> Any:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _encode_cls(value: Any) -> bytes:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError("not an integer")
    return str(int(value)).encode()


def _encode_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


# extension -> (value to bytes, bytes to value); a new kind of field is one line here
_CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "npy": (_encode_npy, _decode_npy),
    "cls": (_encode_cls, int),
    "json": (_encode_json, json.loads),
}


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


def read_split(root: str | Path, split: str) -> Iterator[Sample]:
    """Read the samples of one split in stored order.

    A shard is checked against the manifest before its first sample is handed out.

    Args:
        root: Dataset directory.
        split: Name of the split.

    Yields:
        `{"__key__": str}` and the decoded fields: "npy" an array, "cls" an int, "json" a dict.

    Raises:
        DataError: No manifest or no such split; a shard that is missing, truncated or altered; a
            sample without a field, or with one that cannot be decoded. Names shard and key.
    """
    manifest = read_manifest(root)
    for shard in manifest.shards(split):
        for sample in _read_shard(Path(root), shard, manifest.fields):
            yield _decode(sample, shard.name, manifest.fields)


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
        if not values or values.keys() != fields or not fields <= _CODECS.keys():
            raise DataError(
                f"fields must be the same for all samples and out of {sorted(_CODECS)}, "
                f"got {sorted(values)} for key {key!r}; add the missing or rename the unknown"
            )
        yield {"__key__": key} | {f: _encode_field(key, f, v) for f, v in values.items()}


def _encode_field(key: str, field: str, value: Any) -> bytes:
    try:
        return _CODECS[field][0](value)
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


def _read_shard(root: Path, shard: Shard, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        data = (root / shard.name).read_bytes()
    except FileNotFoundError:
        raise _damaged(shard.name, "be present", "no such file") from None
    # The stages of webdataset that take an open file: its own opener also runs `pipe:` commands.
    members = tar_file_expander([{"url": shard.name, "stream": io.BytesIO(data)}])
    try:
        samples = list(group_by_keys(members))
    except Exception as error:  # damaged bytes: tarfile documents no closed list of errors
        got = f"{len(data)} bytes and {type(error).__name__}: {error.args[0]}"
        raise _damaged(shard.name, f"be a tar file of {shard.bytes} bytes", got) from error
    # From the most telling to the most general, since one cut can violate all three.
    for sample in samples:
        if missing := [field for field in fields if field not in sample]:
            rule = f"hold the fields {list(fields)} of key {sample['__key__']!r}"
            raise _damaged(shard.name, rule, f"none of {missing}")
    if len(samples) != shard.count:
        raise _damaged(shard.name, f"hold {shard.count} samples", f"{len(samples)}")
    if (digest := hashlib.sha256(data).hexdigest()) != shard.sha256:
        rule = f"have {shard.bytes} bytes and sha256 {shard.sha256}"
        raise _damaged(shard.name, rule, f"{len(data)} bytes and {digest}")
    return samples


def _decode(sample: dict[str, Any], shard: str, fields: tuple[str, ...]) -> Sample:
    key = sample["__key__"]
    decoded: Sample = {"__key__": key}
    for field in fields:
        try:
            decoded[field] = _CODECS[field][1](sample[field])
        except (ValueError, EOFError, KeyError) as error:
            rule = f"hold a field {field!r} of key {key!r} that can be decoded"
            raise _damaged(shard, rule, f"{type(error).__name__}: {error}") from error
    return decoded


def _damaged(shard: str, rule: str, got: str) -> DataError:
    return DataError(
        f"shard {shard} must {rule}, got {got}; "
        "restore the file, or delete the directory and write the dataset again"
    )
