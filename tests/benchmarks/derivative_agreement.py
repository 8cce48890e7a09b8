"""How well central differences rank a pool, against the error that `derivative="auto"` judges by.

    python tests/benchmarks/derivative_agreement.py [mlp cnn gpt2] [--horizons 0 2 4]

Along trainings from `configs/`, every --every steps the sensitivities of a fresh look-ahead score
one pool in both forms. The error is that of the check: on eight examples, relative to the slopes or
to what tells them apart, whichever is larger. Printed are, by error, how many pools there were, the
least Spearman of the two forms over the pool, and the least share of the 16 kept that they have in
common.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from selectflow import Selector
from selectflow.core.batches import take
from selectflow.core.forms import NUM_CHECKED, apart
from selectflow.run.build import build_optimizer, build_schedule
from selectflow.run.config import load

ROOT = Path(__file__).parents[2]
KEEP = 16
TASKS = {
    "mlp": ("vision", "digits_online", ["model.name=mlp"]),
    "cnn": ("vision", "digits_online", ["model.name=cnn"]),
    "gpt2": ("language", "text_online", ["data.text.num_train=6000"]),
}
EDGES = (0.01, 0.02, 0.05, 0.1, 1.0)  # the last also for what is larger


def judged(central: Tensor, exact: Tensor) -> float:
    """The error by which `auto` decides."""
    return apart(central[:NUM_CHECKED], exact[:NUM_CHECKED], "losses")


def pools(
    name: str, horizon: int, lr: float, steps: int, every: int
) -> Iterator[tuple[float, float, float]]:
    """Error, Spearman and share of the kept in common, of a pool every so many steps."""
    program, config, options = TASKS[name]
    run = load(ROOT / f"configs/{config}.yaml", [*options, f"optimizer.lr={lr}"])
    task = runpy.run_path(str(ROOT / f"trainers/{program}.py"))["build_task"](run)
    optimizer = build_optimizer(task.model, run.optimizer)
    schedule = build_schedule(optimizer, run.schedule, run.steps)
    selector = Selector(
        task.model, optimizer, task.loss_fn, task.target, KEEP,
        horizon=horizon, derivative="exact", lr_scheduler=schedule,
    )  # fmt: skip
    stream = iter(task.pools)
    for step in range(steps):
        pool = next(stream)
        batch = take(pool, torch.arange(KEEP))
        if step % every == 0:
            batch = selector.select(pool, islice(stream, horizon))
            (gamma, *_), derivatives = (
                selector.state.ahead.sensitivities,
                selector._scoring.policy.derivatives,
            )
            params = selector._optimizer.params()
            with torch.no_grad(), selector._objective.scoring():
                exact = derivatives._directional_exact(params, gamma, pool)[1].double()
                central = derivatives._directional_central(params, gamma, pool)[1].double()
            top = [set(slopes.argsort()[:KEEP].tolist()) for slopes in (central, exact)]
            rank = float(spearmanr(central, exact).statistic)
            yield judged(central, exact), rank, len(top[0] & top[1]) / KEEP
        optimizer.zero_grad()
        task.loss_fn(task.model, batch).mean().backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--horizons", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3, 2e-2])
    parser.add_argument("--steps", type=int, default=61)
    parser.add_argument("--every", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("task   error        pools  least Spearman  least in common")
    for name in args.tasks:
        found = [
            one
            for horizon in args.horizons
            for lr in args.lrs
            for one in pools(name, horizon, lr, args.steps, args.every)
        ]
        for low, high in zip((0.0, *EDGES), EDGES, strict=False):
            if some := [one for one in found if low < min(one[0], 1.0) <= high]:
                ranks, shares = [one[1] for one in some], [one[2] for one in some]
                print(
                    f"{name:<6} {low:4.0%} to {high:4.0%} {len(some):5} {min(ranks):15.4f} "
                    f"{min(shares):16.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
