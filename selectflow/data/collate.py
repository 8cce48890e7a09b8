"""Samples to batches of tensors: the one place that knows what the fields mean."""

from typing import Any

import numpy as np
import torch

from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError

Batch = dict[str, Any]

_ARRAYS = ("npy", "png", "jpg", "jpeg")
FIELDS = (*_ARRAYS, "cls", "txt")
"""The extensions that a batch is made of; the others are for reports."""


def collate(samples: list[Sample]) -> Batch:
    """Stack samples.

    Args:
        samples: At least one, all with the same fields. "npy", "png" or "jpg" with "cls" are an
            image and its label, "npy" alone is a block of tokens, "txt" is text.

    Returns:
        "image" (P, ...) in its stored type and "label" int64 (P,), or "tokens" (P, ...); "text"
        and "key" lists of P strings.

    Raises:
        DataError: A sample without an array, or with one of another shape than the first.
    """
    first = samples[0]
    batch: Batch = {}
    if field := next((field for field in _ARRAYS if field in first), None):
        name = "tokens" if field == "npy" and "cls" not in first else "image"
        batch[name] = torch.from_numpy(np.stack(_alike(samples, field, name)))
    elif "txt" not in first:
        got = sorted(first.keys() - {"__key__"})
        raise DataError(f"fields must include one of {[*_ARRAYS, 'txt']}, got {got}; add one")
    if "cls" in first:
        batch["label"] = torch.tensor([s["cls"] for s in samples], dtype=torch.int64)
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
    """The batch as a model takes it: images float32, those of bytes in [0, 1]; tokens int64.

    Where there is a GPU the tensors are page-locked.
    """
    is_gpu = torch.cuda.is_available()
    return {
        name: _typed(name, leaf, is_gpu) if torch.is_tensor(leaf) else leaf
        for name, leaf in batch.items()
    }


def _typed(name: str, leaf: torch.Tensor, is_pinned: bool) -> torch.Tensor:
    if name != "image":
        leaf = leaf if leaf.is_floating_point() else leaf.long()
    elif leaf.dtype == torch.uint8:
        # by numpy: torch would use all threads, which wait for each other on a busy machine
        leaf = torch.from_numpy(np.divide(leaf.numpy(), np.float32(255), dtype=np.float32))
    else:
        leaf = leaf.float()
    return leaf.pin_memory() if is_pinned else leaf


def pick(batch: Batch, indices: torch.Tensor) -> Batch:
    """The examples at `indices` (1-d int64), in that order."""
    return {
        name: leaf.index_select(0, indices)
        if torch.is_tensor(leaf)
        else [leaf[i] for i in indices.tolist()]
        for name, leaf in batch.items()
    }


def num_bytes(batch: Batch) -> int:
    """Bytes of the tensors of a batch."""
    return sum(leaf.nbytes for leaf in batch.values() if torch.is_tensor(leaf))
