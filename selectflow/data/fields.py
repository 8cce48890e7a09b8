"""The fields of a sample: to the bytes of a tar member, back without pickle, and into batches."""

import io
import json
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from selectflow.data.manifest import DataError
from selectflow.data.pixels import image_of, pixels_of, read_image

Ints = npt.NDArray[np.int64]

Sample = dict[str, Any]
"""`{"__key__": str}` and the values of the fields, by extension."""

Batch = dict[str, Any]
"""Samples stacked: arrays or tensors, and lists of strings, by name; see `collate`."""

PICTURES = ("png", "jpg", "jpeg")
"""The extensions of encoded images."""

_ARRAYS = ("npy", *PICTURES)
FIELDS = (*_ARRAYS, "cls", "txt")
"""The extensions that a batch is made of; the others are for reports."""

_PIPED = 1 << 20  # bytes up to which an array goes to another process through a pipe


def _encode_npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), allow_pickle=False)
    return file.getvalue()


def _decode_npy(data: bytes) -> Any:
    if data[:8] != b"\x93NUMPY\x01\x00":  # later versions are for headers above 64 KiB
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape, order = _npy_header(data[:start])
    # a copy, since a tensor must be writable
    flat = np.frombuffer(data, dtype, offset=start).copy()
    return flat.reshape(shape, order=order)


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Any]:
    # the samples of a dataset share their header, whose parsing costs more than the array
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only pickle can hold")
    return dtype, shape, "F" if is_fortran else "C"


def _encode_cls(value: Any) -> bytes:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError("not an integer")
    return str(int(value)).encode()


def _decode_cls(data: bytes) -> int:
    if b"_" in data:  # which `int` takes
        raise ValueError(f"{data!r} is no integer")
    return int(data)


def _encode_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _encode_png(value: Any) -> bytes:
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise TypeError("not uint8 of shape (1 or 3, height, width)")
    file = io.BytesIO()
    image_of(pixels).save(file, "PNG")
    return file.getvalue()


def _decode_image(data: bytes) -> Any:
    return pixels_of(read_image(data, ("PNG", "JPEG")))


def _encoded(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("not the bytes of an encoded image")
    return value


# extension -> (value to bytes, bytes to value); a new kind of field is one line here
CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "npy": (_encode_npy, _decode_npy),
    "cls": (_encode_cls, _decode_cls),
    "json": (_encode_json, json.loads),
    "png": (_encode_png, _decode_image),
    "jpg": (_encoded, _decode_image),
    "jpeg": (_encoded, _decode_image),
    "txt": (str.encode, bytes.decode),
}


def _encode_stack(values: list[Any]) -> bytes:
    if len({np.asarray(value).shape for value in values}) > 1:
        raise ValueError("arrays of several shapes cannot be packed")
    return _encode_npy(np.stack(values))


def _encode_labels(values: list[Any]) -> bytes:
    for value in values:
        _encode_cls(value)
    return _encode_npy(np.array(values, dtype=np.int64))


def _decode_labels(data: bytes) -> Any:
    return _decode_npy(data).tolist()


class Packed(NamedTuple):
    """How one field of several samples is stored as one member of their record."""

    extension: str
    encode: Callable[[list[Any]], bytes]
    decode: Callable[[bytes], Sequence[Any]]


# by the field of a sample; encoded images gain nothing from packing
PACKED = {
    "npy": Packed("npy", _encode_stack, _decode_npy),
    "cls": Packed("cls.npy", _encode_labels, _decode_labels),
    "json": Packed("json", _encode_json, json.loads),
    "txt": Packed("txt.json", _encode_json, json.loads),
}


def array_field(sample: Sample) -> str | None:
    """The field that is the array of a sample in a batch; None: it has none."""
    for field in _ARRAYS:
        if field in sample:
            return field
    return None


def collate(samples: list[Sample]) -> Batch:
    """Stack samples.

    Args:
        samples: At least one, all of one form and with the same fields; an image may be in any
            format. "npy", "png" or "jpg" with "cls" are an image and its label, "npy" alone is a
            block of tokens, "txt" is text.

    Returns:
        Arrays: "image" (P, ...) in its stored type and "label" int64 (P,), or "tokens" (P, ...);
        "text" and "key" lists of P strings. See `finish`.

    Raises:
        DataError: A sample without an array or text.
    """
    first = samples[0]
    batch: Batch = {}
    if field := array_field(first):
        name = "tokens" if field == "npy" and "cls" not in first else "image"
        try:
            arrays = [sample[field] for sample in samples]
        except KeyError:  # images of several formats
            arrays = [sample[str(array_field(sample))] for sample in samples]
        batch[name] = np.stack(arrays)
    elif "txt" not in first:
        got = sorted(first.keys() - {"__key__"})
        raise DataError(f"fields must include one of {[*_ARRAYS, 'txt']}, got {got}; add one")
    if "cls" in first:
        batch["label"] = np.array([s["cls"] for s in samples], dtype=np.int64)
    if "txt" in first:
        batch["text"] = [sample["txt"] for sample in samples]
    return batch | {"key": [sample["__key__"] for sample in samples]}


def finish(batch: Batch) -> Batch:
    """The batch as a model takes it, its arrays as tensors.

    Images are float32, bytes divided by 255; other integers are int64. On a machine with a GPU
    the tensors are page-locked.
    """
    return {
        name: leaf if isinstance(leaf, list) else _typed(name, leaf) for name, leaf in batch.items()
    }


_has_gpu = cache(torch.cuda.is_available)  # needed for every field of every pool


def _typed(name: str, leaf: Any) -> torch.Tensor:
    # By numpy: torch would use all threads, which wait for each other on a busy machine.
    array = np.asarray(leaf)
    if name == "image" and array.dtype == np.uint8:
        array = np.divide(array, np.float32(255), dtype=np.float32)
    elif name == "image" or array.dtype.kind not in "fc":
        array = array.astype(np.float32 if name == "image" else np.int64, copy=False)
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if _has_gpu() else tensor


def shared(batch: Batch) -> Batch:
    """The batch for another process: large arrays as tensors, which go through shared memory.

    A small array takes half the time through a pipe.
    """
    return {
        name: torch.from_numpy(leaf)
        if isinstance(leaf, np.ndarray) and leaf.nbytes > _PIPED
        else leaf
        for name, leaf in batch.items()
    }


def pick(batch: Batch, indices: Ints) -> Batch:
    """The examples at `indices`, shape (P,), in that order."""
    places = indices.tolist()
    return {
        name: [leaf[i] for i in places] if isinstance(leaf, list) else leaf.take(indices, 0)
        for name, leaf in batch.items()
    }


def num_bytes(batch: Batch) -> int:
    """Bytes of the arrays of a batch."""
    return sum(leaf.nbytes for leaf in batch.values() if isinstance(leaf, np.ndarray))
