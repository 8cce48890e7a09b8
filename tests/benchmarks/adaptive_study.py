"""One adaptive run against a grid of fixed horizons and learning rates, on digits and on text.

    python tests/benchmarks/adaptive_study.py [--tasks noised clean imbalanced text] [--seeds 5]

The adaptive run (`horizon="auto", lr="auto"`) starts at a learning rate ten times too low, right
and ten times too high; the grid has each fixed horizon at 0.1 to 10 times the base rate, and
`uniform` the same rates, fixed and controlled. All train for the same number of steps on the same
stream; seconds of the processor are printed beside. Nothing but the evaluation at the end sees the
test set. The target loss at the end is printed too: where it is far below the test loss, the
selection has fitted the target set. The best cell is chosen by the test loss over as many as there
are, which favours it; the one that a user would choose, by the target loss, stands beside it.
Finished runs are kept in --out and not repeated.

    python tests/benchmarks/adaptive_study.py --weights --tasks noised clean --steps 400

Instead, at the base rate and H = 0: how many of 64 to keep, and weights instead of a choice.

Text is the fine-tuning of adapters of configs/text_lora_online.yaml at half of its steps and sizes.
A fixed horizon looks ahead every H steps there: at every step it would cost H times as much.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_tasks import CONFIGS, from_base, trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

from selectflow import AutoHorizon, Selector
from selectflow.report.runs import load_run
from selectflow.run.config import load
from selectflow.run.ledger import read_ledger
from selectflow.run.metrics import TARGET_LOSS, TEST_LOSS

BASE_LR = 3e-3  # digits and text
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
STARTS = (0.1, 1.0, 10.0)
STEPS = {"noised": 800, "clean": 800, "imbalanced": 800, "text": 100}
POOL, KEEP = 64, 16
Batch = dict[str, Tensor]
Options = dict[str, Any]  # of `Selector`
Result = dict[str, Any]
Cell = tuple[str, float]  # a name of `runs` and its start


def splits(task: str, seed: int) -> tuple[Batch, Batch, Batch]:
    """Train, target (200) and test (400); the held-out ones are the same for every seed."""
    digits = load_digits()
    images, labels = (
        torch.tensor(digits.images / 16).float().flatten(1),
        torch.tensor(digits.target),
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    target, test, train = order[:200], order[200:600], order[600:]
    generator = torch.Generator().manual_seed(seed)
    if task == "imbalanced":  # class c has 0.05^(c / 9) of its samples; the target is balanced
        share = torch.logspace(0, torch.log10(torch.tensor(0.05)).item(), 10)
        train = train[torch.rand(len(train), generator=generator) < share[labels[train]]]
    given = labels[train].clone()
    if task == "noised":
        wrong = torch.rand(len(given), generator=generator) < 0.4
        other = (given + torch.randint(1, 10, given.shape, generator=generator)) % 10
        given = torch.where(wrong, other, given)
    return (
        {"image": images[train], "label": given},
        {"image": images[target], "label": labels[target]},
        {"image": images[test], "label": labels[test]},
    )


def pools(data: Batch, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    size = min(POOL, len(data["label"]))
    while True:
        order = torch.randperm(len(data["label"]), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield {key: value[order[start : start + size]] for key, value in data.items()}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def fit(
    model: nn.Module, optimizer: Optimizer, selector: Selector, stream: Iterator[Batch], steps: int
) -> float:
    """Train on what is selected; the mean horizon."""
    horizons = 0
    for batch in islice(selector.stream(stream), steps):
        horizons += selector.last.horizon or 0
        optimizer.zero_grad()
        losses, weights = loss_fn(model, batch), selector.last.weights
        (losses if weights is None else weights * losses).mean().backward()
        optimizer.step()
    return horizons / steps


def train_digits(task: str, seed: int, steps: int, rate: float, options: Options) -> dict[str, Any]:
    data, target, test = splits(task, seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * BASE_LR)
    if options.get("horizon") == "auto":  # for as many steps as the others, it always selects
        options = options | {"horizon": AutoHorizon(off=False)}
    options = {"keep": KEEP} | options
    selector = Selector(model, optimizer, loss_fn, [target], seed=seed, **options)
    began = time.process_time()
    mean_horizon = fit(model, optimizer, selector, pools(data, seed), steps)
    seconds = time.process_time() - began
    with torch.no_grad():
        logits = model(test["image"])
        loss = F.cross_entropy(logits, test["label"]).item()
        accuracy = (logits.argmax(1) == test["label"]).float().mean().item()
        target_loss = loss_fn(model, target).mean().item()
    return {
        "test_loss": loss,
        "target_loss": target_loss,
        "accuracy": accuracy,
        "mean_horizon": mean_horizon,
        "lr_multiplier": selector.last.lr_multiplier,
        "seconds": seconds,
    }


def train_text(folder: Path, seed: int, steps: int, rate: float, options: Options) -> Result:
    """Reading and evaluation are in the seconds here."""
    horizon = options.get("horizon")
    interval = max(1, horizon) if isinstance(horizon, int) else 1
    overrides = from_base("text_lora_base")(folder, seed) | {
        "root": folder, "name": f"cell-s{seed}", "overwrite": "true", "seed": seed, "steps": steps,
        "eval_every": steps, "track.wandb": "disabled",
        "schedule.warmup_steps": steps // 10, "optimizer.lr": rate * BASE_LR,
        "data.pool": POOL // 2, "select.keep": KEEP // 2, "data.target_batch": KEEP,
        "data.text.num_train": 4800, "data.text.num_target": 256,
        "select.interval": interval, "select.allow_plain": "false",
    } | {f"select.{key}": value for key, value in options.items()}  # fmt: skip
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    path = CONFIGS / "text_lora_online.yaml"
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        if trainer("language")([str(path), *arguments]) != 0:
            raise SystemExit(f"{path} with {' '.join(arguments)} failed")
    seconds = time.process_time() - began
    run_dir = load(path, arguments).run_dir
    last = load_run(run_dir).metrics[-1]
    horizons = read_ledger(run_dir, ["horizon"])["horizon"].to_pylist()  # None for uniform
    return {
        "test_loss": last[TEST_LOSS],
        "target_loss": last[TARGET_LOSS],
        "mean_horizon": statistics.mean(horizon or 0 for horizon in horizons),
        "lr_multiplier": last["select/lr_multiplier"],
        "seconds": seconds,
    }


def runs(horizons: list[int]) -> Iterator[tuple[str, float, Options]]:
    """Name, start as a multiple of the base rate, options of `Selector`."""
    for rate in STARTS:
        yield "adaptive", rate, {"horizon": "auto", "lr": "auto"}
        yield "uniform, lr auto", rate, {"strategy": "uniform", "lr": "auto"}
    for rate in RATES:
        yield "uniform", rate, {"strategy": "uniform"}
        for horizon in horizons:
            yield f"H = {horizon}", rate, {"horizon": horizon}


def compare_weights(task: str, steps: int, seeds: int) -> None:
    """Print what a choice, weights and all of the pool come to."""
    methods: dict[str, Options] = {
        f"keep {keep} of {POOL}": {"horizon": 0, "keep": keep} for keep in (8, 16, 32)
    }
    methods[f"keep 32 of {POOL}, weighted"] = {"horizon": 0, "keep": 32, "weighting": "relu"}
    methods[f"all {POOL}, weighted"] = {"horizon": 0, "keep": POOL, "weighting": "relu"}
    methods[f"all {POOL}, plain"] = {"strategy": "uniform", "keep": POOL}
    found: dict[str, list[Result]] = {name: [] for name in methods}
    for seed in range(seeds):
        for name, options in methods.items():
            found[name].append(train_digits(task, seed, steps, 1.0, options))
    print(f"\n{task}, {steps} steps: test loss, target loss, accuracy; seconds of the processor")
    for name, results in found.items():
        values = {key: [result[key] for result in results] for key in results[0]}
        figures = "  ".join(shown(values[key]) for key in ("test_loss", "target_loss", "accuracy"))
        print(f"  {name:<25}{figures}  {statistics.mean(values['seconds']):.1f} s")


def report(task: str, found: dict[Cell, list[Result]]) -> None:
    def values(metric: str, cell: Cell) -> list[float]:
        return [result[metric] for result in found[cell]]

    def lowest(metric: str, kind: str) -> Cell:
        cells = [cell for cell in found if cell[0].startswith(kind) and "auto" not in cell[0]]
        return min(cells, key=lambda cell: statistics.mean(values(metric, cell)))

    for metric in ("test_loss", "target_loss"):
        print(f"\n{task}: {metric}, mean ± standard deviation over seeds")
        print("                    " + "".join(f"{rate:>16g}x" for rate in RATES))
        for name in dict.fromkeys(name for name, _ in found):
            cells = [(name, rate) for rate in RATES]
            row = [shown(values(metric, cell)) if cell in found else "" for cell in cells]
            print(f"  {name:<18}" + "".join(f"{text:>17}" for text in row))
    rivals = {
        "best cell": lowest("test_loss", "H"),
        "cell that a grid search by target loss chooses": lowest("target_loss", "H"),
        "best uniform": lowest("test_loss", "uniform"),
    }
    losses = {cell: values("test_loss", cell) for cell in found}
    one = statistics.mean(
        seconds for rate in STARTS for seconds in values("seconds", ("H = 1", rate))
    )
    for rate in STARTS:
        adaptive = ("adaptive", rate)
        horizon, multiplier, seconds = (
            statistics.mean(values(metric, adaptive))
            for metric in ("mean_horizon", "lr_multiplier", "seconds")
        )
        print(f"  adaptive from {rate:g}x, mean H {horizon:.2f}, last multiplier {multiplier:.2g}, "
              f"{seconds / one:.2f} x the seconds of H = 1")  # fmt: skip
        for title, cell in rivals.items():
            # One seed is one stream: what is compared are the runs on it.
            pairs = zip(losses[adaptive], losses[cell], strict=True)
            behind = [mine - other for mine, other in pairs]
            print(f"    {shown(behind)} from the {title} ({cell[0]} at {cell[1]:g}x, "
                  f"{statistics.mean(losses[cell]):.3f}): {verdict(behind)}")  # fmt: skip


def shown(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def verdict(behind: list[float]) -> str:
    """How losses are that differ by so much from those of others."""
    mean, room = statistics.mean(behind), statistics.stdev(behind) if len(behind) > 1 else 0.0
    return "better" if mean < -room else "within the spread" if mean <= room else "WORSE"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--horizons", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run; unless given, those of STEPS")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--weights", action="store_true", help="compare weights with a choice")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        steps = args.steps or STEPS[task]
        if args.weights:
            compare_weights(task, steps, args.seeds)
            continue
        path = args.out / f"{task}-{steps}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        known = {tuple(key): result for key, result in map(json.loads, lines)}
        # Seeds outside: a drift of the machine's speed meets all methods alike.
        for seed in range(args.seeds):
            for name, rate, options in runs(args.horizons):
                if (name, rate, seed) not in known:
                    if task == "text":
                        result = train_text(args.out / "text", seed, steps, rate, options)
                    else:
                        result = train_digits(task, seed, steps, rate, options)
                    known[name, rate, seed] = result
                    with path.open("a") as file:
                        file.write(json.dumps([[name, rate, seed], result]) + "\n")
        found: dict[Cell, list[Result]] = {}
        for name, rate, _ in runs(args.horizons):
            found[name, rate] = [known[name, rate, seed] for seed in range(args.seeds)]
        report(task, found)


if __name__ == "__main__":
    main()
