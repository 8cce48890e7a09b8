"""What live shares bring: images from five sources of 0, 20, 40, 60 and 80% wrong labels.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources.py [STUDY ...] [--seeds 5] [--steps 400]

Digits are learnt by an MLP (64-128-128-10), keeping 32 of 128, by AdamW at 3e-3. With --seconds S
each run takes as many seconds of the processor in place of steps; --rows keeps the rows of a table
whose names have one of these texts. Studies, all of them by default:

    shares      fixed, live, of losses, searched, the oracle's; selecting or not
    photographs the same with tiles of 8 x 8 pixels of ten photographs, told apart by an MLP
    alike       five sources that do not differ, of 40% wrong labels each
    classes     a source for each class, the first ones rare
    turning     the cleanest source has random labels from --steps on, for as many steps
    rules       the exponent, the memory and the drift of live shares
    throughput  samples a second of a stream of 1 and of 200 sources

A source has a fifth of the samples, its own, unless the study says otherwise. Searched shares are
the best of 12 drawn at random, by the mean target loss on two other seeds, of the same way to keep;
the seconds of the search are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from sources_data import DIGITS, NOISES, ROOT, TILED, Batch, Sources, Task, by_class, write, wrong

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import take
from selectflow.data import AutoShares, PoolStream, read_split
from selectflow.models.vision import evaluate, image_losses
from selectflow.run.task import PoolSource

POOL, KEEP, LR = 128, 32, 3e-3
NUM_SEARCHED, OTHER_SEEDS = 12, (100, 101)  # shares that a search tries, and on which seeds


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """Of a run: it ends after so many steps, or seconds of the processor."""

    steps: int | None = None
    seconds: float = float("inf")


@dataclass
class Result:
    """Losses and accuracy, wrong labels among the kept, and the shares after each step."""

    loss: float
    accuracy: float
    target_loss: float
    kept_wrong: float
    shares: list[dict[str, float]]
    seconds: float


def train(
    task: Task,
    sources: Sources,
    shares: Any,
    seed: int,
    length: Length,
    change: Callable[[int, Batch], Batch] = lambda step, pool: pool,
    at_random: bool = False,
    **options: Any,
) -> Result:
    """Train on what is kept; `at_random`: on as many of the pool at random, scored all the same."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    target, test = task.held_out()
    options = {"horizon": 0, "keep": KEEP, "seed": seed} | options
    selector = Selector(model, optimizer, image_losses, target, **options)
    pools = PoolStream(sources, pool=POOL, seed=seed, shares=shares)
    random = torch.Generator().manual_seed(seed)
    found, kept, bad = [], Counter(), wrong(tuple(sources.items()))
    given = PoolSource((change(*each) for each in enumerate(pools)), torch.device("cpu"))
    began = time.process_time()
    for step in count():
        seconds = time.process_time() - began
        if step == length.steps or seconds >= length.seconds:
            break
        pool = next(given)
        batch = selector.select(pool, given.upcoming())
        pools.follow(selector.last)
        if at_random:
            batch = take(pool, torch.randperm(POOL, generator=random)[:KEEP])
        kept.update(key in bad for key in batch["key"])
        optimizer.zero_grad()
        image_losses(model, batch).mean().backward()
        optimizer.step()
        found.append(pools.shares)
    model.eval()
    with torch.no_grad():
        of_target, means = evaluate(model, target), evaluate(model, test)
    return Result(
        means["loss"], means["accuracy"], of_target["loss"], kept[True] / kept.total(), found,
        seconds,
    )  # fmt: skip


def searched(task: Task, length: Length, **options: Any) -> dict[str, float]:
    """The fixed shares with the lowest target loss on other seeds, of some drawn at random."""
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(NOISES)), NUM_SEARCHED)
    sources = {seed: task.noisy(NOISES, seed) for seed in OTHER_SEEDS}
    names = list(sources[OTHER_SEEDS[0]])
    tried = [dict(zip(names, np.maximum(shares, 1e-9).tolist(), strict=True)) for shares in drawn]
    best = min(
        tried,
        key=lambda shares: statistics.fmean(
            train(task, sources[seed], shares, seed, length, **options).target_loss
            for seed in OTHER_SEEDS
        ),
    )
    told = ", ".join(f"{name}: {share:.0%}" for name, share in best.items())
    print(f"found by search, {options or 'H = 0'}: {told}", flush=True)
    return best


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
        f"{mean(len(each.shares) for each in results):.0f} | "
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
        f"{source} at the end | steps | s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)


def compare(
    title: str, task: Task, sources: Callable[[int], Sources], source: str, cells: Cells, args: Any
) -> None:
    """A table of `cells`, name -> arguments of `train`, for all seeds."""
    head(title, source)
    first: list[Result] | None = None
    for name, options in cells.items():
        if not any(text in name for text in args.rows):
            continue
        if callable(options["shares"]):
            options |= {"shares": options["shares"]()}
        results = [
            train(task, sources(seed), seed=seed, length=args.length, **options)
            for seed in range(args.seeds)
        ]
        show(name, results, source, first)
        first = first or results


