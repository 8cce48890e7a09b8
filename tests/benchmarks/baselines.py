"""What else one could do with a stream and a target set, against selection: one table a task.

    python tests/benchmarks/baselines.py [--tasks noised visits] [--methods plain "H = 0"]
        [--num-target 200] [--seeds 5] [--figure F]

`study_data` describes the tasks; two of them need `pip install scikit-image statsmodels`. An MLP
with two hidden layers of 128 is trained by AdamW at a constant rate on pools of 64, 16 a step. All
methods have the same pools, target set and tuning:

- A fifth of the target set is held out of every method. Its loss chooses the learning rate, of four
  by two seeds of their own, once for each budget, and stops early: a run is read where that loss
  was lowest so far. The test set is read beside it, and decides nothing.
  `greats`, `adam` and `opus`, whose runs take long, have two of the rates and one of the seeds.
- The rest of the target set is what is selected by, or trained on; of who does both, half of it is.
- Budgets are 400 optimizer steps, and `--seconds` of the processor (0: none), without evaluation.

Differences to the reference, "adaptive", are paired by seed (t test, corrected by Holm). Finished
runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from study_data import TASKS, Batch, Data, draw
from torch import Tensor, nn
from torch.optim import Optimizer

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import in_parts, join, num_examples, take
from selectflow.report.compare import Paired, holm, paired, stat
from selectflow.report.tables import spread, verdict
from selectflow.run.metrics import TEST_LOSS
from selectflow.strategies import STRATEGIES

POOL, KEEP, STEPS, EVERY = 64, 16, 400, 20
HELD_OUT, MIXED = 1 / 5, 1 / 4  # of the target set; of a batch that target examples are mixed into
RATES, TUNED_ON = (3e-4, 1e-3, 3e-3, 1e-2), (100, 101)
FEWER = dict.fromkeys(("greats", "adam", "opus"), ((3e-3, 1e-2), (100,)))  # the same: dear runs
REFERENCE = "adaptive"


class Method(NamedTuple):
    """What is trained on.

    Attributes:
        options: of the `Selector`; None: nothing is selected.
        size: examples of the stream in a step; 0: none.
        mixed: examples of the target set in a step.
        is_shared: whether all of the target set is trained on and selected by, not a half each.
    """

    options: dict[str, Any] | None = None
    size: int = KEEP
    mixed: int = 0
    is_shared: bool = False


SOME = round(MIXED * KEEP)
MAIN = {
    "plain": Method(),
    "plain, whole pools": Method(size=POOL),
    "target alone": Method(size=0, mixed=KEEP),
    "target mixed in": Method(size=KEEP - SOME, mixed=SOME),
    "target mixed in, H = 0": Method({"horizon": 0}, KEEP - SOME, SOME),
    "largest loss": Method({"strategy": "loss"}),
    "rho": Method({"strategy": "rho"}),
    "gradient": Method({"strategy": "gradient"}),
    "H = 0": Method({"horizon": 0}),
    "adaptive": Method({"horizon": AutoHorizon(), "lr": "auto"}),
    "adaptive, always selects": Method({"horizon": AutoHorizon(off=False), "lr": "auto"}),
}
SHARED = {
    "target mixed in, H = 0 by the same": Method({"horizon": 0}, KEEP - SOME, SOME, is_shared=True)
}
OTHERS = {  # of the field: dearer, or weaker than those above
    name: Method({"strategy": name})
    for name in STRATEGIES
    if name not in ("uniform", "loss", "rho", "gradient", "influence")
}
METHODS = MAIN | SHARED | OTHERS

# --- training


class Point(NamedTuple):
    """Where a run stood: the means over what is held out and over the test set."""

    step: int
    seconds: float
    held_out: float
    loss: float
    accuracy: float


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def shuffled(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Batches of the size, epoch after epoch, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, num_examples(data))
    while True:
        order = torch.randperm(num_examples(data), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield take(data, order[start : start + size])


def divided(batch: Batch, num: int) -> tuple[Batch, Batch]:
    """The first so many examples, and the rest."""
    return take(batch, slice(num)), take(batch, slice(num, None))


def batches(
    method: Method, model: nn.Module, optimizer: Optimizer, data: Data, seed: int
) -> Iterator[Batch]:
    """What each step trains on; `data.target` is what may be used of it."""
    trained_on, selected_by, pools = data.target, data.target, shuffled(data.train, POOL, seed)
    if method.options is not None and method.mixed and not method.is_shared:
        trained_on, selected_by = divided(data.target, num_examples(data.target) // 2)
    clean = shuffled(trained_on, method.mixed, seed) if method.mixed else None
    if not method.size:
        assert clean is not None
        return clean
    if method.options is None:
        generator = torch.Generator().manual_seed(seed)
        num = POOL // method.size
        stream = (part for pool in pools for part in in_parts(pool, num, generator))
    else:
        stream = Selector(
            model, optimizer, loss_fn, [selected_by], method.size, seed=seed, **method.options
        ).stream(pools)
    return stream if clean is None else map(join, zip(stream, clean, strict=False))


def run(
    task: str, method: Method, rate: float, seed: int, num_target: int, until_s: float
) -> list[Point]:
    """Train until both budgets are used up; where the run stood every so many steps."""
    data = draw(task, seed, num_target)
    held_out, target = divided(data.target, round(HELD_OUT * num_target))
    torch.manual_seed(seed)
    classes, width = 1 + int(max(batch["y"].max() for batch in data)), data.test["x"].shape[1]
    layers = [nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    points, seconds, began = [], 0.0, time.process_time()
    stream = batches(method, model, optimizer, data._replace(target=target), seed)
    for step, batch in enumerate(stream, start=1):
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()
        if step % EVERY:
            continue
        seconds += time.process_time() - began
        points.append(Point(step, seconds, judged(model, held_out)[0], *judged(model, data.test)))
        if step >= STEPS and seconds >= until_s:
            break
        began = time.process_time()
    return points


def judged(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Mean loss and accuracy."""
    with torch.no_grad():
        logits = model(batch["x"])
    is_right = logits.argmax(1) == batch["y"]
    return F.cross_entropy(logits, batch["y"]).item(), is_right.float().mean().item()


