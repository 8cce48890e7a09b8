"""The cells of a sweep: read from the runs' directories, and shown as table, CSV and map.

A field of the map is the best cell of the sweep at that horizon and learning rate. The safe region
is where the runs' own estimate of their relative error, `select/relative_error`, is on average at
most the tolerance: there the first-order prediction that selects is expected to hold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich import box
from rich.table import Table

from selectflow.control.rules import AutoHorizon
from selectflow.report.runs import Run, end, load_run, series
from selectflow.report.tables import terminal, write_csv
from selectflow.run.config import known_keys
from selectflow.run.metrics import CONTROLLED, WALL_S
from selectflow.run.yaml import dump_yaml, read_yaml, set_key
from selectflow.tune.space import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

State = Literal["complete", "stopped", "failed"]
Goal = Literal["minimize", "maximize"]
Fields = list[list["Cell | None"]]
_SAFE = "#D55E00"  # Okabe and Ito's vermilion: seen on every tone of viridis
_MAX_COLUMNS = 12  # more learning rates than that share columns


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep's parameters, with the results of its runs.

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
    config = sweep.load(setting)
    ends = [(run, value) for run in runs if (value := end(run, sweep.keys.metric.name)) is not None]
    errors = [y for run in runs for _, y in series(run, CONTROLLED["relative_error"])]
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


# --- shown --------------------------------------------------------------------------------


def write_outputs(sweep: Sweep, found: Cells, out: Path) -> list[Path]:
    """Print the cells, at least one, and write cells.csv, map.png and, for a best one, best.yaml.

    Returns:
        The paths of the files, in the directory `out`.

    Raises:
        OSError: a file cannot be written.
    """
    print_cells(found)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "cells.csv", out / "map.png"]
    write_csv(to_records(found), written[0])
    draw_map(found).savefig(written[1], format="png", dpi=150)
    if found.best is not None:
        written.append(out / "best.yaml")
        write_best(sweep, found, written[2])
    return written


def print_cells(found: Cells) -> None:
    """Print the table, its cost and the best cell, to stdout."""
    terminal().print(_table(found))
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


def _table(found: Cells) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    keys = _varied(found)
    heads = [key.replace(".", ".\n", 1) for key in keys]
    heads += [f"{found.metric}\nat the end", "seeds", "steps", "seconds", "relative\nerror", ""]
    for head in heads:
        table.add_column(head, justify="right")
    for cell in found.cells:
        ending = "" if cell.state == "complete" else f"failed: {cell.note}"
        if cell.state == "stopped":
            ending = f"stopped at {cell.last:.4g}"
        error = "-" if cell.relative_error is None else f"{cell.relative_error:.2g}"
        table.add_row(
            *(str(cell.setting[key]) for key in keys), _mean_sd(cell), str(len(cell.values)),
            str(cell.steps), f"{cell.seconds:.1f}", error, ending,
        )  # fmt: skip
    return table


def _varied(found: Cells) -> list[str]:
    """The parameters that differ between cells."""
    keys = list(found.cells[0].setting) if found.cells else []
    return [key for key in keys if len({str(cell.setting[key]) for cell in found.cells}) > 1]


def _mean_sd(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return f"{cell.mean:.4f}" if cell.sd is None else f"{cell.mean:.4f} ± {cell.sd:.4f}"


def cost(found: Cells) -> str:
    """The cost of a sweep in optimizer steps, also as a share of all cells run to their end."""
    steps, seconds = sum(c.steps for c in found.cells), sum(c.seconds for c in found.cells)
    stopped = sum(cell.state == "stopped" for cell in found.cells)
    share = f", {steps / found.full_steps:.0%} of {found.full_steps}" if found.full_steps else ""
    return (
        f"{len(found.cells)} cells, {stopped} of them stopped early: "
        f"{steps} optimizer steps{share}, {seconds:.1f} s of training"
    )


def to_records(found: Cells) -> list[dict[str, Any]]:
    """Every cell with all its digits, by the name of the column."""
    names = ("last", "steps", "seconds", "relative_error", "note")
    return [
        cell.setting
        | {"state": cell.state, f"{found.metric}_mean": cell.mean, f"{found.metric}_sd": cell.sd}
        | {"num_seeds": len(cell.values)}
        | {name: getattr(cell, name) for name in names}
        for cell in found.cells
    ]


def write_best(sweep: Sweep, found: Cells, path: Path) -> None:
    """Write the configuration of the best cell: the sweep's base with its setting.

    Raises:
        OSError: the file cannot be written.
    """
    assert found.best is not None
    values = read_yaml(sweep.config)
    for override in [f"name={sweep.name}-best-s{{seed}}", *sweep.arguments(found.best.setting)[1:]]:
        set_key(values, override, known_keys(), "select.horizon=2")
    size = f"{found.best.mean:.4g}" + (f" ± {found.best.sd:.2g}" if found.best.sd else "")
    head = (
        f"# The best of the {len(found.cells)} cells of the sweep {sweep.name}: {found.metric} "
        f"{size} over {len(found.best.values)} seeds.\n#\n"
        f"#   python {sweep.keys.program} {path} seed=0\n"
    )
    path.write_text(head + dump_yaml(values), encoding="utf-8")


def draw_map(found: Cells, tolerance: float = AutoHorizon.tolerance) -> Figure:
    """The final loss over horizon x learning rate, of at least one cell.

    Colour and number where a cell was run to its end, a star on the best; hatched with the last
    value where all were stopped early, a cross where all failed; a line round the fields of a
    relative error of at most `tolerance`, by default the controller's, where runs logged it.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    horizons = sorted(
        {cell.horizon for cell in found.cells}, key=lambda h: (1, 0) if h == "auto" else (0, h)
    )
    lrs = _columns([cell.lr for cell in found.cells])
    fields = _fields(found, horizons, lrs)
    size = (3.4 + 0.95 * len(lrs), 2.4 + 0.6 * len(horizons))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _draw_colours(axes, found, fields)
    for y, row in enumerate(fields):
        for x, cell in enumerate(row):
            if cell is not None and cell.mean is None:
                _draw_incomplete(axes, x, y, cell)
    axes.set_xticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
    names = ["∞ (offline)" if horizon == math.inf else str(horizon) for horizon in horizons]
    axes.set_yticks(range(len(horizons)), names)
    axes.set(xlabel="learning rate", ylabel="horizon H (optimizer updates)")
    axes.set(xlim=(-0.5, len(lrs) - 0.5), ylim=(-0.5, len(horizons) - 0.5))
    axes.set_title(f"{found.metric} at the end of the run, mean over seeds", fontsize=11)
    notes = ["★ best", "hatched: stopped early"]
    if _draw_safe(axes, fields, tolerance):
        notes.append(f"orange line: round the fields of predicted relative error ≤ {tolerance:g}")
    figure.supxlabel("    ".join(notes), fontsize=8.5, color="0.25")
    return figure


