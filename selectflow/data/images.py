"""Labelled images as shards: scikit-learn's digits, torchvision's datasets, folders of classes.

The splits are stratified by class and disjoint; a chosen share of the train labels is wrong.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from selectflow.data.fields import Ints, Sample
from selectflow.data.folders import find_files
from selectflow.data.manifest import DataError, Manifest, check_seed
from selectflow.data.pixels import pixels_of, read_image
from selectflow.data.write import Layout, build

_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class _Images:
    """Images with labels, the image and the key by their index."""

    labels: Ints  # (N,), from 0 to num_classes - 1
    image: Callable[[int], npt.NDArray[Any]]
    key: Callable[[int], str]
    num_classes: int
    field: str = "npy"  # or "png"


def make_digits(
    root: str | Path,
    *,
    label_noise: float = 0.0,
    seed: int = 0,
    per_shard: int = 256,
    pack: int = 1,
    max_bytes: int | None = None,
) -> Manifest:
    """Write the digits as the splits train (1197), target (200) and test (400), or reuse them.

    Images are float32 (1, 8, 8) in [0, 1]. The splits are disjoint, stratified by class and the
    same for every option and seed. Target and test are clean. In train, exactly
    `round(label_noise * 1197)` labels are replaced, each by one of the nine other classes
    uniformly; a label altered at a lower share is altered in the same way at a higher one. Each
    sample's json, `{"altered": bool, "true_label": int}`, records it.

    Args:
        root: Dataset directory, made if missing.
        label_noise: Share of the train labels to replace, in [0, 1].
        seed: Chooses which labels are replaced and by what, >= 0.
        per_shard: Samples that close a shard, >= 1.
        pack: Samples of a record, >= 1; above 1 a sample's key is "<shard>/<record>/<row>".
        max_bytes: Bytes of contents that close a shard, >= 1; None: no limit.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, or the directory holds another dataset.
    """
    _check_noise(label_noise, seed)

    def make_splits() -> dict[str, Iterable[Sample]]:
        # imported here because it takes a second, which a reused dataset need not wait for
        from sklearn.datasets import load_digits  # noqa: PLC0415

        bunch = load_digits()
        images = (bunch.images[:, None] / 16).astype(np.float32)  # (1797, 1, 8, 8)
        digits = _Images(
            labels=bunch.target.astype(np.int64),
            image=images.__getitem__,
            key=lambda index: f"digit-{index:04d}",  # the position in scikit-learn's own order
            num_classes=10,
        )
        return _split(digits, {"target": 200, "test": 400}, label_noise, seed)

    options = {"name": "digits", "label_noise": float(label_noise)}
    return build(root, make_splits, options, seed, Layout(per_shard, pack, max_bytes))


def make_torchvision(
    root: str | Path,
    name: str,
    *,
    download_to: str | Path = "data/torchvision",
    num_target: int = 200,
    label_noise: float = 0.0,
    seed: int = 0,
    layout: Layout | None = None,
) -> Manifest:
    """Write a torchvision classification dataset as train, target and test, or reuse it.

    Images are uint8 (channels, height, width), the target is taken out of the training images,
    stratified by class, and label noise is as in `make_digits`.

    Args:
        root: Dataset directory, made if missing.
        name: A class of torchvision.datasets with `root`, `train` and `download`, such as CIFAR10.
        download_to: Where torchvision keeps its files; it downloads them if they are missing.
        num_target: Images of the target set, >= 1.
        label_noise, seed: As in `make_digits`.
        layout: How to lay the samples out in shards.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: As in `make_digits`, or the name is unknown.
    """
    _check_noise(label_noise, seed)

    def make_splits() -> dict[str, Iterable[Sample]]:
        train, test = (_load(name, download_to, is_train) for is_train in (True, False))
        splits = _split(train, {"target": num_target}, label_noise, seed)
        return splits | {"test": _samples(test, test.labels, np.arange(len(test.labels)))}

    options = {"name": f"torchvision:{name}", "label_noise": label_noise, "num_target": num_target}
    return build(root, make_splits, options, seed, layout)


def _load(name: str, root: str | Path, is_train: bool) -> _Images:
    from torchvision import datasets  # noqa: PLC0415 - takes seconds

    try:
        dataset = getattr(datasets, name)(root=str(root), train=is_train, download=True)
        labels = np.array([int(label) for label in dataset.targets], dtype=np.int64)
        num_classes = len(dataset.classes)
    except (AttributeError, TypeError) as error:
        raise DataError(
            "dataset must be a class of torchvision.datasets with train, download, targets and "
            f"classes, got {name!r} ({error}); CIFAR10, CIFAR100, MNIST and FashionMNIST are"
        ) from error
    return _Images(
        labels=labels,
        image=lambda index: pixels_of(dataset[index][0]),
        key=lambda index: f"{'train' if is_train else 'test'}-{index:06d}",
        num_classes=num_classes,
    )


def make_folder(
    root: str | Path,
    folder: str | Path,
    *,
    size: int = 224,
    num_target: int = 200,
    num_test: int = 400,
    label_noise: float = 0.0,
    seed: int = 0,
    layout: Layout | None = None,
) -> Manifest:
    """Write images from `<folder>/<class>/<name>.png|jpg|jpeg` as train, target and test.

    The classes are numbered in alphabetical order and named in the manifest's options. Images are
    RGB and upright, whatever the file has (16 bits are scaled to 8, what is transparent is laid on
    white), their shorter side resized to `size` and the middle square taken; PNG, or arrays of
    bytes where they are packed. Endings may be of any case. Hidden files, those of other endings
    and those that lie deeper are left out, which a warning counts.

    Args:
        root: Dataset directory, made if missing.
        folder: Where the images are.
        size: Height and width in pixels, >= 1.
        num_target: Images of the target set, >= 1, stratified by class.
        num_test: Images of the test set, >= 1, stratified by class.
        label_noise, seed: As in `make_digits`.
        layout: How to lay the samples out in shards.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: As in `make_digits`, or there are no images, also in one class alone, or one
            cannot be decoded.
    """
    _check_noise(label_noise, seed)
    layout = layout or Layout()
    files = find_files(folder, _SUFFIXES)
    classes = sorted({path.parent.name for path in files})
    if len(classes) < 2 or size < 1:
        raise DataError(
            f"folder must hold images of two classes as <class>/<name>.png, and size be >= 1, "
            f"got {len(files)} of {classes} in {str(folder)!r}, and {size}; correct the path"
        )
    images = _Images(
        labels=np.array([classes.index(path.parent.name) for path in files], dtype=np.int64),
        image=lambda index: _square(files[index], size),
        key=lambda index: f"{index:06d}-{re.sub(r'[^A-Za-z0-9_-]', '_', files[index].stem)[:60]}",
        num_classes=len(classes),
        field="npy" if layout.pack > 1 else "png",
    )
    held_out = {"target": num_target, "test": num_test}
    options = {"name": "folder", "classes": classes, "size": size, "label_noise": label_noise}

    make_splits = partial(_split, images, held_out, label_noise, seed)
    return build(root, make_splits, options | held_out, seed, layout)


def _square(path: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        image = read_image(path).convert("RGB")
    except Exception as error:  # PIL documents no closed list of errors
        raise DataError(
            f"image {str(path)!r} must be readable, got {type(error).__name__}: {error}; "
            "convert or remove it"
        ) from error
    shorter = min(image.size)
    left, top = ((side - shorter) // 2 for side in image.size)
    box = (left, top, left + shorter, top + shorter)
    return pixels_of(image.resize((size, size), Image.Resampling.BICUBIC, box))


def _check_noise(label_noise: float, seed: int) -> None:
    if not 0.0 <= label_noise <= 1.0:
        raise DataError(f"label_noise must be in [0, 1], got {label_noise}; it is a share")
    check_seed(seed)


def _split(
    images: _Images, held_out: Mapping[str, int], label_noise: float, seed: int
) -> dict[str, Iterable[Sample]]:
    """The samples of "train", some of their labels wrong, and of each split that is held out.

    Which images are in a split is the same for every seed.
    """
    if sum(held_out.values()) >= len(images.labels):
        raise DataError(
            f"the sizes of {list(held_out)} must add up to less than {len(images.labels)} samples, "
            f"got {list(held_out.values())}; hold out fewer"
        )
    shuffled = np.random.default_rng(0).permutation(len(images.labels))
    rest = shuffled[np.argsort(images.labels[shuffled], kind="stable")]
    splits = {}
    for name, count in held_out.items():
        # evenly spaced along indices sorted by class: every class gets its share to within one
        taken = np.diff(np.arange(len(rest) + 1) * count // len(rest)).astype(bool)
        splits[name], rest = np.sort(rest[taken]), rest[~taken]
    train, labels = np.sort(rest), images.labels.copy()
    labels[train] = _add_noise(labels[train], images.num_classes, label_noise, seed)
    return {
        name: _samples(images, labels, indices)
        for name, indices in ({"train": train} | splits).items()
    }


def _samples(images: _Images, labels: Ints, indices: Ints) -> Iterator[Sample]:
    for index in indices.tolist():
        label, true_label = int(labels[index]), int(images.labels[index])
        yield {
            "__key__": images.key(index),
            images.field: images.image(index),
            "cls": label,
            "json": {"altered": label != true_label, "true_label": true_label},
        }


def _add_noise(labels: Ints, num_classes: int, share: float, seed: int) -> Ints:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    shift = rng.integers(1, num_classes, size=len(labels))  # never 0: always another class
    altered = order[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[altered] = (labels[altered] + shift[altered]) % num_classes
    return noisy
