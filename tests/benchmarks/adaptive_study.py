"""One adaptive run against a grid of fixed horizons and learning rates, on digits and on text.

    python tests/benchmarks/adaptive_study.py [--tasks noised clean imbalanced text] [--seeds 5]

The adaptive run (`horizon="auto", lr="auto"`) starts at a learning rate ten times too low, right
and ten times too high; the grid has each fixed horizon at 0.1 to 10 times the base rate, and
`uniform` the same rates, fixed and controlled. All train for the same number of steps on the same
stream; seconds of the processor are printed beside. Nothing but the evaluation at the end sees the
test set. The target loss at the end is printed too: where it is far below the test loss, the
selection has fitted the target set. Finished runs are kept in --out and not repeated.

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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results_tasks import CONFIGS, from_base, trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn

from selectflow import Selector
from selectflow.config import load
from selectflow.ledger import read_ledger
from selectflow.report.quantities import TARGET_LOSS, TEST_LOSS
from selectflow.report.runs import load_run

BASE_LR = 3e-3  # digits and text
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
STARTS = (0.1, 1.0, 10.0)
STEPS = {"noised": 800, "clean": 800, "imbalanced": 800, "text": 100}
POOL, KEEP = 64, 16
Batch = dict[str, Tensor]
Options = dict[str, Any]  # of `Selector`
Result = dict[str, Any]


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


def train_digits(task: str, seed: int, steps: int, rate: float, options: Options) -> dict[str, Any]:
    data, target, test = splits(task, seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * BASE_LR)
    selector = Selector(model, optimizer, loss_fn, [target], KEEP, seed=seed, **options)
    began, horizons = time.process_time(), 0
    stream = selector.stream(pools(data, seed))
    for _ in range(steps):
        batch = next(stream)
        horizons += selector.last.horizon or 0
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()
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
        "mean_horizon": horizons / steps,
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
        "select.interval": interval,
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


def report(task: str, found: dict[tuple[str, float], list[Result]]) -> None:
    def spread(key: str, name: str, rate: float) -> tuple[float, float]:
        values = [result[key] for result in found[name, rate]]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    cells = {cell: spread("test_loss", *cell) for cell in found}
    fixed = {cell: value for cell, value in cells.items() if cell[0].startswith("H")}
    best, uniform = (
        min(group, key=lambda cell: group[cell][0])
        for group in (fixed, {cell: cells[cell] for cell in cells if cell[0] == "uniform"})
    )
    for metric in ("test_loss", "target_loss"):
        print(f"\n{task}: {metric}, mean ± standard deviation over {len(found[best])} seeds")
        print("                    " + "".join(f"{rate:>16g}x" for rate in RATES))
        for name in dict.fromkeys(name for name, _ in found):
            row = [spread(metric, name, rate) if (name, rate) in found else None for rate in RATES]
            shown = ["" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}" for value in row]
            print(f"  {name:<18}" + "".join(f"{text:>17}" for text in shown))
    print(f"  best of the grid: {best[0]} at {best[1]:g}x, {cells[best][0]:.3f}; best uniform: "
          f"{uniform[1]:g}x, {cells[uniform][0]:.3f}")  # fmt: skip
    one = statistics.mean(spread("seconds", "H = 1", rate)[0] for rate in STARTS)
    for rate in STARTS:
        behind = cells["adaptive", rate][0] - cells[best][0]
        room = max(cells[best][1], cells["adaptive", rate][1])
        verdict = "better" if behind < -room else "within the spread" if behind <= room else "WORSE"
        horizon, multiplier, seconds = (
            spread(key, "adaptive", rate)[0] for key in ("mean_horizon", "lr_multiplier", "seconds")
        )
        print(f"  adaptive from {rate:g}x: {behind:+.3f} against the best cell ({verdict}); mean H "
              f"{horizon:.2f}, last multiplier {multiplier:.2g}, {seconds / one:.2f} x the seconds "
              "of H = 1")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--horizons", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run; unless given, those of STEPS")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        steps = args.steps or STEPS[task]
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
        found: dict[tuple[str, float], list[Result]] = {}
        for name, rate, _ in runs(args.horizons):
            found[name, rate] = [known[name, rate, seed] for seed in range(args.seeds)]
        report(task, found)


if __name__ == "__main__":
    main()
