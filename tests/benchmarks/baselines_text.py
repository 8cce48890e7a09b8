"""What else one could do with a stream of text and a target set: adapters and fine-tuning.

    OMP_NUM_THREADS=1 python tests/benchmarks/baselines_text.py [lora finetune] [--seconds 40]

The tasks are those of `scorer.py` with half of each pool: 8 of 32 blocks a step for adapters, 4 of
16 for fine-tuning, 100 steps at a constant rate after the warm-up of the configuration. All else is
as in `baselines.py`: a fifth of the target set is held out of every method, tunes the rate (of
three multiples of the configuration's, on a seed of its own) and stops early.

With --seconds of the processor, those that select nothing train for as long, tuned for that, beside
the others' 100 steps.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from baselines import HELD_OUT, METHODS, Start, divided, run
from baselines_tables import Budget, Point, Runs, Tuning, rows, table
from equal_time import mean_loss
from scorer_tasks import text
from torch import nn

from selectflow.core.batches import Batch, chunks, in_parts, join, num_examples

STEPS, NUM_TARGET, SEEDS = 100, 200, 3
TASKS = ("lora", "finetune")
NAMES = (
    "plain", "plain, whole pools", "target alone", "target mixed in", "target mixed in, H = 0",
    "largest loss", "rho", "gradient", "H = 0", "adaptive, from H = 0", "greats", "adam",
)  # fmt: skip
TIMED = ("plain", "plain, whole pools", "target mixed in")
SELECT = ("H = 0", "adaptive, from H = 0")  # beside those
# of other seeds, not all have as much prose as the mixture takes
TUNING = Tuning((0.3, 1.0, 3.0), (10,))
FEWER = dict.fromkeys(("greats", "adam", "opus"), Tuning((1.0, 3.0), (10,)))


def language_model(task: str, rate: float, seed: int, num_target: int, folder: Path) -> Start:
    """The model of a task, at a multiple of the configuration's rate."""
    setting, _ = text(task, "plain", seed, folder)
    for group in setting.optimizer.param_groups:
        group["lr"] *= rate
    size = num_examples(setting.target[0]) // 2
    target, _ = divided(join(setting.target), num_target)
    held_out, target = divided(target, round(HELD_OUT * num_target))
    generator = torch.Generator().manual_seed(seed)
    halves = (
        {name: half[name] for name in setting.target[0]}  # without its epoch
        for pool in setting.pools(lambda: 0.0)
        for half in in_parts(pool, 2, generator)
    )
    setting = setting._replace(
        target=list(chunks(target, size)), pools=lambda _: halves, keep=setting.keep // 2
    )

    def judge(model: nn.Module, on: Sequence[Batch]) -> tuple[float, float]:
        return mean_loss(setting.losses, model, on), math.nan

    return Start(setting, [held_out], judge, {"derivative": "central"})


def train(
    folder: Path, task: str, name: str, rate: float, seed: int, num: int, seconds: float
) -> list[Point]:
    """A run of a method."""
    start = language_model(task, rate, seed, num, folder)
    return run(METHODS[name], start, seed, STEPS, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(NAMES))
    parser.add_argument("--num-target", type=int, default=NUM_TARGET)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--reference", choices=METHODS, default="H = 0")
    parser.add_argument("--out", type=Path, default=Path("runs/baselines_text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    made, path = partial(train, args.out), args.out / "runs.jsonl"
    for task in args.tasks:
        title = f"{task}, {args.num_target} of the target, {args.seeds} seeds"
        runs, budget = Runs(path, 0.0, made, TUNING, FEWER), Budget("", steps=STEPS)
        found = rows(runs, task, args.methods, args.seeds, args.num_target, budget)
        print(
            "", f"{title}, {STEPS} steps", "", *table(found, args.reference), sep="\n", flush=True
        )
        if not args.seconds:
            continue
        runs, budget = (
            Runs(path, args.seconds, made, TUNING, FEWER),
            Budget("", seconds=args.seconds),
        )
        names = [name for name in args.methods if name in TIMED]
        found = [row for row in found if row.name in SELECT]
        found += rows(runs, task, names, args.seeds, args.num_target, budget)
        found.sort(key=lambda row: statistics.mean(row.losses))
        print("", f"{title}, {args.seconds:g} s", "", *table(found, args.reference), sep="\n")


if __name__ == "__main__":
    main()