def compare_shares(title: str, task: Task, args: Any) -> None:
    best, *others = task.noisy(NOISES, 0)
    oracle = {best: 1.0} | dict.fromkeys(others, 1e-9)
    adaptive = {"horizon": AutoHorizon(off=False), "lr": "auto"}
    random = {"strategy": "uniform"}
    cells: Cells = {
        "H = 0, fixed shares": {"shares": "size"},
        "H = 0, live shares": {"shares": "auto"},
        "H = 0, shares searched": {"shares": partial(searched, task, args.length)},
        "adaptive, fixed shares": {"shares": "size"} | adaptive,
        "adaptive, live shares": {"shares": "auto"} | adaptive,
        "kept at random, fixed shares": {"shares": "size"} | random,
        "kept at random, live shares by H = 0": {"shares": "auto", "at_random": True},
        "kept at random, shares searched": {
            "shares": partial(searched, task, args.length, **random),
            **random,
        },
        "kept at random, shares by losses": {"shares": "loss", "at_random": True},
        "H = 0, shares by losses": {"shares": "loss"},
        "H = 0, the cleanest alone": {"shares": oracle},
        "kept at random, the cleanest alone": {"shares": oracle} | random,
    }
    compare(title, task, lambda seed: task.noisy(NOISES, seed), best, cells, args)


def study_shares(args: Any) -> None:
    compare_shares("Digits, five sources of rising noise", DIGITS, args)


def study_photographs(args: Any) -> None:
    compare_shares("Photographs, five sources of rising noise", TILED, args)


def study_alike(args: Any) -> None:
    cells: Cells = {"fixed": {"shares": "size"}, "live": {"shares": "auto"}}
    alike = (0.4,) * 5
    title = "Sources that do not differ"
    compare(title, DIGITS, lambda seed: DIGITS.noisy(alike, seed), "part 0", cells, args)


def study_classes(args: Any) -> None:
    cells: Cells = {
        "kept at random, fixed": {"shares": "size", "strategy": "uniform"},
        "H = 0, fixed": {"shares": "size"},
        "H = 0, live": {"shares": "auto"},
        "H = 0, alike": {"shares": {f"class {label}": 1 for label in range(10)}},
    }
    title = "A source for each class, five of them rare"
    compare(title, DIGITS, lambda seed: by_class(), "class 0", cells, args)


def study_rules(args: Any) -> None:
    cells: Cells = {"fixed": {"shares": "size"}}
    for strength, prior in ((4, 128), (8, 256), (12, 512), (16, 512)):
        settings = {"strength": strength, "prior": prior}
        cells[f"{settings}"] = {"shares": AutoShares(**settings)}
    for memory in (50, 200):
        cells[f"memory {memory}"] = {"shares": AutoShares(memory=memory)}
    cells["delay 0"] = {"shares": AutoShares(delay=0)}
    best = next(iter(DIGITS.noisy(NOISES, 0)))
    for title, noises, source in (
        ("Settings, rising noise", NOISES, best),
        ("Settings, sources alike", (0.4,) * 5, "part 0"),
    ):
        sources = partial(DIGITS.noisy, noises)
        compare(title, DIGITS, sources, source, cells, args)


def study_turning(args: Any) -> None:
    """The cleanest source has random labels from a third of the steps to two thirds."""
    begin, end = args.steps, 2 * args.steps
    best = next(iter(DIGITS.noisy(NOISES, 0)))
    generator = torch.Generator().manual_seed(0)

    def turned(step: int, pool: Batch) -> Batch:
        if not begin <= step < end:
            return pool
        bad = torch.tensor([name == best for name in pool["source"]])
        random = torch.randint(10, pool["label"].shape, generator=generator)
        return pool | {"label": torch.where(bad, random, pool["label"])}

    print(f"\n### The cleanest of five turns bad at step {begin} and recovers at step {end}\n")
    for seed in range(args.seeds):
        length = Length(3 * args.steps)
        result = train(DIGITS, DIGITS.noisy(NOISES, seed), "auto", seed, length, turned)
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
    samples = list(read_split(DIGITS.whole(0.0, 0), "train"))
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
    """A selection, made up; None: nothing was scored."""

    pool: Batch
    indices: torch.Tensor
    scores: torch.Tensor | None
    losses: torch.Tensor | None = None
    is_ranked: bool = True


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
    parser.add_argument("--seconds", type=float, help="of the processor, in place of steps")
    parser.add_argument("--rows", nargs="+", default=[""], help="texts in the names of rows")
    args = parser.parse_args()
    args.length = Length(seconds=args.seconds) if args.seconds else Length(args.steps)
    for name in args.studies or STUDIES:
        STUDIES[name](args)


if __name__ == "__main__":
    main()
