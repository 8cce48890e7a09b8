"""What live shares bring: digits from five sources of 0, 20, 40, 60 and 80% wrong labels.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources.py [STUDY ...] [--seeds 5] [--steps 400]

Keep 32 of 128 by an MLP (64-128-128-10) and AdamW at 3e-3. Studies, all of them by default:

    shares      fixed, live, of losses, the oracle's; selecting or not
    alike       five sources that do not differ, of 40% wrong labels each
    classes     a source for each class, the first ones rare
    turning     the cleanest source has random labels for a third of the run
    rules       the exponent, the memory and the drift of live shares
    throughput  samples a second of a stream of 1 and of 200 sources

A source has 1197 / 5 digits of its own, unless the study says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectflow import Selector
from selectflow.control.shares import AutoShares
from selectflow.data import (
    Manifest,
    PoolStream,
    make_digits,
    read_batches,
    read_split,
    write_manifest,
    write_split,
)
from selectflow.models.vision import evaluate, image_losses, mlp

POOL, KEEP, LR = 128, 32, 3e-3
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
ROOT = Path(tempfile.gettempdir(), "selectflow-sources")
STUDIES = ("shares", "alike", "classes", "turning", "rules", "throughput")
Batch = dict[str, Any]


# --- data -----------------------------------------------------------------------------------------


def write(root: Path, samples: list[Batch]) -> Path:
    """A dataset of one split."""
    if not (root / "manifest.json").exists():
        root.mkdir(parents=True, exist_ok=True)
        shards = write_split(root, "train", samples, 256)
        fields = tuple(sorted({name for each in samples for name in each} - {"__key__"}))
        write_manifest(root, Manifest({"train": tuple(shards)}, fields, {"name": "part"}, 0))
    return root


def noisy(noises: tuple[float, ...], seed: int) -> dict[str, Path]:
    """A fifth of the digits for each share of wrong labels, other ones with each seed."""
    places = np.random.default_rng([seed, 5]).permutation(1197)  # not those of the altered
    found = {}
    for index, (noise, part) in enumerate(
        zip(noises, np.array_split(places, len(noises)), strict=True)
    ):
        root = ROOT / f"digits-{noise}-{seed}"
        make_digits(root, label_noise=noise, seed=seed)
        samples = list(read_split(root, "train"))
        name = f"{noise:.0%} wrong" if len(set(noises)) > 1 else f"part {index}"
        folder = ROOT / f"part-{index}-{noise}-{seed}"
        found[name] = write(folder, [samples[place] for place in part])
    return found


def by_class(seed: int) -> dict[str, Path]:
    """A source for each class: classes 0 to 4 have a tenth of their digits."""
    make_digits(ROOT / "digits-0.0-0")
    samples = list(read_split(ROOT / "digits-0.0-0", "train"))
    found = {}
    for label in range(10):
        own = [sample for sample in samples if sample["cls"] == label]
        own = own[: len(own) // 10] if label < 5 else own
        found[f"class {label}"] = write(ROOT / f"class-{label}", own)
    return found


@cache
def held_out() -> tuple[list[Batch], list[Batch]]:
    make_digits(ROOT / "digits-0.0-0")
    return tuple(read_batches(ROOT / "digits-0.0-0", split, 400) for split in ("target", "test"))


@cache
def wrong(seed: int) -> frozenset[str]:
    """Keys of the samples with a wrong label, of every source of a seed."""
    return frozenset(
        f"{name}/{sample['__key__']}"
        for noises in (NOISES, (0.4,) * 5)
        for name, root in noisy(noises, seed).items()
        for sample in read_split(root, "train")
        if sample["json"]["altered"]
    )


# --- one run --------------------------------------------------------------------------------------


@dataclass
class Result:
    """Test loss and accuracy, wrong labels among the kept, and the shares after each step."""

    loss: float
    accuracy: float
    kept_wrong: float
    shares: list[dict[str, float]]
    seconds: float


def train(
    sources: Mapping[str, Path],
    shares: Any,
    seed: int,
    steps: int,
    change: Callable[[int, Batch], Batch] = lambda step, pool: pool,
    at_random: bool = False,
    **options: Any,
) -> Result:
    """Train on what is kept; `at_random`: on as many of the pool at random, scored all the same."""
    torch.manual_seed(seed)
    model = mlp(64, 10, (128, 128))
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    target, test = held_out()
    options = {"horizon": 0, "keep": KEEP} | options
    selector = Selector(model, optimizer, image_losses, target, seed=seed, **options)
    pools = PoolStream(sources, pool=POOL, seed=seed, shares=shares)
    random = torch.Generator().manual_seed(seed)
    found, kept, began = [], Counter(), time.perf_counter()
    queue: list[Batch] = []

    def changed() -> Iterator[Batch]:
        for step, pool in enumerate(pools):
            yield change(step, pool)

    given = changed()

    def upcoming() -> Iterator[Batch]:
        place = 0
        while True:
            if place == len(queue):
                queue.append(next(given))
            yield queue[place]
            place += 1

    for _ in range(steps):
        pool = queue.pop(0) if queue else next(given)
        batch = selector.select(pool, upcoming())
        pools.follow(selector.last)
        if at_random:
            places = torch.randperm(POOL, generator=random)[:KEEP].tolist()
            batch = {
                name: value[places] if torch.is_tensor(value) else [value[i] for i in places]
                for name, value in pool.items()
            }
        kept.update(key in wrong(seed) for key in batch["key"])
        optimizer.zero_grad()
        image_losses(model, batch).mean().backward()
        optimizer.step()
        found.append(pools.shares)
    seconds = time.perf_counter() - began
    model.eval()
    with torch.no_grad():
        means = evaluate(model, test)
    return Result(means["loss"], means["accuracy"], kept[True] / kept.total(), found, seconds)


def row(name: str, results: list[Result], source: str) -> None:
    """Print the means over the seeds, with the standard deviation of the loss."""
    losses = [each.loss for each in results]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    mean = statistics.fmean
    print(
        f"| {name} | {mean(losses):.3f} ± {spread:.3f} | {mean(e.accuracy for e in results):.3f} | "
        f"{mean(e.kept_wrong for e in results):.0%} | "
        f"{mean(e.shares[-1].get(source, 0.0) for e in results):.0%} | "
        f"{mean(e.seconds for e in results):.1f} |",
        flush=True,
    )


def head(source: str) -> None:
    print(f"| | test loss | accuracy | wrong among the kept | share of {source} at the end | s |")
    print("| --- | --- | --- | --- | --- | --- |")