# --- reading


class Budget(NamedTuple):
    """How far a run is read."""

    title: str
    steps: float = math.inf
    seconds: float = math.inf

    def within(self, points: Sequence[Point]) -> list[Point]:
        return [
            point for point in points if point.step <= self.steps and point.seconds <= self.seconds
        ]

    def best(self, points: Sequence[Point]) -> Point:
        """Where the run had the lowest held-out loss: the only thing that stops it early."""
        return min(self.within(points), key=lambda point: point.held_out)


class Runs:
    """All runs of a study, each trained once and kept in a file."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {
            tuple(key): [Point(*each) for each in points] for key, points in map(json.loads, lines)
        }

    def of(self, task: str, name: str, rate: float, seed: int, num: int) -> list[Point]:
        key = (task, name, rate, seed, num, self._seconds)
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = run(task, METHODS[name], rate, seed, num, self._seconds)
            with self._path.open("a") as file:
                file.write(json.dumps([key, self._known[key]]) + "\n")
            print(*key, f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        return self._known[key]

    def tuned(self, task: str, name: str, num: int, budget: Budget) -> float:
        """The rate with the lowest held-out loss on seeds that are used for nothing else."""

        rates, seeds = FEWER.get(name, (RATES, TUNED_ON))

        def held_out(rate: float) -> float:
            found = (self.of(task, name, rate, seed, num) for seed in seeds)
            return statistics.mean(budget.best(points).held_out for points in found)

        return min(rates, key=held_out)


class Row(NamedTuple):
    """A method within a budget: a run a seed, at the rate that was found for it."""

    name: str
    rate: float
    runs: list[list[Point]]
    best: list[Point]
    last: list[Point]

    @property
    def losses(self) -> list[float]:
        return [point.loss for point in self.best]


def rows(
    runs: Runs, task: str, names: Sequence[str], seeds: int, num: int, budget: Budget
) -> list[Row]:
    """The methods, the one with the lowest mean loss first."""
    found = []
    for name in names:
        rate = runs.tuned(task, name, num, budget)
        each = [runs.of(task, name, rate, seed, num) for seed in range(seeds)]
        ends = [budget.within(points)[-1] for points in each]
        found.append(Row(name, rate, each, [budget.best(points) for points in each], ends))
    return sorted(found, key=lambda row: statistics.mean(row.losses))


def tested(found: Sequence[Row]) -> list[Paired | None]:
    """Each row against the reference; None for that itself, or where it is not among them."""
    ours = next((row for row in found if row.name == REFERENCE), None)
    tests = [
        paired([a - b for a, b in zip(row.losses, ours.losses, strict=True)])
        if ours and row is not ours
        else None
        for row in found
    ]
    return holm(tests)


def table(found: Sequence[Row]) -> Iterator[str]:
    """The rows in Markdown; steps and seconds are those that the budget allowed."""
    yield f"| | loss | accuracy, % | against {REFERENCE} | loss at the end | steps | s | rate |"
    yield "| --- " * 8 + "|"
    for row, test in zip(found, tested(found), strict=True):
        p = f", p {test.corrected_p:.3f}" if test else ""
        cells = [
            row.name,
            spread(stat(row.losses), 3),
            spread(stat([point.accuracy for point in row.best]), 1, 100),
            verdict(test, TEST_LOSS) + p,
            spread(stat([point.loss for point in row.last]), 3),
            f"{statistics.mean(point.step for point in row.last):.0f}",
            f"{statistics.mean(point.seconds for point in row.last):.2f}",
            f"{row.rate:g}",
        ]
        yield f"| {' | '.join(cells)} |"


def ranking(found: dict[str, list[Row]], names: Sequence[str]) -> Iterator[str]:
    """Test loss by task, the place in brackets; bold: better than the reference, slanted: worse."""
    cells: dict[str, list[str]] = {name: [] for name in names}
    places: dict[str, list[int]] = {name: [] for name in names}
    marks = {"better": "**", "worse": "*"}
    for each in found.values():
        for place, (row, test) in enumerate(zip(each, tested(each), strict=True), start=1):
            mark = marks.get(verdict(test, TEST_LOSS), "")
            cells[row.name].append(f"{mark}{spread(stat(row.losses), 3)}{mark} ({place})")
            places[row.name].append(place)
    yield f"| | {' | '.join(found)} | mean place |"
    yield "| --- " * (len(found) + 2) + "|"
    for name in sorted(names, key=lambda name: sum(places[name])):
        yield f"| {' | '.join([name, *cells[name], f'{statistics.mean(places[name]):.1f}'])} |"


def draw_losses(path: Path, found: dict[str, dict[str, list[Row]]], names: Sequence[str]) -> None:
    """Test loss of each method and task, mean and standard deviation, a marker a budget."""
    tasks = next(iter(found.values()))
    _, axes = plt.subplots(1, len(tasks), figsize=(2.3 * len(tasks) + 1.5, 3.4), sharey=True)
    for axis, task in zip([axes] if len(tasks) == 1 else axes, tasks, strict=True):
        for shift, marker, (title, of) in zip((-0.15, 0.15), "os", found.items(), strict=False):
            for row in of[task]:
                measured = stat(row.losses)
                place = len(names) - names.index(row.name) + shift
                color = "C1" if row.name.startswith("adaptive") else "C0"
                label = title if row.name == names[0] else None
                axis.errorbar(
                    measured.mean, place, xerr=measured.sd, fmt=marker, color=color,
                    fillstyle="full" if marker == "o" else "none", markersize=4, label=label,
                )  # fmt: skip
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("test loss")
        axis.set_yticks(range(len(names), 0, -1), names, fontsize=8)
    axis.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(MAIN))
    parser.add_argument("--num-target", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--figure", type=Path, help="where to draw the losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.out / "runs.jsonl", args.seconds)
    budgets = [Budget(f"{STEPS} steps", steps=STEPS)]
    if args.seconds:
        budgets.append(Budget(f"{args.seconds:g} s", seconds=args.seconds))
    found: dict[str, dict[str, list[Row]]] = {budget.title: {} for budget in budgets}
    for task in args.tasks:
        for budget in budgets:
            each = rows(runs, task, args.methods, args.seeds, args.num_target, budget)
            found[budget.title][task] = each
            title = f"{task}, {budget.title}, {args.num_target} of the target, {args.seeds} seeds"
            print("", title, "", *table(each), sep="\n", flush=True)
    for title, of in found.items():
        print("", f"all tasks, {title}", "", *ranking(of, args.methods), sep="\n")
    if args.figure:
        draw_losses(args.figure, found, args.methods)


if __name__ == "__main__":
    main()
