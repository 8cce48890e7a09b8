"""What live shares bring on text: adapters and fine-tuning, a stream of seven origins.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources_text.py [lora finetune] [--seeds 5]

The tasks are those of configs/text_lora_*.yaml and text_finetune_*.yaml, shortened as TASKS says.
All rows take as many steps on as many blocks, and two of them go on until they have taken the
seconds of selection with live shares: seconds of the processor, of reading, scoring and training.
Selection from pools of n costs what it takes over plain steps on k, the blocks that it keeps, and
on n. Finished runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from results_tasks import CONFIGS, Options, from_base, oracle, trainer_module
from sources import Kept, paired

from selectflow.core.batches import num_examples, take
from selectflow.run.build import (
    build_losses,
    build_optimizer,
    build_schedule,
    build_selector,
    update,
)
from selectflow.run.config import load
from selectflow.run.task import PoolSource
from selectflow.run.task import Task as Built

CPU = torch.device("cpu")
TASKS: dict[str, tuple[str, Options]] = {
    # of some seeds there are no more than 3,433 blocks of prose, a fifth of the mixture
    "lora": ("text_lora", {"steps": 100, "data.text.num_train": 17000}),
    "finetune": (
        "text_finetune",
        {"steps": 80, "data.text.block": 96, "select.score_view": 48},
    ),
}
UNIFORM, FIXED, LIVE = "uniform", "H = 0, fixed shares", "H = 0, live shares"
ALONE, WHOLE = "code alone", "plain steps on n"


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        config: "online", with pools of n, or "uniform", with pools of the k that are trained on.
        options: what differs from it.
        every: k of each pool at random are trained on, and one pool in so many is scored for the
            shares; None: every pool is, and what the selector keeps is trained on.
        goes_on: whether it goes on for the seconds of live shares.
        is_timed: it is there for its seconds alone, of a few steps.
    """

    config: str
    options: Options = field(default_factory=dict)
    every: int | None = None
    goes_on: bool = False
    is_timed: bool = False


SHARES: Options = {"data.by": "json.origin", "data.shares": "auto"}
ROWS = {
    LIVE: Row("online", SHARES),
    UNIFORM: Row("uniform", goes_on=True),
    FIXED: Row("online"),
    "kept at random, live shares by H = 0": Row("online", SHARES, every=1),
    "the same by every 4th pool": Row("online", SHARES, every=4, goes_on=True),
    ALONE: Row("uniform"),
    WHOLE: Row("uniform", is_timed=True),
}
TIMED_STEPS = 10
Result = dict[str, Any]


# --- one run --------------------------------------------------------------------------------------


def configured(task: str, name: str, seed: int, folder: Path) -> Any:
    """The configuration of a row."""
    (prefix, shorter), row = TASKS[task], ROWS[name]
    path = CONFIGS / f"{prefix}_{row.config}.yaml"
    given = from_base(f"{prefix}_base")(folder, seed) | {"seed": seed} | shorter | row.options
    if row.is_timed:
        n = load(CONFIGS / f"{prefix}_online.yaml").data.pool
        given |= {"data.pool": n, "select.keep": n, "steps": TIMED_STEPS}
    if name == ALONE:
        given |= oracle(path.stem, [f"{key}={value}" for key, value in shorter.items()])
    return load(path, [f"{key}={value}" for key, value in given.items()])


class Training:
    """A run, step by step, as the program in trainers/ takes them."""

    def __init__(self, config: Any, every: int | None) -> None:
        self.config, self.every = config, every
        self.task: Built = trainer_module("language")["build_task"](config)
        model = self.task.model
        self.optimizer = build_optimizer(model, config.optimizer)
        self.schedule = build_schedule(self.optimizer, config.schedule, config.steps)
        self.selector = build_selector(
            config, self.task, self.optimizer, self.schedule, self.task.target, {}
        )
        self.losses = build_losses(model, self.task.loss_fn, config.train, CPU)
        self.pools = PoolSource(self.task.pools, CPU)
        self.random = torch.Generator().manual_seed(config.seed)
        self.kept: Counter[bool] = Counter()  # whether code
        self.num_steps, self.seconds = 0, 0.0
        model.train()

    def step(self) -> None:
        began = time.process_time()
        batch = self.selected(next(self.pools))
        config = self.config.optimizer
        update(
            self.task.model, self.losses, batch, self.optimizer, self.num_steps,
            config.max_grad_norm,
        )  # fmt: skip
        self.schedule.step()
        self.num_steps += 1
        self.seconds += time.process_time() - began
        self.kept.update(key in self.task.kinds["code"] for key in batch["key"])

    def selected(self, pool: Any) -> Any:
        """What is trained on; the shares of the stream follow what selection would keep."""
        if self.every is None or self.num_steps % self.every == 0:
            batch = self.selector.select(pool, self.pools.upcoming())
            self.pools.follow(self.selector.last)
        else:
            self.pools.follow(Kept(pool, torch.arange(0), None))
        if self.every is None:
            return batch
        drawn = torch.randperm(num_examples(pool), generator=self.random)
        return take(pool, drawn[: self.config.select.keep])

    def test_loss(self) -> float:
        self.task.model.eval()
        with torch.no_grad():
            loss = self.task.evaluate(self.task.model, self.task.test)["loss"]
        self.task.model.train()
        return loss


