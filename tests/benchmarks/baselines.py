"""Every strategy on digits of which 40% have a wrong label: test loss and accuracy at equal steps.

    python tests/benchmarks/baselines.py [--task noised|clean|imbalanced] [--seeds 3] [--steps 400]

One learning rate for all, none searched; each keeps 16 of 64. The target set (200 examples) is all
that selects, the test set (400) is evaluated once, at the end. Processor seconds are those of the
whole training, the irreducible-loss model included. `train_digits` is that of adaptive_study.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict

import torch
from adaptive_study import KEEP, STEPS, shown, train_digits

from selectflow import AutoHorizon
from selectflow.strategies import STRATEGIES

LOOKAHEADS = {
    "influence, H = 0": {"horizon": 0},
    "influence, H = 1": {"horizon": 1},
    "adaptive H and lr": {"horizon": AutoHorizon(off=False), "lr": "auto"},
}
METHODS = LOOKAHEADS | {each: {"strategy": each} for each in STRATEGIES if each != "influence"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--task", choices=[task for task in STEPS if task != "text"], default="noised"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in range(args.seeds):  # outside: a drift of the machine's speed meets all alike
        for name, options in METHODS.items():
            found[name].append(train_digits(args.task, seed, args.steps, 1.0, options))
            print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"{args.task}, {args.seeds} seeds, {args.steps} steps, keep {KEEP}")
    print("| strategy | test loss | accuracy, % | target loss | processor s |")
    print("| --- | --- | --- | --- | --- |")

    def mean(name: str) -> float:
        return statistics.mean(result["test_loss"] for result in found[name])

    for name in sorted(found, key=mean):
        rows = found[name]
        accuracy = [100 * result["accuracy"] for result in rows]
        cells = [
            shown([result["test_loss"] for result in rows]),
            f"{statistics.mean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}",
            shown([result["target_loss"] for result in rows]),
            f"{statistics.mean(result['seconds'] for result in rows):.1f}",
        ]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
