"""scikit-learn's handwritten digits as shards, with label noise of a chosen share."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectflow.data.fields import Sample
from selectflow.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    read_manifest,
    write_manifest,
)
from selectflow.data.shards import write_split

_NUM_CLASSES = 10
_NUM_TARGET = 200
_NUM_TEST = 400

Ints = npt.NDArray[np.int64]


def make_digits(
    root: str | Path, *, label_noise: float = 0.0, seed: int = 0, per_shard: int = 256
) -> Manifest:
    """Write the digits as the splits train (1197), target (200) and test (400), or reuse them.

    Images are float32 (1, 8, 8) in [0, 1]. The splits are disjoint, stratified by class and the
    same for every option and seed. Target and test are clean. In train, exactly
    `round(label_noise * 1197)` labels are replaced, each by one of the nine other classes
    uniformly; what is altered at a lower share is altered in the same way at a higher one. Each
    sample's json, `{"altered": bool, "true_label": int}`, records it.

    Args:
        root: Dataset directory, made if missing.
        label_noise: Share of the train labels to replace, in [0, 1].
        seed: Chooses which labels are replaced and by what, >= 0.
        per_shard: Samples in each shard but the last, >= 1.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, or the directory holds another dataset.
    """
    if not 0.0 <= label_noise <= 1.0:
        raise DataError(f"label_noise must be in [0, 1], got {label_noise}; it is a share")
    if seed < 0:
        raise DataError(f"seed must be >= 0, got {seed}; numpy takes no negative seeds")
    options = {"name": "digits", "label_noise": float(label_noise), "per_shard": int(per_shard)}
    if (Path(root) / MANIFEST_NAME).exists():
        return _reuse(root, options | {"seed": seed})

    # imported here because it takes a second, which a reused dataset need not wait for
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    images = (bunch.images[:, None] / 16).astype(np.float32)  # (1797, 1, 8, 8)
    true_labels = bunch.target.astype(np.int64)
    splits = _split(true_labels)
    labels = true_labels.copy()
    labels[splits["train"]] = _add_noise(true_labels[splits["train"]], label_noise, seed)
    shards = {
        split: tuple(
            write_split(root, split, _samples(indices, images, labels, true_labels), per_shard)
        )
        for split, indices in splits.items()
    }
    manifest = Manifest(shards, fields=("cls", "json", "npy"), options=options, seed=seed)
    write_manifest(root, manifest)  # last: its presence says that the dataset is whole
    return manifest


def _reuse(root: str | Path, wanted: dict[str, Any]) -> Manifest:
    manifest = read_manifest(root)
    held = manifest.options | {"seed": manifest.seed}
    for option in wanted | held:  # the builder's name first
        if held.get(option) != wanted.get(option):
            raise DataError(
                f"{option} must be {held.get(option)!r} as in the dataset at {str(root)!r}, "
                f"got {wanted.get(option)!r}; choose another root, or delete that directory"
            )
    return manifest


def _split(labels: Ints) -> dict[str, Ints]:
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    target, rest = _take_evenly(by_class, _NUM_TARGET)
    test, train = _take_evenly(rest, _NUM_TEST)
    return {"train": np.sort(train), "target": np.sort(target), "test": np.sort(test)}


def _take_evenly(indices: Ints, count: int) -> tuple[Ints, Ints]:
    # evenly spaced along indices sorted by class: every class gets its share to within one
    taken = np.diff(np.arange(len(indices) + 1) * count // len(indices)).astype(bool)
    return indices[taken], indices[~taken]


def _add_noise(labels: Ints, share: float, seed: int) -> Ints:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shift = rng.integers(1, _NUM_CLASSES, size=len(labels))  # never 0: always another class
    altered = order[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[altered] = (labels[altered] + shift[altered]) % _NUM_CLASSES
    return noisy


def _samples(
    indices: Iterable[int], images: npt.NDArray[np.float32], labels: Ints, true_labels: Ints
) -> Iterator[Sample]:
    for index in indices:
        label, true_label = int(labels[index]), int(true_labels[index])
        yield {
            "__key__": f"digit-{index:04d}",  # the position in scikit-learn's own order
            "npy": images[index],
            "cls": label,
            "json": {"altered": label != true_label, "true_label": true_label},
        }
