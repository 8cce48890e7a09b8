"""The fields of a sample: from a value to the bytes of a tar member and back, without pickle."""

import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

Sample = dict[str, Any]
"""`{"__key__": str}` and the values of the fields, by extension."""


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


def _encode_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _encode_png(value: Any) -> bytes:
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise TypeError("not uint8 of shape (1 or 3, height, width)")
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def _decode_image(data: bytes) -> Any:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _encoded(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("not the bytes of an encoded image")
    return value


# extension -> (value to bytes, bytes to value); a new kind of field is one line here
CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "npy": (_encode_npy, _decode_npy),
    "cls": (_encode_cls, int),
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
