"""Selection on the built-in digits: accuracy at equal steps and at equal wall-clock, over seeds.

    python tests/benchmarks/digits_study.py [--seeds 5] [--out runs/study]

Three settings: 40% wrong labels at two learning rates, and clean labels. Each method is run by
`trainers/vision.py` for 800 steps; `uniform` longer, so that it can also be read off at the time
the others took. Finished runs are not repeated. One `selectflow compare` table a setting.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

from selectflow.cli import main as selectflow

ROOT = Path(__file__).parents[2]
TRAIN = runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"]  # executed, once for all runs
SETTINGS = {
    "noise 40%, lr 3e-3": {"data.label_noise": 0.4, "optimizer.lr": 3e-3},
    "noise 40%, lr 1e-3": {"data.label_noise": 0.4, "optimizer.lr": 1e-3},
    "clean, lr 3e-3": {"data.label_noise": 0.0, "optimizer.lr": 3e-3},
}
METHODS = {
    "uniform": {"config": "digits_uniform", "steps": 8000},
    "loss": {"select.strategy": "loss"},
    "influence-h0": {"select.horizon": 0, "select.interval": 1},
    "influence-h0-k4": {"select.horizon": 0, "select.interval": 4},
    "influence-h1": {"select.horizon": 1, "select.interval": 1},
    "influence-h4": {"select.horizon": 4, "select.interval": 4},
}


def run(root: Path, name: str, seed: int, options: dict[str, object]) -> None:
    summary = root / name / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["status"] == "finished":
        return
    options = {"steps": 800, "config": "digits_online"} | options
    config = ROOT / "configs" / f"{options.pop('config')}.yaml"
    options |= {
        "root": root, "name": name, "seed": seed, "data.seed": seed, "overwrite": "true",
        "track.wandb": "disabled", "num_threads": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in options.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        status = TRAIN([str(config), *overrides])
    if status != 0:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    args = parser.parse_args()
    for number, (title, setting) in enumerate(SETTINGS.items()):
        root = args.out / str(number)
        # Seeds outside, methods inside: a drift of the machine's speed meets all methods alike.
        for seed in range(args.seeds):
            for method, options in METHODS.items():
                run(root, f"{method}-s{seed}", seed, setting | options)
        print(f"\n{title}, {args.seeds} seeds")
        runs = [str(root / f"{m}-s{s}") for m in METHODS for s in range(args.seeds)]
        selectflow(["compare", *runs, "--out", str(root)])


if __name__ == "__main__":
    main()
