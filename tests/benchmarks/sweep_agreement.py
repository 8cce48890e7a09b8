"""How true the scores of a sweep by central differences are, by the length of the run.

    python tests/benchmarks/sweep_agreement.py [--steps 16 100 500] [--num-removed 24]

Small problems are recorded and swept. Printed, for each form of the derivatives, are
the relative error of all scores and their Spearman with the exact form, and the Spearman of both
with retraining without a sample, of so many samples. No sample occurs twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

from selectflow.audit.influence import leave_one_out
from selectflow.offline.record import record
from selectflow.offline.score import score_samples

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import PROBLEMS

SIZE, TARGET = 6, 16


def recorded(problem, dtype, num_steps, lr):
    model, make = problem.make(dtype)
    model.eval()
    options = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    batches = [
        make(SIZE) | {"key": [f"{step}-{position}" for position in range(SIZE)]}
        for step in range(num_steps)
    ]
    return record(model, optimizer, problem.loss_fn, batches, limit_gib=0.2), make(TARGET)


def removals(scores, num_steps):
    """The predicted removals, in which the others of a batch take over the weight."""
    each = scores.score.view(num_steps, SIZE)
    return (SIZE * each - each.sum(1, keepdim=True)) / (SIZE - 1)


def measure(problem, dtype, num_steps, lr, num_removed):
    trajectory, target = recorded(problem, dtype, num_steps, lr)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(num_steps * SIZE, generator=generator)[:num_removed]
    pairs = [(index // SIZE, index % SIZE) for index in chosen.tolist()]
    truth = leave_one_out(trajectory, target, pairs, num_parallel=8, reduce="mean")[:, 0]
    found = {
        form: score_samples(trajectory, [target], derivative=form)
        for form in ("exact", "central", "auto")
    }
    exact = found["exact"].score
    size = f"{problem.name:<11} {str(dtype)[6:]} lr {lr:g} T = {num_steps}"
    for form, scores in found.items():
        error = float((scores.score - exact).norm() / exact.norm())
        rank = spearmanr(scores.score, exact).statistic
        predicted = removals(scores, num_steps).flatten()[chosen]
        true = spearmanr(predicted, truth).statistic
        print(
            f"{size}  {form:<7} error {error:.1e}, Spearman {rank:.5f}; with retraining {true:.3f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 100, 500])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 1e-2])
    parser.add_argument("--num-removed", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for num_steps in args.steps:
        for problem in PROBLEMS:
            for dtype in (torch.float64, torch.float32):
                for lr in args.lrs:
                    measure(problem, dtype, num_steps, lr, args.num_removed)


if __name__ == "__main__":
    main()
