"""What control costs: seconds of `horizon="auto", lr="auto"` over those of a fixed H = 1.

    python tests/benchmarks/control_cost.py [mlp] [gpt2] [--steps 80]

Both train the same model on the same stream from the start, in turns of eight steps, so that a
drifting machine slows both alike. Control is most expensive in the first steps, since its windows
and contests become rarer while nothing changes; the ratio is printed as it falls. Seconds are those
of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import runpy
import time
from itertools import cycle
from pathlib import Path

import torch

from selectflow import Selector

COST = runpy.run_path(str(Path(__file__).with_name("step_cost.py")))
TURN = 8  # steps


class Run:
    """A training run that goes on for some steps at a time."""

    def __init__(self, name: str, **options: object) -> None:
        torch.manual_seed(0)
        self.model, self.loss_fn, batch, lr = COST["MODELS"][name]()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        pools = cycle([batch(COST["POOL"]) for _ in range(16)])
        target = [batch(COST["TARGET"]) for _ in range(4)]
        self.selector = Selector(
            self.model, self.optimizer, self.loss_fn, target, COST["KEEP"],
            chunk_size=COST["CHUNK"][name], **options,
        )  # fmt: skip
        self.batches = self.selector.stream(pools)
        self.seconds = 0.0

    def go(self, num: int) -> None:
        began = time.process_time()
        for _ in range(num):
            batch = next(self.batches)
            self.optimizer.zero_grad()
            self.loss_fn(self.model, batch).mean().backward()
            self.optimizer.step()
        self.seconds += time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["mlp", "gpt2"])
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        both = {"derivative": "central"}  # else each would choose its own form now and then
        fixed = Run(name, horizon=1, **both)
        auto = Run(name, horizon="auto", lr="auto", **both)
        for step in range(TURN, args.steps + 1, TURN):
            fixed.go(TURN)
            auto.go(TURN)
            print(
                f"{name}, {step} steps: auto {auto.seconds / fixed.seconds:.2f} x H = 1 "
                f"({fixed.seconds / step * 1e3:.0f} ms a step); horizon "
                f"{auto.selector.last.horizon}, lr multiplier {auto.selector.last.lr_multiplier:g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
