"""What live shares bring: digits from five sources of 0, 20, 40, 60 and 80% wrong labels.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources.py [STUDY ...] [--seeds 5] [--steps 400]

Keep 32 of 128 by an MLP (64-128-128-10) and AdamW at 3e-3. Studies, all of them by default:

    shares      fixed, live, of losses, the oracle's; selecting or not
    alike       five sources that do not differ, of 40% wrong labels each
    classes     a source for each class, the first ones rare
    turning     the cleanest source has random labels from --steps on, for as many steps
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import take
from selectflow.data import (
    AutoShares,
    Manifest,
    PoolStream,
    make_digits,
    read_batches,
    read_split,
    write_manifest,
    write_split,
)
from selectflow.models.vision import evaluate, image_losses, mlp
from selectflow.run.task import PoolSource

POOL, KEEP, LR = 128, 32, 3e-3
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
ROOT = Path(tempfile.gettempdir(), "selectflow-sources")
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
    options = {"horizon": 0, "keep": KEEP, "seed": seed} | options
    selector = Selector(model, optimizer, image_losses, target, **options)
    pools = PoolStream(sources, pool=POOL, seed=seed, shares=shares)
    random = torch.Generator().manual_seed(seed)
    found, kept, began = [], Counter(), time.perf_counter()
    given = PoolSource((change(*each) for each in enumerate(pools)), torch.device("cpu"))
    for pool in islice(given, steps):
        batch = selector.select(pool, given.upcoming())
        pools.follow(selector.last)
        if at_random:
            batch = take(pool, torch.randperm(POOL, generator=random)[:KEEP])
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


# --- studies --------------------------------------------------------------------------------------


def show(name: str, results: list[Result], source: str, plain: list[Result] | None = None) -> None:
    """Print means over the seeds, the spread of the loss, and its difference from `plain` runs."""
    mean, losses = statistics.fmean, [each.loss for each in results]
    gain = "" if plain is None else paired(losses, [each.loss for each in plain])
    print(
        f"| {name} | {mean(losses):.3f} ± {statistics.stdev(losses):.3f} | {gain} | "
        f"{mean(each.accuracy for each in results):.3f} | "
        f"{mean(each.kept_wrong for each in results):.0%} | "
        f"{mean(each.shares[-1][source] for each in results):.0%} | "
        f"{mean(each.seconds for each in results):.1f} |",
        flush=True,
    )


def paired(losses: list[float], plain: list[float]) -> str:
    """Mean difference and its standard error, seed by seed."""
    found = [ours - theirs for ours, theirs in zip(losses, plain, strict=True)]
    return f"{statistics.fmean(found):+.3f} ± {statistics.stdev(found) / len(found) ** 0.5:.3f}"


def head(title: str, source: str) -> None:
    print(f"\n### {title}\n")
    print(
        f"| | test loss | against the first, paired | accuracy | wrong among the kept | "
        f"{source} at the end | s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)


def compare(title: str, sources: Sources, source: str, cells: Cells, args: Any) -> None:
    """A table of `cells`, name -> arguments of `train`, for all seeds."""
    head(title, source)
    first: list[Result] | None = None
    for name, options in cells.items():
        results = [
            train(sources(seed), seed=seed, steps=args.steps, **options)
            for seed in range(args.seeds)
        ]
        show(name, results, source, first)
        first = first or results


def study_shares(args: Any) -> None:
    best = next(iter(noisy(NOISES, 0)))
    oracle = {name: 1.0 if name == best else 1e-9 for name in noisy(NOISES, 0)}
    adaptive = {"horizon": AutoHorizon(off=False), "lr": "auto"}
    cells: Cells = {
        "H = 0, fixed shares": {"shares": "size"},
        "H = 0, live shares": {"shares": "auto"},
        "adaptive, fixed shares": {"shares": "size"} | adaptive,
        "adaptive, live shares": {"shares": "auto"} | adaptive,
        "kept at random, fixed shares": {"shares": "size", "strategy": "uniform"},
        "kept at random, live shares by H = 0": {"shares": "auto", "at_random": True},
        "kept at random, shares by losses": {"shares": "loss", "at_random": True},
        "H = 0, shares by losses": {"shares": "loss"},
        "H = 0, the cleanest alone": {"shares": oracle},
        "kept at random, the cleanest alone": {"shares": oracle, "strategy": "uniform"},
    }
    compare("Five sources of rising noise", lambda seed: noisy(NOISES, seed), best, cells, args)


def study_alike(args: Any) -> None:
    cells: Cells = {"fixed": {"shares": "size"}, "live": {"shares": "auto"}}
    alike = (0.4,) * 5
    compare("Sources that do not differ", lambda s: noisy(alike, s), "part 0", cells, args)


def study_classes(args: Any) -> None:
    cells: Cells = {
        "kept at random, fixed": {"shares": "size", "strategy": "uniform"},
        "H = 0, fixed": {"shares": "size"},
        "H = 0, live": {"shares": "auto"},
        "H = 0, alike": {"shares": {f"class {label}": 1 for label in range(10)}},
    }
    compare("A source for each class, five of them rare", by_class, "class 0", cells, args)


def study_rules(args: Any) -> None:
    cells: Cells = {"fixed": {"shares": "size"}}
    for strength, prior in ((4, 128), (8, 256), (12, 512), (16, 512)):
        settings = {"strength": strength, "prior": prior}
        cells[f"{settings}"] = {"shares": AutoShares(**settings)}
    for memory in (50, 200):
        cells[f"memory {memory}"] = {"shares": AutoShares(memory=memory)}
    cells["delay 0"] = {"shares": AutoShares(delay=0)}
    best = next(iter(noisy(NOISES, 0)))
    for title, noises, source in (
        ("Settings, rising noise", NOISES, best),
        ("Settings, sources alike", (0.4,) * 5, "part 0"),
    ):
        compare(title, lambda seed, noises=noises: noisy(noises, seed), source, cells, args)


def study_turning(args: Any) -> None:
    """The cleanest source has random labels from a third of the steps to two thirds."""
    begin, end = args.steps, 2 * args.steps
    best = next(iter(noisy(NOISES, 0)))
    generator = torch.Generator().manual_seed(0)

    def turned(step: int, pool: Batch) -> Batch:
        if not begin <= step < end:
            return pool
        bad = torch.tensor([name == best for name in pool["source"]])
        random = torch.randint(10, pool["label"].shape, generator=generator)
        return pool | {"label": torch.where(bad, random, pool["label"])}

    print(f"\n### The cleanest of five turns bad at step {begin} and recovers at step {end}\n")
    for seed in range(args.seeds):
        result = train(noisy(NOISES, seed), "auto", seed, 3 * args.steps, turned)
        shares = [each[best] for each in result.shares]
        start, high = 1 / len(NOISES), shares[begin - 1]
        left = next((i for i, x in enumerate(shares[begin:end]) if x < start), None)
        found = next((i for i, x in enumerate(shares[end:]) if x > start), None)
        print(
            f"seed {seed}: share {start:.0%} at first, {high:.0%} at step {begin}; below "
            f"{start:.0%} after {left} steps, {min(shares[begin:end]):.0%} at the least; above it "
            f"again after {found} steps, {shares[-1]:.0%} at the end",
            flush=True,
        )


def study_throughput(args: Any) -> None:
    print("\n### Samples a second of the stream, pools of 64; 200 sources of 240 each, or one\n")
    make_digits(ROOT / "digits-0.0-0")
    samples = list(read_split(ROOT / "digits-0.0-0", "train"))
    parts = [np.random.default_rng(i).permutation(len(samples))[:240] for i in range(200)]
    one = {"all": write(ROOT / "one", samples)}
    many = {
        f"part {i:03d}": write(ROOT / f"of-200-240-{i}", [samples[place] for place in part])
        for i, part in enumerate(parts)
    }
    for memory_gib, place in ((1.0, "in memory"), (0.0, "read from shards")):
        for name, sources, shares in (
            ("1 source", one, None), ("200, fixed", many, "size"), ("200, live", many, "auto"),
        ):  # fmt: skip
            pools = PoolStream(sources, pool=64, seed=0, shares=shares, memory_gib=memory_gib)
            rates = []
            for _ in range(10):  # the best of them: other work on the machine only slows one down
                began = time.perf_counter()
                for pool in islice(pools, 80):
                    pools.follow(Kept(pool, torch.arange(16), torch.zeros(64)))
                rates.append(80 * 64 / (time.perf_counter() - began))
            print(f"{place}, {name}: {max(rates):,.0f}", flush=True)


@dataclass
class Kept:
    """A selection that keeps the first ones."""

    pool: Batch
    indices: torch.Tensor
    scores: torch.Tensor
    losses: torch.Tensor | None = None
    is_ranked: bool = True


Sources = Callable[[int], Mapping[str, Path]]
Cells = dict[str, dict[str, Any]]
STUDIES = {
    name.removeprefix("study_"): study
    for name, study in list(globals().items())
    if name.startswith("study_")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    for name in args.studies or STUDIES:
        STUDIES[name](args)


if __name__ == "__main__":
    main()
