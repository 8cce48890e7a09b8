"""The cells of a sweep, read from the directories of their runs, from the best to the worst."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selectflow.report.runs import Run, end, load_run, series
from selectflow.run.metrics import CONTROLLED, WALL_S
from selectflow.tune.space import Sweep

State = Literal["complete", "stopped", "failed"]
Goal = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep's parameters, with the results of its runs.

    Attributes:
        setting: values of the parameters by dotted key.
        horizon: select.horizon of its runs.
        lr: optimizer.lr of its runs.
        state: complete: every seed ran to its end; stopped early; or failed, as one does whose
            metric is not finite.
        values: the metric at the end of each finished run, in the order of seeds.
        last: the value at which it was stopped; for a complete cell, the mean of `values`. None
            where it is not finite.
        steps: optimizer steps of all of its runs.
        seconds: of training and selection of all of its runs.
        relative_error: mean of `select/relative_error` over its runs, NaN if one is not finite,
            None if not logged.
        note: why it failed.
    """

    setting: dict[str, Any]
    horizon: float | str
    lr: float
    state: State
    values: tuple[float, ...]
    last: float | None
    steps: int
    seconds: float
    relative_error: float | None
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Mean of the metric over seeds; None unless complete."""
        return statistics.fmean(self.values) if self.state == "complete" else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed, or unless complete."""
        if self.state != "complete" or len(self.values) < 2:
            return None
        return statistics.stdev(self.values)


@dataclass(frozen=True)
class Cells:
    """All cells of a sweep, ordered by `sort_cells`, and the metric that ordered them.

    `full_steps`: optimizer steps of the whole sweep without stopping early, None if unknown.
    """

    cells: tuple[Cell, ...]
    metric: str
    goal: Goal
    full_steps: int | None

    @property
    def best(self) -> Cell | None:
        """The complete cell with the best mean."""
        return self.cells[0] if self.cells and self.cells[0].state == "complete" else None

    def near_best(self) -> list[Cell]:
        """Complete cells whose mean is within the best one's standard deviation, itself first."""
        best = self.best
        if best is None or best.mean is None:
            return []
        spread = best.sd or 0.0
        return [c for c in self.cells if c.mean is not None and abs(c.mean - best.mean) <= spread]


def sort_cells(cells: Iterable[Cell], goal: Goal) -> tuple[Cell, ...]:
    """Complete cells from the best to the worst, then stopped ones, then failed ones."""
    sign = 1 if goal == "minimize" else -1
    order = ("complete", "stopped", "failed")

    def key(cell: Cell) -> tuple[int, float, float]:
        value = cell.last if cell.mean is None else cell.mean
        # of the stopped ones, those that were stopped late first
        late = 0 if cell.state == "complete" else -cell.steps
        return order.index(cell.state), late, sign * (value or 0.0)

    return tuple(sorted(cells, key=key))


def load_logged(run_dirs: Iterable[Path]) -> list[Run]:
    """The runs that have logged a metric, in the order given."""
    logs = [(path, path / "metrics.jsonl") for path in run_dirs]
    return [load_run(path) for path, log in logs if log.exists() and log.stat().st_size]


def cell_of_runs(
    sweep: Sweep, setting: dict[str, Any], runs: Sequence[Run], state: State, note: str
) -> Cell:
    """A cell from the runs of its seeds, in their order, of which the last may be missing."""
    config, metric = sweep.load(setting), sweep.keys.metric.name
    ends = [(run, value) for run in runs if (value := end(run, metric)) is not None]
    errors = [y for run in runs for _, y in series(run, CONTROLLED["relative_error"])]
    if not all(math.isfinite(value) for _, value in ends):
        state, note = "failed", note or f"{metric} is not finite"
        ends = []
    return Cell(
        setting=setting,
        horizon=config.select.horizon,
        lr=config.optimizer.lr,
        state=state,
        values=tuple(value for run, value in ends if run.status == "finished"),
        last=statistics.fmean(value for _, value in ends) if ends else None,
        steps=sum(run.summary.get("steps", run.last_step) for run in runs),
        seconds=sum(run.metrics[-1][WALL_S] for run in runs),
        relative_error=statistics.fmean(errors) if errors else None,
        note=note,
    )


def cells_of(sweep: Sweep, cells: Iterable[Cell]) -> Cells:
    """Cells of a sweep as its result."""
    full = None
    if sweep.keys.method == "grid":
        settings = sweep.grid()[: sweep.keys.run_cap]
        full = max(1, len(sweep.seeds)) * sum(sweep.load(each).steps for each in settings)
    goal = sweep.keys.metric.goal
    return Cells(sort_cells(cells, goal), sweep.keys.metric.name, goal, full)
