"""A small model that scores several pools in one pass, or a step ahead on another core.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer_ahead.py [loss|cost] [finetune digits 14M]

Neither is part of the package: here a selector of the small model alone chooses, and the loop
steps both. "Four at once": four pools are scored in one pass at one state of the small model, so
that the fourth is chosen by a state three steps old. "One step ahead": a pool is scored before the
step on the pool before it; "by a thread" while the large model takes that step. They stand beside
scores of every pool by a fresh look-ahead, and by one of every fourth step (`interval=4`).

`loss` prints the test loss after the steps of `scorer.py`, whose models, data and rates these are;
finished runs are kept in --out and not repeated. `cost` prints seconds of a step over those of a
plain step on what is kept, of the processor and of the clock: medians over rounds of four steps
that each way takes in turn, with the least of each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from equal_time import Setting, mean_loss, take_step
from finished import Finished
from scorer import RATE, STEPS
from scorer_cost import SHAPES, loss_fn
from scorer_tasks import IMAGES, TENTH, Made, text
from step_cost import gpt2
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from selectflow import Selector
from selectflow.core.batches import Batch, join, num_examples, take
from selectflow.report.compare import paired

NUM = 4  # pools in one pass
BUSY = Lock()  # held by a thread that chooses
Train = Callable[[Batch], None]
Chosen = Iterator[Batch]


# --- ways to choose: each trains the small model on a batch before the large one has it ----------


def each(selector: Selector, pools: Iterator[Batch], train: Train) -> Chosen:
    for pool in pools:
        kept = selector.select(pool)
        train(kept)
        yield kept


def at_once(selector: Selector, pools: Iterator[Batch], train: Train) -> Chosen:
    while several := list(islice(pools, NUM)):
        selector.select(join(several))
        scores = selector.last.scores.split([num_examples(pool) for pool in several])
        for pool, own in zip(several, scores, strict=True):
            kept = take(pool, own.argsort(descending=True)[: selector.options.keep])
            train(kept)
            yield kept


def ahead(
    selector: Selector, pools: Iterator[Batch], train: Train, *, by_thread: bool = False
) -> Chosen:
    def go_on(kept: Batch, pool: Batch) -> Batch:
        with BUSY:
            following = selector.select(pool)
            train(kept)
        return following

    kept = selector.select(next(pools))
    with ThreadPoolExecutor(1) as thread:
        for pool in pools:
            if by_thread:
                following = thread.submit(go_on, kept, pool)
                yield kept
                kept = following.result()
            else:
                following = go_on(kept, pool)
                yield kept
                kept = following


def by_thread(*given: Any) -> Chosen:
    return ahead(*given, by_thread=True)


WAYS: dict[str, tuple[Callable[..., Chosen], dict[str, Any]]] = {
    "every step": (each, {}),
    "interval=4": (each, {"interval": NUM}),
    "four at once": (at_once, {}),
    "one step ahead": (ahead, {}),
    "one step ahead, by a thread": (by_thread, {}),
}


# --- what is trained ------------------------------------------------------------------------------


def shape(_method: str, seed: int) -> Made:
    """The 14M shape of `scorer_cost.py`, on random tokens."""
    of = SHAPES["14M"]
    torch.manual_seed(seed)
    model, _, batch, lr = gpt2(of.vocabulary, of.tokens, **of.model)
    small, *_ = gpt2(of.vocabulary, of.tokens, **of.scorer)
    pools = [batch(4 * of.keep) for _ in range(NUM)]
    setting = Setting(
        model, torch.optim.AdamW(model.parameters(), lr), loss_fn,
        [batch(of.keep) for _ in range(4)], lambda _: cycle(pools), [], of.keep, None, 0,
    )  # fmt: skip
    return setting, small


def made(task: str, seed: int, folder: Path) -> Made:
    makers = IMAGES | {"14M": shape}
    return makers[task](TENTH, seed) if task in makers else text(task, TENTH, seed, folder)


def warmed(optimizer: torch.optim.Optimizer, setting: Setting) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, setting.warmup)))


def choosing(task: str, setting: Setting, small: nn.Module, way: str, seed: int) -> Chosen:
    """What a way keeps, step by step."""
    rate = RATE.get(task, 2) * setting.optimizer.defaults["lr"]
    optimizer = torch.optim.AdamW(small.parameters(), rate)
    schedule = warmed(optimizer, setting)
    own = setting._replace(model=small, optimizer=optimizer)
    choose, options = WAYS[way]
    selector = Selector(
        small, optimizer, setting.losses, setting.target, setting.keep, 0, derivative="central",
        lr_scheduler=schedule, max_grad_norm=setting.clip, seed=seed,
        chunk_size=SHAPES[task].chunk if task in SHAPES else None, **options,
    )  # fmt: skip
    return choose(selector, setting.pools(lambda: 0.0), lambda kept: take_step(own, schedule, kept))


# --- loss and cost --------------------------------------------------------------------------------


def loss(task: str, way: str, seed: int, folder: Path) -> float:
    setting, small = made(task, seed, folder)
    schedule = warmed(setting.optimizer, setting)
    for kept in islice(choosing(task, setting, small, way, seed), STEPS[task]):
        take_step(setting, schedule, kept)
    return mean_loss(setting.losses, setting.model, setting.test)


def losses(task: str, ways: list[str], seeds: int, folder: Path) -> None:
    known = Finished(folder / "ahead.jsonl")
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for way in ways:
            if way.endswith("by a thread"):
                continue  # which changes no number
            if (place := f"{task}/{way}/{seed}") not in known:
                known[place] = loss(task, way, seed, folder)
            found.setdefault(way, []).append(known[place])
    print(f"\n{task}, {STEPS[task]} steps, {seeds} seeds: test loss")
    for way, mine in found.items():
        line = f"  {way:<28} {statistics.mean(mine):.3f} ± {statistics.pstdev(mine):.3f}"
        differences = [a - b for a, b in zip(mine, found[ways[0]], strict=True)]
        if test := paired(differences):
            line += f"; minus {ways[0]} {statistics.mean(differences):+.3f} (p {test.p:.3f})"
        print(line, flush=True)


def cost(task: str, ways: list[str], rounds: int, folder: Path) -> None:
    setting, small = made(task, 0, folder)  # all train the same models, in turn
    schedule = warmed(setting.optimizer, setting)
    pools = setting.pools(lambda: 0.0)
    plain = (take(pool, torch.arange(setting.keep)) for pool in pools)
    streams: dict[str, Chosen] = {"plain": plain}
    streams |= {way: choosing(task, setting, small, way, 0) for way in ways}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in streams}
    for _ in range(rounds + 1):
        for way, stream in streams.items():
            began = time.process_time(), time.perf_counter()
            for _ in range(NUM):
                take_step(setting, schedule, next(stream))
            with BUSY:  # what the thread does longer is waited for
                pass
            ended = time.process_time(), time.perf_counter()
            found[way].append(tuple((b - a) / NUM for a, b in zip(began, ended, strict=True)))
    print(f"\n{task}: s a step, over a plain step on {setting.keep}; {rounds} rounds")
    for way, rows in found.items():
        line = f"  {way:<28}"
        for at, kind in enumerate(("processor", "clock")):
            mine, base = ([row[at] for row in each[1:]] for each in (rows, found["plain"]))
            ratios = [a / b for a, b in zip(mine, base, strict=True)]
            line += f"  {kind} {statistics.median(mine):.3f} s, {statistics.median(ratios):.2f}"
            line += f" (of the least {min(mine) / min(base):.2f})"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("loss", "cost"))
    parser.add_argument("tasks", nargs="+", choices=("finetune", "digits", "14M"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/scorer"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks:
        if args.what == "loss":
            losses(task, args.ways, args.seeds, args.out)
        else:
            cost(task, args.ways, args.rounds, args.out)


if __name__ == "__main__":
    main()
