"""Pools for training in an order that can be resumed, and whole splits for evaluation."""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from selectflow.data.manifest import DataError, read_manifest
from selectflow.data.shards import Sample, read_split

Batch = dict[str, Any]


class PoolStream:
    """An endless sequence of candidate pools from one split.

    The order of an epoch is a function of (seed, epoch) alone and holds each sample exactly once.
    Epochs are joined without a gap, so that every pool is full; one pool may span several epochs.
    Samples are decoded once, when the stream is made, and held in memory as stacked tensors: a
    pool is one index_select.

    Args:
        root: Dataset directory.
        split: Name of the split.
        pool: Examples in each pool, P >= 1.
        seed: Seed of the order, >= 0.
        shuffle: False gives stored order in every epoch.

    Raises:
        DataError: An argument is out of its range, or the split cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        pool: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if pool < 1:
            raise DataError(f"pool must be >= 1, got {pool}; it is the number of candidates")
        if seed < 0:
            raise DataError(f"seed must be >= 0, got {seed}; numpy takes no negative seeds")
        self._pool, self._seed, self._shuffle = pool, seed, shuffle
        # everything that the order depends on, besides epoch and position
        self._identity = {
            "fingerprint": read_manifest(root).fingerprint(),
            "split": split,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._samples = _collate(list(read_split(root, split)))
        self._num_samples = len(self._samples["key"])
        self._start_epoch(0)

    def __iter__(self) -> Self:
        """The stream itself: iteration goes on after the last pool handed out."""
        return self

    def __next__(self) -> Batch:
        """The next pool.

        Returns:
            "image" float32 (P, ...), "label" int64 (P,), "key" list of P strings.
        """
        parts: list[torch.Tensor] = []
        missing = self._pool
        while missing:
            part = self._order[self._position : self._position + missing]
            parts.append(part)
            missing -= len(part)
            self._position += len(part)
            if self._position == self._num_samples:
                self._start_epoch(self._epoch + 1)
        return _index(self._samples, torch.cat(parts))

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after the last pool handed out.

        Returns:
            "epoch", "position" (samples of that epoch already handed out), and what the order
            depends on: "fingerprint", "split", "seed", "shuffle". The pool size is free to change.
        """
        return self._identity | {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream of the same dataset and order was.

        Args:
            state: What `state_dict` returned.

        Raises:
            DataError: The state is of another dataset, split, seed or shuffle, is incomplete, or
                lies outside the epoch; the stream then stays where it was.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"{name} must be {value!r} as in this stream, got {state.get(name)!r} in the "
                    "state; resume with the dataset and options of the run that wrote the state"
                )
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position < self._num_samples:
            raise DataError(
                f"epoch must be >= 0 and position in [0, {self._num_samples}), "
                f"got {epoch} and {position}; pass what state_dict returned"
            )
        self._start_epoch(epoch)
        self._position = position

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = torch.arange(self._num_samples)
        if self._shuffle:
            seeds = np.random.SeedSequence([self._seed, epoch])
            permutation = np.random.default_rng(seeds).permutation(self._num_samples)
            self._order = torch.from_numpy(permutation)


def read_batches(root: str | Path, split: str, batch_size: int) -> list[Batch]:
    """A split in stored order, such as the target or the test set.

    Args:
        root: Dataset directory.
        split: Name of the split.
        batch_size: Examples in each batch but the last, >= 1.

    Returns:
        Batches in the format of `PoolStream`.

    Raises:
        DataError: batch_size is below 1, or the split cannot be read.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be >= 1, got {batch_size}; 256 suits small samples")
    samples = _collate(list(read_split(root, split)))
    num_samples = len(samples["key"])
    return [
        _index(samples, torch.arange(start, min(start + batch_size, num_samples)))
        for start in range(0, num_samples, batch_size)
    ]


def read_metadata(root: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """What the writer recorded about each sample; for reports, never for selection.

    Args:
        root: Dataset directory.
        split: Name of the split.

    Returns:
        Sample key -> its json; empty for a sample without one.

    Raises:
        DataError: The split cannot be read.
    """
    return {sample["__key__"]: sample.get("json", {}) for sample in read_split(root, split)}


def _collate(samples: list[Sample]) -> Batch:
    # the one place that knows what the fields mean: (npy, cls) are an image and its label
    for sample in samples:
        if "npy" not in sample or "cls" not in sample:
            got = sorted(sample.keys() - {"__key__"})
            raise DataError(f"fields must include cls and npy, got {got}; write them as images")
        if sample["npy"].shape != samples[0]["npy"].shape:
            raise DataError(
                f"image of key {sample['__key__']!r} must be of shape {samples[0]['npy'].shape} "
                f"like the first, got {sample['npy'].shape}; write all images at one size"
            )
    return {
        "image": torch.from_numpy(np.stack([sample["npy"] for sample in samples])).float(),
        "label": torch.tensor([sample["cls"] for sample in samples], dtype=torch.int64),
        "key": [sample["__key__"] for sample in samples],
    }


def _index(samples: Batch, indices: torch.Tensor) -> Batch:
    return {
        name: leaf[indices] if torch.is_tensor(leaf) else [leaf[i] for i in indices.tolist()]
        for name, leaf in samples.items()
    }
