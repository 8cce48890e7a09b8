"""How the runs of `baselines.py` and `baselines_text.py` are tuned, read and shown."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from selectflow.report.compare import Paired, holm, paired, stat
from selectflow.report.tables import spread, verdict
from selectflow.run.metrics import TEST_LOSS


class Tuning(NamedTuple):
    """Learning rates, and the seeds that they are tried on."""

    rates: Sequence[float]
    seeds: Sequence[int]


class Point(NamedTuple):
    """Where a run stood: the means over what is held out and over the test set."""

    step: int
    seconds: float
    held_out: float
    loss: float
    accuracy: float


Train = Callable[[str, str, float, int, int, float], list[Point]]


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

    def __init__(
        self,
        path: Path,
        seconds: float,
        train: Train,
        tuning: Tuning,
        fewer: dict[str, Tuning],
    ) -> None:
        """
        Args:
            path: of the file.
            seconds: how long they are, at least.
            train: (task, name of the method, rate, seed, size of the target set, seconds) -> a run.
            tuning: of the methods.
            fewer: of those that have another one, by name.
        """
        self._path, self._seconds, self._train = path, seconds, train
        self._tuning, self._fewer = tuning, fewer
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {
            tuple(key): [Point(*each) for each in points] for key, points in map(json.loads, lines)
        }

    def of(self, task: str, name: str, rate: float, seed: int, num: int) -> list[Point]:
        key = (task, name, rate, seed, num, self._seconds)
        if key not in self._known:
            began = time.perf_counter()
            self._known[key] = self._train(task, name, rate, seed, num, self._seconds)
            with self._path.open("a") as file:
                file.write(json.dumps([key, self._known[key]]) + "\n")
            print(*key, f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        return self._known[key]

    def tuned(self, task: str, name: str, num: int, budget: Budget) -> float:
        """The rate with the lowest held-out loss on seeds that are used for nothing else."""

        rates, seeds = self._fewer.get(name, self._tuning)

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


def tested(found: Sequence[Row], reference: str) -> list[Paired | None]:
    """Each row against the reference; None for that itself, or where it is not among them."""
    ours = next((row for row in found if row.name == reference), None)
    tests = [
        paired([a - b for a, b in zip(row.losses, ours.losses, strict=True)])
        if ours and row is not ours
        else None
        for row in found
    ]
    return holm(tests)


def table(found: Sequence[Row], reference: str) -> Iterator[str]:
    """The rows in Markdown; steps and seconds are those that the budget allowed."""
    lines = []
    for row, test in zip(found, tested(found, reference), strict=True):
        p = f", p {test.corrected_p:.3f}" if test else ""
        lines.append(
            {
                "": row.name,
                "loss": spread(stat(row.losses), 3),
                "accuracy, %": spread(stat([point.accuracy for point in row.best]), 1, 100),
                f"against {reference}": verdict(test, TEST_LOSS) + p,
                "loss at the end": spread(stat([point.loss for point in row.last]), 3),
                "steps": f"{statistics.mean(point.step for point in row.last):.0f}",
                "s": f"{statistics.mean(point.seconds for point in row.last):.2f}",
                "rate": f"{row.rate:g}",
            }
        )
        if math.isnan(row.best[0].accuracy):
            del lines[-1]["accuracy, %"]
    yield f"| {' | '.join(lines[0])} |"
    yield "| --- " * len(lines[0]) + "|"
    yield from (f"| {' | '.join(line.values())} |" for line in lines)


def ranking(found: dict[str, list[Row]], names: Sequence[str], reference: str) -> Iterator[str]:
    """Test loss by task, the place in brackets; bold: better than the reference, slanted: worse."""
    cells: dict[str, list[str]] = {name: [] for name in names}
    places: dict[str, list[int]] = {name: [] for name in names}
    marks = {"better": "**", "worse": "*"}
    for each in found.values():
        for place, (row, test) in enumerate(
            zip(each, tested(each, reference), strict=True), start=1
        ):
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