def _columns(lrs: Sequence[float]) -> list[float]:
    """The learning rates themselves, or where there are many, a few at equal ratios."""
    distinct = sorted(set(lrs))
    if len(distinct) <= _MAX_COLUMNS:
        return distinct
    edges = np.geomspace(distinct[0], distinct[-1], _MAX_COLUMNS + 1)
    return [float(middle) for middle in np.sqrt(edges[:-1] * edges[1:])]


def _fields(found: Cells, horizons: Sequence[float | str], lrs: Sequence[float]) -> Fields:
    """The best cell at each horizon and learning rate, None where there is none."""
    places: dict[tuple[int, int], list[Cell]] = {}
    for cell in found.cells:
        column = min(range(len(lrs)), key=lambda i: abs(math.log(lrs[i] / cell.lr)))
        places.setdefault((horizons.index(cell.horizon), column), []).append(cell)
    best = {place: sort_cells(cells, found.goal)[0] for place, cells in places.items()}
    return [[best.get((row, column)) for column in range(len(lrs))] for row in range(len(horizons))]


def _array(fields: Fields, name: str) -> np.ndarray:
    rows = [[getattr(cell, name, None) for cell in row] for row in fields]
    return np.array(rows, dtype=float)  # None becomes NaN


def _draw_colours(axes: Axes, found: Cells, fields: Fields) -> None:
    """Colour and number of the cells that were run to their end."""
    values = _array(fields, "mean")
    places = np.argwhere(np.isfinite(values))
    if not len(places):
        return
    edges = (np.arange(size + 1) - 0.5 for size in values.shape[::-1])
    mesh = axes.pcolormesh(
        *edges, values, norm=_scale(values[np.isfinite(values)]), edgecolors="white",
        cmap="viridis" if found.goal == "maximize" else "viridis_r",
    )  # fmt: skip
    for y, x in places:
        ink = "white" if sum(mesh.to_rgba(values[y, x])[:3]) < 1.5 else "black"
        text = f"{'★ ' if fields[y][x] is found.best else ''}{values[y, x]:.3g}"
        axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5)
    axes.figure.colorbar(mesh, ax=axes, label=f"{found.metric} ({found.goal}d)")


def _draw_incomplete(axes: Axes, x: int, y: int, cell: Cell) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    is_stopped = cell.state == "stopped"
    grey = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="0.96", edgecolor="0.8", lw=0)
    grey.set_hatch("///" if is_stopped else "")
    axes.add_patch(grey)
    text = f"{cell.last:.3g} after\n{cell.steps} steps" if is_stopped else "x"
    frame = {"facecolor": "0.96", "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="0.35", bbox=frame)


def _scale(means: np.ndarray) -> Normalize:
    """Logarithmic where the values differ by much; a few bad ones do not take all the colours."""
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415

    low, high = means.min(), means.max()
    if low > 0 and high > 3 * low:
        return LogNorm(low, min(high, 20 * low), clip=True)
    return Normalize(low, high if high > low else low + 1)


def _draw_safe(axes: Axes, fields: Fields, tolerance: float) -> bool:
    """A line between the fields that are predicted safe and the others; whether any was logged."""
    errors = _array(fields, "relative_error")
    safe = np.pad(errors <= tolerance, 1).astype(int)  # not so outside of the map; nor is NaN
    # between columns x - 1 and x, and between rows y - 1 and y
    lines = [([x, x], [y, y + 1]) for y, x in np.argwhere(np.diff(safe, axis=1)[1:-1])]
    lines += [([x, x + 1], [y, y]) for y, x in np.argwhere(np.diff(safe, axis=0)[:, 1:-1])]
    for xs, ys in lines:
        corners = np.array([xs, ys]) - 0.5
        axes.plot(*corners, color=_SAFE, lw=3.5, solid_capstyle="projecting", clip_on=False)
    return bool(np.isfinite(errors).any())
