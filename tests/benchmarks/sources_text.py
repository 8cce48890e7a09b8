"""What live shares bring on text: adapters and fine-tuning, a stream of seven origins.

    OMP_NUM_THREADS=1 python tests/benchmarks/sources_text.py [lora finetune] [--seeds 5]

The tasks are those of configs/text_lora_*.yaml and text_finetune_*.yaml, shortened as TASKS says.
All rows take as many steps on as many blocks, but those that say "as long" go on until they have
taken the seconds of selection with live shares: of the processor, to read, score and train. Costs
of a step of selection from pools of n are told in plain steps on the k blocks that it keeps, and
on n. Finished runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from finished import Finished
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


@dataclass(frozen=True)
class Task:
    """Configurations with this prefix, what shortens them, and what rows with live shares add."""

    prefix: str
    shorter: Options
    live: Options = field(default_factory=dict)


CPU = torch.device("cpu")
TASKS = {
    # of some seeds there are no more than 3,433 blocks of prose, a fifth of the mixture
    "lora": Task("text_lora", {"steps": 100, "data.text.num_train": 17000}),
    # shares that wait for 24 pools would come late: nothing here draws ahead
    "finetune": Task(
        "text_finetune",
        {"steps": 60, "data.text.block": 96, "select.score_view": 48},
        {"data.live_shares.delay": 0},
    ),
}
UNIFORM, FIXED, LIVE = "uniform", "H = 0, fixed shares", "H = 0, live shares"
ALONE, WHOLE = "code alone", "plain steps on n"


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        config: "online", with pools of n, or "uniform", with pools of the k that are trained on.
        live: whether the shares of origins follow what is kept.
        every: k of each pool at random are trained on, and one pool in so many is scored for the
            shares; None: what the selector keeps is trained on.
        score_every: steps of which one is selected for.
        steps: how many, or "as long" as the run with live shares of the seed takes; None: as many
            as of the task.
    """

    config: str
    live: bool = False
    every: int | None = None
    score_every: int = 1
    steps: int | Literal["as long"] | None = None


ROWS = {
    LIVE: Row("online", live=True),
    FIXED: Row("online"),
    ALONE: Row("uniform"),
    UNIFORM: Row("uniform"),
    WHOLE: Row("uniform", steps=5),
    "kept at random, live shares by H = 0": Row("online", live=True, every=1),
    "kept at random, live shares by every 4th pool": Row("online", live=True, every=4),
    "H = 0 at every 4th step, live shares": Row("online", live=True, score_every=4),
    "uniform, as long": Row("uniform", steps="as long"),
    "kept at random, live shares by every 4th pool, as long": Row(
        "online", live=True, every=4, steps="as long"
    ),
}
Result = dict[str, Any]


# --- one run --------------------------------------------------------------------------------------


def configured(task: str, name: str, seed: int, folder: Path) -> Any:
    """The configuration of a row."""
    prefix, shorter, row = TASKS[task].prefix, TASKS[task].shorter, ROWS[name]
    path = CONFIGS / f"{prefix}_{row.config}.yaml"
    given = from_base(f"{prefix}_base")(folder, seed) | {"seed": seed} | shorter
    if row.live:
        given |= {"data.by": "json.origin", "data.shares": "auto"} | TASKS[task].live
    if row.score_every > 1:
        given |= {"select.score_every": row.score_every}
    if name == WHOLE:
        n = load(CONFIGS / f"{prefix}_online.yaml").data.pool
        given |= {"data.pool": n, "select.keep": n}
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
    """A row of a seed; if it is to go on "as long", for so many seconds of the processor."""
    row, config = ROWS[name], configured(task, name, seed, folder)
    steps = config.steps if row.steps is None else row.steps
    training = Training(config, row.every)
    while training.seconds < seconds if steps == "as long" else training.num_steps < steps:
        training.step()
    return {
        "loss": training.test_loss(),
        "steps": training.num_steps,
        "seconds": training.seconds,
        "code": training.kept[True] / training.kept.total(),
        "share": (getattr(training.task.pools, "shares", None) or {}).get("code"),
    }


# --- tables ---------------------------------------------------------------------------------------


def report(task: str, found: dict[str, dict[int, Result]]) -> None:
    """Means over the seeds, and differences paired by seed."""
    print(f"\n### {task}, {TASKS[task].shorter['steps']} steps\n")
    print(
        "| | test loss | against uniform, paired | against fixed shares | against live shares | of "
        "the way to code alone | code trained on | share of code at the end | steps | s a step | "
        "over a plain step on k | on n | seeds |"
    )
    print("| --- |" + " --- |" * 12)
    for name, results in found.items():
        shares = [each["share"] for each in results.values() if each["share"] is not None]
        cells = ["", "", "", "", "", "", ""] if name == WHOLE else [
            spread([each["loss"] for each in results.values()]),
            *(against(results, found.get(other, {})) for other in (UNIFORM, FIXED, LIVE)),
            way(results, found.get(UNIFORM, {}), found.get(ALONE, {})),
            f"{fmean(each['code'] for each in results.values()):.0%}",
            f"{fmean(shares):.0%}" if shares else "",
        ]  # fmt: skip
        cells += [
            f"{fmean(each['steps'] for each in results.values()):.0f}",
            f"{fmean(a_step(each) for each in results.values()):.2f}",
            *(over(results, found.get(plain, {})) for plain in (UNIFORM, WHOLE)),
            str(len(results)),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{fmean(values):.3f} ± {stdev(values) if values[1:] else 0:.3f}"


def way(results: dict[int, Result], first: dict[int, Result], last: dict[int, Result]) -> str:
    """How far from the mean loss of the first to that of the last, over the same seeds."""
    if set(results) - set(first) or set(results) - set(last):
        return ""
    start, end, mine = (
        fmean(each[seed]["loss"] for seed in results) for each in (first, last, results)
    )
    return f"{(start - mine) / (start - end):.0%}"


def a_step(result: Result) -> float:
    """Seconds."""
    return result["seconds"] / result["steps"]


def against(results: dict[int, Result], others: dict[int, Result]) -> str:
    """The difference paired by seed, where there are enough; nothing against itself."""
    both = [(results[seed]["loss"], others[seed]["loss"]) for seed in results if seed in others]
    return "" if results is others or len(both) < 2 else paired(*map(list, zip(*both, strict=True)))


def over(results: dict[int, Result], plain: dict[int, Result]) -> str:
    """Seconds of a step in plain steps of its seed: the machine's speed drifts."""
    both = [a_step(results[seed]) / a_step(plain[seed]) for seed in results if seed in plain]
    return f"{fmean(both):.2f}" if both else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("runs/sources_text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = Finished(args.out / "results.jsonl")
    for task in args.tasks or TASKS:
        found: dict[str, dict[int, Result]] = {}
        for seed in range(args.seeds):
            for name in args.rows:
                place = f"{task} {TASKS[task].shorter}/{name}/{seed}"
                if place not in known:
                    seconds = found[LIVE][seed]["seconds"] if "as long" in name else 0.0
                    known[place] = run(task, name, seed, args.out, seconds)
                    print(f"{place}: {known[place]}", flush=True)
                found.setdefault(name, {})[seed] = known[place]
        report(task, found)


if __name__ == "__main__":
    main()
