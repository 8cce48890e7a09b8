"""Samples to batches of tensors: the one place that knows what the fields mean."""

from typing import Any

import numpy as np
import torch

from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError

Batch = dict[str, Any]

FIELDS = ("npy", "cls")
"""The extensions that a batch is made of; the others are for reports."""


def collate(samples: list[Sample]) -> Batch:
    """Stack samples.

    Args:
        samples: At least one, all with the same fields: "npy" and "cls" are an image and its
            label, "npy" alone is a block of tokens.

    Returns:
        "image" (P, ...) in its stored type and "label" int64 (P,), or "tokens" (P, ...); "key"
        list of P strings.

    Raises:
        DataError: A sample without these fields, or of another shape than the first.
    """
    names = {"npy": "image" if "cls" in samples[0] else "tokens", "cls": "label"}
    for sample in samples:
        if "npy" not in sample:
            got = sorted(sample.keys() - {"__key__"})
            raise DataError(f"fields must include npy, got {got}; write the samples with arrays")
        if sample["npy"].shape != samples[0]["npy"].shape:
            raise DataError(
                f"{names['npy']} of key {sample['__key__']!r} must be of shape "
                f"{samples[0]['npy'].shape} like the first, got {sample['npy'].shape}; "
                "write all samples at one size"
            )
    batch: Batch = {names["npy"]: torch.from_numpy(np.stack([s["npy"] for s in samples]))}
    if "cls" in samples[0]:
        batch["label"] = torch.tensor([s["cls"] for s in samples], dtype=torch.int64)
    return batch | {"key": [sample["__key__"] for sample in samples]}


def finish(batch: Batch) -> Batch:
    """The batch as a model takes it: images float32, tokens int64; page-locked for a GPU."""
    is_gpu = torch.cuda.is_available()
    return {
        name: _typed(name, leaf, is_gpu) if torch.is_tensor(leaf) else leaf
        for name, leaf in batch.items()
    }


def _typed(name: str, leaf: torch.Tensor, is_pinned: bool) -> torch.Tensor:
    if name == "image":
        leaf = leaf.float()
    elif not leaf.is_floating_point():
        leaf = leaf.long()
    return leaf.pin_memory() if is_pinned else leaf


def pick(batch: Batch, indices: torch.Tensor) -> Batch:
    """The examples at `indices` (1-d int64), in that order."""
    return {
        name: leaf[indices] if torch.is_tensor(leaf) else [leaf[i] for i in indices.tolist()]
        for name, leaf in batch.items()
    }


def num_bytes(batch: Batch) -> int:
    """Bytes of the tensors of a batch."""
    return sum(leaf.nbytes for leaf in batch.values() if torch.is_tensor(leaf))
