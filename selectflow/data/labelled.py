"""Labelled images as splits: stratified, disjoint, with label noise of a chosen share."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from selectflow.data.catalog import Ints
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError


@dataclass(frozen=True)
class Labelled:
    """Images with labels.

    Attributes:
        labels: class of each image, 0 to num_classes - 1, shape (N,).
        image: the image at an index, as the field holds it.
        key: the key of the sample at an index.
        num_classes: number of classes.
        field: "npy" or "png".
    """

    labels: Ints
    image: Callable[[int], npt.NDArray[Any]]
    key: Callable[[int], str]
    num_classes: int
    field: str = "npy"


def check_noise(label_noise: float, seed: int) -> None:
    """Refuse options out of their range.

    Raises:
        DataError: label_noise outside [0, 1], seed below 0.
    """
    if not 0.0 <= label_noise <= 1.0:
        raise DataError(f"label_noise must be in [0, 1], got {label_noise}; it is a share")
    if seed < 0:
        raise DataError(f"seed must be >= 0, got {seed}; numpy takes no negative seeds")


def split_evenly(labels: Ints, held_out: Mapping[str, int]) -> dict[str, Ints]:
    """Indices of the splits: stratified by class, disjoint, the same for every seed.

    Args:
        labels: class of each image.
        held_out: size of each split beside "train", which gets the rest.

    Raises:
        DataError: nothing is left to train on.
    """
    if sum(held_out.values()) >= len(labels):
        raise DataError(
            f"the sizes of {list(held_out)} must add up to less than {len(labels)} samples, "
            f"got {list(held_out.values())}; hold out fewer"
        )
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rest = shuffled[np.argsort(labels[shuffled], kind="stable")]
    splits = {}
    for name, count in held_out.items():
        splits[name], rest = _take_evenly(rest, count)
    return {"train": np.sort(rest)} | {name: np.sort(each) for name, each in splits.items()}


def samples_of(
    images: Labelled, splits: Mapping[str, Ints], label_noise: float, seed: int
) -> dict[str, Iterable[Sample]]:
    """The samples of each split; in "train" exactly round(label_noise * N) labels are wrong.

    A wrong label is one of the other classes uniformly; what is altered at a lower share is altered
    in the same way at a higher one. The json of a sample, `{"altered": bool, "true_label": int}`,
    records it.
    """
    labels = images.labels.copy()
    if "train" in splits:
        train = splits["train"]
        labels[train] = _add_noise(labels[train], images.num_classes, label_noise, seed)
    return {name: _samples(images, labels, indices) for name, indices in splits.items()}


def _samples(images: Labelled, labels: Ints, indices: Ints) -> Iterator[Sample]:
    for index in indices.tolist():
        label, true_label = int(labels[index]), int(images.labels[index])
        yield {
            "__key__": images.key(index),
            images.field: images.image(index),
            "cls": label,
            "json": {"altered": label != true_label, "true_label": true_label},
        }


def _take_evenly(indices: Ints, count: int) -> tuple[Ints, Ints]:
    # evenly spaced along indices sorted by class: every class gets its share to within one
    taken = np.diff(np.arange(len(indices) + 1) * count // len(indices)).astype(bool)
    return indices[taken], indices[~taken]


def _add_noise(labels: Ints, num_classes: int, share: float, seed: int) -> Ints:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shift = rng.integers(1, num_classes, size=len(labels))  # never 0: always another class
    altered = order[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[altered] = (labels[altered] + shift[altered]) % num_classes
    return noisy
