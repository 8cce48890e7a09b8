"""What each strategy costs: processor time of its selections, in plain steps.

    python tests/benchmarks/baseline_cost.py [mlp] [gpt2] [--rounds 5]

Each keeps k = 16 of n = 64 (gpt2: 4 of 16). The unit is a plain training step, on k examples and on
all n. All take turns, round by round, so that a drifting machine slows all alike; a figure is the
median over rounds of the ratio within a round. Selection and the step on what is kept count
together; the first step, which trains the irreducible-loss model, is in a column of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from step_cost import MODELS

from selectflow import Selector
from selectflow.strategies import STRATEGIES

SIZES = {"mlp": (16, 64), "gpt2": (4, 16)}  # k, n
STEPS = {"mlp": 30, "gpt2": 1}  # of one round
WITHOUT = {"gpt2": {"el2n"}}  # no classification
PLAIN = ("plain step on k", "plain step on n")
LOOKAHEADS = {
    "influence, H = 0": {"horizon": 0},
    "influence, H = 0, every 4": {"horizon": 0, "interval": 4},
    "influence, H = 1": {"horizon": 1},
}


def variants(name: str) -> dict[str, dict | None]:
    """Options of the selector by name; None: a plain step."""
    baselines = [each for each in STRATEGIES if each != "influence"]
    return (
        dict.fromkeys(PLAIN)
        | LOOKAHEADS
        | {each: {"strategy": each} for each in baselines if each not in WITHOUT.get(name, ())}
    )


def stepper(name: str, variant: str, options: dict | None) -> Callable[[int], float]:
    """A function that makes so many steps and returns seconds of the processor a step."""
    torch.manual_seed(0)
    model, loss_fn, batch, lr = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    kept, size = SIZES[name]
    pools = cycle([batch(kept if variant == PLAIN[0] else size) for _ in range(8)])
    batches = pools
    if options is not None:
        target = [batch(kept) for _ in range(4)]
        batches = Selector(model, optimizer, loss_fn, target, kept, **options).stream(pools)

    def steps(num: int) -> float:
        began = time.process_time()
        for _ in range(num):
            loss = loss_fn(model, next(batches)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (time.process_time() - began) / num

    return steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        steppers = {v: stepper(name, v, options) for v, options in variants(name).items()}
        first = {variant: steps(1) for variant, steps in steppers.items()}
        found: dict[str, list[float]] = {variant: [] for variant in steppers}
        for _ in range(args.rounds):
            for variant, steps in steppers.items():
                found[variant].append(steps(STEPS[name]))
        kept, size = SIZES[name]
        print(f"\n{name}, keep {kept} of {size}, {args.rounds} rounds of {STEPS[name]}")
        print("| strategy | ms | steps on k | steps on n | range, on n | first step, on n |")
        print("| --- | --- | --- | --- | --- | --- |")
        on_all = statistics.median(found[PLAIN[1]])
        for variant, times in found.items():
            on_k, on_n = (
                [time / base for time, base in zip(times, found[plain], strict=True)]
                for plain in PLAIN
            )
            shown = [
                f"{1e3 * statistics.median(times):.1f}",
                f"{statistics.median(on_k):.1f}",
                f"{statistics.median(on_n):.1f}",
                f"{min(on_n):.1f}-{max(on_n):.1f}",
                f"{first[variant] / on_all:.0f}",
            ]
            print("| " + " | ".join([variant, *shown]) + " |", flush=True)


if __name__ == "__main__":
    main()
