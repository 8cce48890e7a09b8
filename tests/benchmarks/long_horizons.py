"""A search for settings in which a horizon of 4 or more selects better than one of 0 or 1.

    python tests/benchmarks/long_horizons.py [--settings momentum outliers] [--seeds 5]

Each setting but the first gives a long look-ahead a reason to see what a short one cannot:

- noised: 40% wrong labels, as in the other studies; nothing but the horizon is long.
- dropped: the same, but only 8 of 64 are left out, where first order is accurate.
- planned: the same; the look-ahead simulates what selection would keep, so that its trajectory is
  that of training.
- momentum: softmax regression by SGD with momentum 0.99, which carries an update for 100 steps.
- inertia: the same in AdamW, beta1 = 0.99.
- outliers: a fifth of the images is 8 times as bright. Their gradients fill the second moments, and
  hold up the steps that follow, which the present step cannot show.

Test loss at the end, mean and standard deviation over seeds, and the paired difference of the best
horizon >= 4 from the best <= 1. The test set chooses which are compared: it favours the long ones.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from adaptive_study import KEEP, fit, loss_fn, pools, shown, splits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from selectflow import Selector

HORIZONS = (0, 1, 2, 4, 8)
OUTLIERS, GAIN = 0.2, 8.0
ADAMW = partial(AdamW, lr=3e-3)


def mlp() -> nn.Module:
    layers = [nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


def softmax_regression() -> nn.Module:
    return nn.Linear(64, 10)


@dataclass(frozen=True)
class Setting:
    task: str
    steps: int
    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Iterable[Tensor]], Optimizer] = ADAMW
    keep: int = KEEP
    has_outliers: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "noised": Setting("noised", 300),
    "dropped": Setting("noised", 300, keep=56),
    "planned": Setting("noised", 300, options={"nominal": "policy"}),
    "momentum": Setting("clean", 100, softmax_regression, partial(SGD, lr=0.03, momentum=0.99)),
    "inertia": Setting("clean", 200, optimizer=partial(ADAMW, betas=(0.99, 0.999))),
    "outliers": Setting(
        "clean", 200, optimizer=partial(ADAMW, betas=(0.9, 0.99)), has_outliers=True
    ),
}


def train(setting: Setting, seed: int, options: dict[str, Any]) -> float:
    """Test loss at the end."""
    data, target, test = splits(setting.task, seed)
    if setting.has_outliers:
        generator = torch.Generator().manual_seed(seed)
        bright = torch.rand(len(data["label"]), generator=generator) < OUTLIERS
        data["image"] = torch.where(bright[:, None], GAIN * data["image"], data["image"])
    torch.manual_seed(seed)
    model = setting.model()
    optimizer = setting.optimizer(model.parameters())
    selector = Selector(model, optimizer, loss_fn, [target], setting.keep, seed=seed, **options)
    fit(model, optimizer, selector, pools(data, seed), setting.steps)
    with torch.no_grad():
        return loss_fn(model, test).mean().item()


def report(name: str, setting: Setting, seeds: int) -> None:
    methods = {"uniform": {"strategy": "uniform"}}
    methods |= {f"H = {horizon}": {"horizon": horizon, **setting.options} for horizon in HORIZONS}
    losses: dict[str, list[float]] = {method: [] for method in methods}
    for seed in range(seeds):
        for method, options in methods.items():
            losses[method].append(train(setting, seed, options))
    print(f"\n{name}: test loss after {setting.steps} steps, {seeds} seeds")
    for method, values in losses.items():
        print(f"  {method:<8} {shown(values)}")
    short, long = (
        min((losses[f"H = {horizon}"] for horizon in group), key=statistics.mean)
        for group in ([h for h in HORIZONS if h <= 1], [h for h in HORIZONS if h >= 4])
    )
    differences = [after - before for after, before in zip(long, short, strict=True)]
    print(f"  best H >= 4 from best H <= 1: {shown(differences)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.settings:
        report(name, SETTINGS[name], args.seeds)


if __name__ == "__main__":
    main()
