"""What early stopping saves of a sweep, and whether it finds what the full grid finds.

    python tests/benchmarks/early_stopping.py [SWEEP.yaml] [--out runs/early_stopping]

The grid is run twice by one process: to its end, and as the file says. Which cells are stopped
depends on the order in which they come, so the curves of the full grid are then stopped in other
orders as well, without training. Finished cells are not repeated: delete --out for new seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from selectflow.tune.cells import Cells
from selectflow.tune.search import read_cells, tune
from selectflow.tune.space import Sweep, load_sweep

ROOT = Path(__file__).parents[2]
Curves = list[list[float]]  # of a cell: for each seed its metric at every evaluation


def run(sweep: Sweep, out: Path) -> tuple[Cells, float, BasePruner]:
    """The cells of a sweep, the seconds until all had ended, and its rule for stopping."""
    began = time.perf_counter()
    study = tune(sweep, out, 1, lambda _: None)
    return read_cells(sweep, study, out), time.perf_counter() - began, study.pruner


def read_curves(sweep: Sweep, cells: Cells, out: Path) -> list[Curves]:
    """The metric of every cell that was run to its end."""
    found = []
    for cell in cells.cells:
        each = [sweep.load(cell.setting, sweep.local_overrides(out, seed)) for seed in sweep.seeds]
        logs = [(config.run_dir / "metrics.jsonl").read_text().splitlines() for config in each]
        found.append([[json.loads(line)[cells.metric] for line in log] for log in logs])
    return found


def stopped_in_order(cells: list[Curves], pruner: BasePruner) -> tuple[Curves, float]:
    """The best of the cells that are not stopped, as `tune` does it, and the share that is run."""
    study, best, num_run = optuna.create_study(pruner=pruner), (float("inf"), cells[0]), 0
    for curves in cells:
        trial, state, finals, num = study.ask(), TrialState.COMPLETE, [], 0
        for losses in curves:
            for loss in losses:
                if state == TrialState.COMPLETE:
                    num += 1
                    trial.report(statistics.fmean([*finals, loss]), num)
                    if num < sum(map(len, curves)) and trial.should_prune():
                        state = TrialState.PRUNED
            finals.append(losses[-1])
        value = statistics.fmean(finals) if state == TrialState.COMPLETE else None
        study.tell(trial, value, state=state)
        num_run += num
        if value is not None:
            best = min(best, (value, curves), key=lambda one: one[0])
    return best[1], num_run / sum(len(losses) for curves in cells for losses in curves)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sweep", type=Path, nargs="?", default=ROOT / "configs/sweep_digits.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/early_stopping"))
    parser.add_argument("--orders", type=int, default=100)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    early = load_sweep(args.sweep)
    keys = early.keys.model_copy(update={"early_terminate": None})
    raw = {key: value for key, value in early.raw.items() if key != "early_terminate"}
    full = replace(early, keys=keys, raw=raw)
    results = {}
    for name, sweep in (("full grid", full), ("early stopping", early)):
        results[name] = run(sweep, args.out / name.replace(" ", "_"))
        cells, seconds, _ = results[name]
        best = cells.best
        steps = sum(cell.steps for cell in cells.cells)
        varied = [key for key, domain in sweep.domains.items() if not domain.is_constant]
        setting = ", ".join(f"{key}={best.setting[key]}" for key in varied)
        print(
            f"{name}: {seconds:.0f} s, {steps / cells.full_steps:.0%} of {cells.full_steps} steps; "
            f"best {setting}, {cells.metric} {best.mean:.4f} ± {best.sd:.4f}"
        )  # fmt: skip
    cells, _, _ = results["full grid"]
    curves = read_curves(full, cells, args.out / "full_grid")
    found = []
    for order in range(args.orders):
        shuffled = random.Random(order).sample(curves, len(curves))
        best, share = stopped_in_order(shuffled, results["early stopping"][2])
        found.append((statistics.fmean(losses[-1] for losses in best), share))
    within = sum(value <= cells.best.mean + cells.best.sd for value, _ in found)
    same = sum(value == cells.best.mean for value, _ in found)
    shares = [share for _, share in found]
    print(
        f"in {len(found)} other orders: the same cell {same} times, one within the best's standard "
        f"deviation {within} times; {statistics.fmean(shares):.0%} of the evaluations "
        f"({min(shares):.0%} to {max(shares):.0%})"
    )


if __name__ == "__main__":
    main()
