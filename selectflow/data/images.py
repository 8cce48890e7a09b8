"""Images of torchvision's datasets, and of a folder of classes, as shards."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from selectflow.data.build import Layout, build
from selectflow.data.fields import Sample
from selectflow.data.labelled import Labelled, check_noise, samples_of, split_evenly
from selectflow.data.manifest import DataError, Manifest

_SUFFIXES = (".png", ".jpg", ".jpeg")


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
        name: A class of torchvision.datasets with `root`, `train` and `download`, as CIFAR10.
        download_to: Where torchvision keeps its files; it downloads them if they are missing.
        num_target: Images of the target set, >= 1.
        label_noise: Share of the train labels to replace, in [0, 1].
        seed: Chooses which labels are replaced and by what, >= 0.
        layout: How to lay the samples out in shards.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, the name is unknown, or the directory holds
            another dataset.
    """
    check_noise(label_noise, seed)

    def make_splits() -> dict[str, Iterable[Sample]]:
        train, test = (_load(name, download_to, is_train) for is_train in (True, False))
        splits = split_evenly(train.labels, {"target": num_target})
        held_out = {"test": np.arange(len(test.labels))}
        return samples_of(train, splits, label_noise, seed) | samples_of(test, held_out, 0.0, 0)

    options = {"name": f"torchvision:{name}", "label_noise": label_noise, "num_target": num_target}
    return build(root, make_splits, options, seed, layout or Layout())


def _load(name: str, root: str | Path, is_train: bool) -> Labelled:
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
    return Labelled(
        labels=labels,
        image=lambda index: _channels_first(dataset[index][0]),
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
    RGB, their shorter side resized to `size` and the middle square taken; PNG, or arrays of bytes
    where they are packed.

    Args:
        root: Dataset directory, made if missing.
        folder: Where the images are.
        size: Height and width in pixels, >= 1.
        num_target: Images of the target set, >= 1, stratified by class.
        num_test: Images of the test set, >= 1, stratified by class.
        label_noise: Share of the train labels to replace, in [0, 1].
        seed: Chooses which labels are replaced and by what, >= 0.
        layout: How to lay the samples out in shards.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, there are no images or one cannot be decoded, or
            the directory holds another dataset.
    """
    check_noise(label_noise, seed)
    layout = layout or Layout()
    files = sorted(path for path in Path(folder).glob("*/*") if path.suffix.lower() in _SUFFIXES)
    classes = sorted({path.parent.name for path in files})
    if len(classes) < 2 or size < 1:
        raise DataError(
            f"folder must hold images of two classes as <class>/<name>.png, and size be >= 1, "
            f"got {len(files)} of {classes} in {str(folder)!r}, and {size}; correct the path"
        )
    images = Labelled(
        labels=np.array([classes.index(path.parent.name) for path in files], dtype=np.int64),
        image=lambda index: _square(files[index], size),
        key=lambda index: f"{index:06d}-{_plain(files[index].stem)}",
        num_classes=len(classes),
        field="npy" if layout.pack > 1 else "png",
    )
    held_out = {"target": num_target, "test": num_test}
    options = {
        "name": "folder", "classes": classes, "size": size, "label_noise": label_noise, **held_out,
    }  # fmt: skip
    return build(
        root,
        lambda: samples_of(images, split_evenly(images.labels, held_out), label_noise, seed),
        options,
        seed,
        layout,
    )


def _plain(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def _square(path: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            shorter = min(image.size)
            left, top = ((side - shorter) // 2 for side in image.size)
            box = (left, top, left + shorter, top + shorter)
            square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    except Exception as error:  # PIL documents no closed list of errors
        raise DataError(f"image {str(path)!r} must be readable, got {error}; remove it") from error
    return _channels_first(square)


def _channels_first(image: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
