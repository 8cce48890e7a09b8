"""The cells of a sweep: settings of the parameters, each with what its runs came to."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

State = Literal["complete", "stopped", "failed"]


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep's parameters.

    Attributes:
        setting: values of the parameters by dotted key.
        horizon: select.horizon of its runs.
        lr: optimizer.lr of its runs.
        state: complete: every seed ran to its end; stopped early; or failed.
        values: the metric at the end of each finished run, in the order of seeds.
        last: the value at which it was stopped; for a complete cell, the mean of `values`.
        steps: optimizer steps of all of its runs.
        seconds: of training and selection of all of its runs.
        relative_error: mean of `select/relative_error` over its runs, None if not logged.
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
    """All cells of a sweep, best first.

    Attributes:
        cells: complete ones by their mean, then the others.
        metric: its name.
        goal: minimize or maximize.
        full_steps: optimizer steps of the whole sweep without stopping early, None if unknown.
    """

    cells: tuple[Cell, ...]
    metric: str
    goal: Literal["minimize", "maximize"]
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


def sort_cells(cells: Sequence[Cell], goal: Literal["minimize", "maximize"]) -> tuple[Cell, ...]:
    """Complete cells from the best to the worst, then stopped ones, then failed ones."""
    sign = 1 if goal == "minimize" else -1
    order = ("complete", "stopped", "failed")

    def key(cell: Cell) -> tuple[int, float, float]:
        value = cell.last if cell.mean is None else cell.mean
        # of the stopped ones, those that were stopped late first
        late = 0 if cell.state == "complete" else -cell.steps
        return order.index(cell.state), late, sign * value if value is not None else 0.0

    return tuple(sorted(cells, key=key))


def to_table(found: Cells) -> Table:
    """The cells as a table of the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    keys = _varied(found)
    for key in keys:
        table.add_column(key.replace(".", ".\n", 1), justify="right")
    for head in (f"{found.metric}\nat the end", "seeds", "steps", "seconds", "relative\nerror", ""):
        table.add_column(head, justify="right")
    for cell in found.cells:
        table.add_row(
            *(str(cell.setting[key]) for key in keys),
            _mean_sd(cell),
            str(len(cell.values)),
            str(cell.steps),
            f"{cell.seconds:.1f}",
            "-" if cell.relative_error is None else f"{cell.relative_error:.2g}",
            _ending(cell),
        )
    return table


def _ending(cell: Cell) -> str:
    if cell.state == "complete":
        return ""
    return f"failed: {cell.note}" if cell.state == "failed" else f"stopped at {cell.last:.4g}"


def _varied(found: Cells) -> list[str]:
    """The parameters that differ between cells."""
    keys = list(found.cells[0].setting) if found.cells else []
    return [key for key in keys if len({str(cell.setting[key]) for cell in found.cells}) > 1]


def _mean_sd(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return f"{cell.mean:.4f}" if cell.sd is None else f"{cell.mean:.4f} ± {cell.sd:.4f}"


def print_cells(found: Cells) -> None:
    """Print the table, what it cost and what is best, to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(to_table(found))
    print(cost(found))
    if found.best is None:
        print("no cell was run to its end: there is no best one")
        return
    near = len(found.near_best()) - 1
    setting = " ".join(f"{key}={found.best.setting[key]}" for key in _varied(found))
    num_seeds = len(found.best.values)
    print(f"best: {setting}, {found.metric} {_mean_sd(found.best)} over {num_seeds} seeds")
    if near:
        print(f"{near} more within its standard deviation: no difference seen between those")


def cost(found: Cells) -> str:
    """What a sweep took, in optimizer steps, also as a share of all of its cells run to the end."""
    steps, seconds = sum(c.steps for c in found.cells), sum(c.seconds for c in found.cells)
    stopped = sum(cell.state == "stopped" for cell in found.cells)
    share = f", {steps / found.full_steps:.0%} of {found.full_steps}" if found.full_steps else ""
    return (
        f"{len(found.cells)} cells, {stopped} of them stopped early: "
        f"{steps} optimizer steps{share}, {seconds:.1f} s of training"
    )


def write_cells(found: Cells, path: Path) -> None:
    """Write every cell with all its digits as CSV.

    Raises:
        OSError: the file cannot be written.
    """
    keys = list(found.cells[0].setting) if found.cells else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = ["state", f"{found.metric}_mean", f"{found.metric}_sd", "num_seeds", "last"]
        writer.writerow([*keys, *heads, "steps", "seconds", "relative_error", "note"])
        for cell in found.cells:
            values = [cell.state, cell.mean, cell.sd, len(cell.values), cell.last, cell.steps]
            rest = [cell.seconds, cell.relative_error, cell.note]
            writer.writerow([*(cell.setting[key] for key in keys), *values, *rest])
