"""What control costs: the time of a controlled run over what it would be without the control.

    python tests/benchmarks/control_cost.py [mlp] [text] [14M] [--steps 400] [--controls horizon]

That is, over the training, the selection and the look-aheads of the same run. Control costs most in
the first steps, since its windows and contests become rarer while nothing changes; the ratio is
printed as it falls. Both are on one thread, by the wall's clock.
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


def text():
    """A GPT-2 shape of 0.7M parameters on 64 tokens: small, but no longer all overhead."""
    return COST["gpt2"](1024, 64, width=128, heads=4, layers=3)


MODELS = {"mlp": COST["MODELS"]["mlp"], "text": text, "14M": COST["MODELS"]["gpt2"]}
CONTROLS = {
    "horizon": {"horizon": "auto"},
    "rate": {"horizon": 0, "lr": "auto"},
    "horizon and rate": {"horizon": "auto", "lr": "auto"},
}


class Run:
    """A training run that goes on for some steps at a time."""

    def __init__(self, name: str, **options: object) -> None:
        torch.manual_seed(0)
        self.model, self.loss_fn, batch, lr = MODELS[name]()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        pools = cycle([batch(COST["POOL"]) for _ in range(16)])
        target = [batch(COST["TARGET"]) for _ in range(4)]
        self.selector = Selector(
            self.model, self.optimizer, self.loss_fn, target, COST["KEEP"],
            **options,
        )  # fmt: skip
        self.batches = self.selector.stream(pools)
        self.seconds = self.control_s = 0.0

    def go(self, num: int) -> None:
        began = time.perf_counter()
        for _ in range(num):
            batch = next(self.batches)
            self.control_s += self.selector.last.control_s
            self.optimizer.zero_grad()
            self.loss_fn(self.model, batch).mean().backward()
            self.optimizer.step()
        self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["mlp", "text"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models:
        shared = {"derivative": "central", "num_steps": args.steps}
        runs = {control: Run(name, **CONTROLS[control], **shared) for control in args.controls}
        for step in range(TURN, args.steps + 1, TURN):
            for run in runs.values():
                run.go(TURN)
            if step % (args.steps // 4) == 0:
                found = ", ".join(
                    f"{what} {run.seconds / (run.seconds - run.control_s):.2f} "
                    f"(H {run.selector.last.horizon}, rate x {run.selector.last.lr_multiplier:g})"
                    for what, run in runs.items()
                )
                print(f"{name}, {step} steps: control of {found}", flush=True)


if __name__ == "__main__":
    main()
