"""Samples to batches of tensors: the one place that knows what the fields mean."""

from functools import cache
from typing import Any

import numpy as np
import torch

from selectflow.data.catalog import Ints
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError

Batch = dict[str, Any]

_PIPED = 1 << 20  # bytes

_ARRAYS = ("npy", "png", "jpg", "jpeg")
FIELDS = (*_ARRAYS, "cls", "txt")
"""The extensions that a batch is made of; the others are for reports."""


def collate(samples: list[Sample]) -> Batch:
    """Stack samples.

    Args:
        samples: At least one, all with the same fields. "npy", "png" or "jpg" with "cls" are an
            image and its label, "npy" alone is a block of tokens, "txt" is text.

    Returns:
        Arrays: "image" (P, ...) in its stored type and "label" int64 (P,), or "tokens" (P, ...);
        "text" and "key" lists of P strings. See `finish`.

    Raises:
        DataError: A sample without an array, or with one of another shape than the first.
    """
    first = samples[0]
    batch: Batch = {}
    if field := next((field for field in _ARRAYS if field in first), None):
        name = "tokens" if field == "npy" and "cls" not in first else "image"
        batch[name] = np.stack(_alike(samples, field, name))
    elif "txt" not in first:
        got = sorted(first.keys() - {"__key__"})
        raise DataError(f"fields must include one of {[*_ARRAYS, 'txt']}, got {got}; add one")
    if "cls" in first:
        batch["label"] = np.array([s["cls"] for s in samples], dtype=np.int64)
    if "txt" in first:
        batch["text"] = [sample["txt"] for sample in samples]
    return batch | {"key": [sample["__key__"] for sample in samples]}


def _alike(samples: list[Sample], field: str, name: str) -> list[Any]:
    shape = samples[0][field].shape
    for sample in samples:
        if sample[field].shape != shape:
            raise DataError(
                f"{name} of key {sample['__key__']!r} must be of shape {shape} like the first, "
                f"got {sample[field].shape}; write all samples at one size"
            )
    return [sample[field] for sample in samples]


def finish(batch: Batch) -> Batch:
    """The batch as a model takes it: tensors; images float32, those of bytes in [0, 1]; int64 else.

    Where there is a GPU the tensors are page-locked.
    """
    return {
        name: leaf if isinstance(leaf, list) else _typed(name, leaf) for name, leaf in batch.items()
    }


_has_gpu = cache(torch.cuda.is_available)  # asked for every field of every pool


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
    """For another process: large arrays as tensors, which go through shared memory.

    Small ones take half the time as arrays, through a pipe.
    """
    return {
        name: torch.from_numpy(leaf)
        if isinstance(leaf, np.ndarray) and leaf.nbytes > _PIPED
        else leaf
        for name, leaf in batch.items()
    }


def pick(batch: Batch, indices: Ints) -> Batch:
    """The examples at `indices`, in that order."""
    places = indices.tolist()
    return {
        name: [leaf[i] for i in places] if isinstance(leaf, list) else leaf.take(indices, 0)
        for name, leaf in batch.items()
    }


def num_bytes(batch: Batch) -> int:
    """Bytes of the arrays of a batch."""
    return sum(leaf.nbytes for leaf in batch.values() if isinstance(leaf, np.ndarray))