def run(task: str, name: str, seed: int, folder: Path, seconds: float) -> Result:
    """A row of a seed; where it goes on, for so many seconds of the processor in all."""
    row, config = ROWS[name], configured(task, name, seed, folder)
    training = Training(config, row.every)
    while training.num_steps < config.steps:
        training.step()
    shares = getattr(training.task.pools, "shares", None) or {}
    found: Result = {
        "loss": training.test_loss(),
        "s/step": training.seconds / training.num_steps,
        "seconds": training.seconds,
        "code": training.kept[True] / training.kept.total(),
        "share": shares.get("code"),
    }
    if row.goes_on:
        while training.seconds < seconds:
            training.step()
        found |= {"late": training.test_loss(), "late steps": training.num_steps}
    return found


# --- tables ---------------------------------------------------------------------------------------


def report(task: str, found: dict[str, list[Result]]) -> None:
    """Means over the seeds, and differences paired by seed."""
    steps, live = TASKS[task][1]["steps"], found[LIVE]
    first, last = (fmean(losses(found[name])) for name in (UNIFORM, ALONE))
    print(f"\n### {task}, {steps} steps, {len(live)} seeds\n")
    print(
        "| | test loss | against uniform, paired | against fixed shares, paired | of the way to "
        "code alone | code trained on | share of code at the end | s a step | over a plain step "
        "on k | on n |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, results in found.items():
        if ROWS[name].is_timed:
            continue
        shares = [each["share"] for each in results if each["share"] is not None]
        print(
            f"| {name} | {spread(losses(results))} | {against(results, found[UNIFORM])} | "
            f"{against(results, found[FIXED])} | "
            f"{(first - fmean(losses(results))) / (first - last):.0%} | "
            f"{mean(results, 'code'):.0%} | {f'{fmean(shares):.0%}' if shares else ''} | "
            f"{mean(results, 's/step'):.2f} | "
            + " | ".join(f"{over(results, found[plain]):.2f}" for plain in (UNIFORM, WHOLE))
            + " |"
        )
    print(f"\nin the {mean(live, 'seconds'):.0f} s of live shares:\n")
    for name, results in found.items():
        if ROWS[name].goes_on:
            late, of_live = losses(results, "late"), losses(live)
            print(
                f"| {name} | {spread(late)} | live shares against it: {paired(of_live, late)} | "
                f"{mean(results, 'late steps'):.0f} steps |"
            )


def mean(results: list[Result], key: str) -> float:
    return fmean(each[key] for each in results)


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}"


def over(results: list[Result], plain: list[Result]) -> float:
    """Seconds of a step in plain steps, each seed in its own: the machine's speed drifts."""
    return fmean(
        ours["s/step"] / theirs["s/step"] for ours, theirs in zip(results, plain, strict=True)
    )


def losses(results: list[Result], key: str = "loss") -> list[float]:
    return [each[key] for each in results]


def against(results: list[Result], others: list[Result]) -> str:
    """The paired difference; nothing against itself."""
    return "" if results is others else paired(losses(results), losses(others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/sources_text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    known = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
    for task in args.tasks or TASKS:
        found: dict[str, list[Result]] = {name: [] for name in ROWS}
        for seed in range(args.seeds):
            for name in ROWS:
                place = f"{task} {TASKS[task][1]}/{name}/{seed}"
                if place not in known:
                    seconds = found[LIVE][seed]["seconds"] if found[LIVE][seed:] else 0.0
                    known[place] = run(task, name, seed, args.out, seconds)
                    with path.open("a") as file:
                        file.write(json.dumps([place, known[place]]) + "\n")
                    print(f"{place}: {known[place]}", flush=True)
                found[name].append(known[place])
        report(task, found)


if __name__ == "__main__":
    main()
