"""The tasks of `sources.py`: digits, and tiles of photographs, in sources of wrong labels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from selectflow.data import (
    Manifest,
    make_digits,
    make_folder,
    read_batches,
    read_split,
    write_manifest,
    write_split,
)
from selectflow.models.vision import mlp

NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
ROOT = Path(tempfile.gettempdir(), "selectflow-sources")
Batch = dict[str, Any]
Sources = dict[str, Path]

PHOTOGRAPHS = {  # where two packages have them, in colours
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg",
                         "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}  # fmt: skip
TILE, TILES = 8, 400  # pixels of a side, and tiles of each photograph


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        name: of its files.
        num: samples of the train split.
        make: `make(root, label_noise=, seed=)` writes train, target and test, or reuses them.
        model: the untrained one.
    """

    name: str
    num: int
    make: Callable[..., Manifest]
    model: Callable[[], nn.Module]

    def whole(self, noise: float, seed: int) -> Path:
        """All of it, with a share of wrong labels in train."""
        root = ROOT / f"{self.name}-{noise}-{seed}"
        self.make(root, label_noise=noise, seed=seed)
        return root

    def noisy(self, noises: tuple[float, ...], seed: int) -> Sources:
        """A fifth of the samples for each share of wrong labels, other ones with each seed."""
        places = np.random.default_rng([seed, 5]).permutation(self.num)  # not those of the altered
        found = {}
        for index, (noise, part) in enumerate(
            zip(noises, np.array_split(places, len(noises)), strict=True)
        ):
            samples = list(read_split(self.whole(noise, seed), "train"))
            name = f"{noise:.0%} wrong" if len(set(noises)) > 1 else f"part {index}"
            folder = ROOT / f"{self.name}-part-{index}-{noise}-{seed}"
            found[name] = write(folder, [samples[place] for place in part])
        return found

    def held_out(self) -> tuple[list[Batch], list[Batch]]:
        """Target and test."""
        return _held_out(self)


@cache
def _held_out(task: Task) -> tuple[list[Batch], list[Batch]]:
    root = task.whole(0.0, 0)
    return read_batches(root, "target", 400), read_batches(root, "test", 400)


def write(root: Path, samples: list[Batch]) -> Path:
    """A dataset of one split."""
    if not (root / "manifest.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        shards = write_split(root, "train", samples, 256)
        fields = tuple(sorted({name for each in samples for name in each} - {"__key__"}))
        write_manifest(root, Manifest({"train": tuple(shards)}, fields, {"name": "part"}, 0))
    return root


def by_class() -> Sources:
    """A source for each class of the digits: classes 0 to 4 have a tenth of theirs."""
    samples = list(read_split(DIGITS.whole(0.0, 0), "train"))
    found = {}
    for label in range(10):
        own = [sample for sample in samples if sample["cls"] == label]
        own = own[: len(own) // 10] if label < 5 else own
        found[f"class {label}"] = write(ROOT / f"class-{label}", own)
    return found


@cache
def wrong(sources: tuple[tuple[str, Path], ...]) -> frozenset[str]:
    """Keys of the samples with a wrong label."""
    return frozenset(
        f"{name}/{sample['__key__']}"
        for name, root in sources
        for sample in read_split(root, "train")
        if sample["json"]["altered"]
    )


def make_photographs(root: Path, *, label_noise: float, seed: int) -> Manifest:
    """Tiles of ten photographs; the class is the photograph."""
    folder = ROOT / "cut"
    if not folder.exists():
        for name, (inside, files) in PHOTOGRAPHS.items():
            package = find_spec(name)
            if package is None or package.origin is None:
                raise SystemExit("photographs of scikit-image are used: pip install scikit-image")
            for file in files:
                path = Path(package.origin).parent / inside / file
                _cut(path, folder / path.stem)
    held_out = {"num_target": 200, "num_test": 1200}
    return make_folder(root, folder, size=TILE, **held_out, label_noise=label_noise, seed=seed)


def _cut(path: Path, folder: Path) -> None:
    """Tiles that do not overlap, drawn at random."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    drawn = np.random.default_rng(0).permutation(rows * columns)[:TILES]
    folder.mkdir(parents=True)
    for place in drawn.tolist():
        top, left = TILE * (place // columns), TILE * (place % columns)
        Image.fromarray(pixels[top : top + TILE, left : left + TILE]).save(
            folder / f"{place:04d}.png"
        )


DIGITS = Task("digits", 1197, make_digits, lambda: mlp(64, 10, (128, 128)))
TILED = Task("tiles", 2600, make_photographs, lambda: mlp(3 * TILE**2, 10, (128, 128)))
