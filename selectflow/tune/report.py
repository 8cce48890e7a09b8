"""The cells of a sweep as a table, as CSV and as a map over horizon and learning rate.

A field of the map is the best cell of the sweep at that horizon and learning rate. The safe region
is where the runs' own estimate of their relative error, `select/relative_error`, is on average at
most the tolerance: there the first-order prediction that selects is expected to hold.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from selectflow.control.rules import AutoHorizon
from selectflow.tune.record import Cell, Cells, sort_cells, write_best
from selectflow.tune.space import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_SAFE = "#D55E00"  # Okabe and Ito's vermilion: seen on every tone of viridis
_MAX_COLUMNS = 12  # more learning rates than that share columns

Fields = list[list[Cell | None]]


def write_outputs(sweep: Sweep, found: Cells, out: Path) -> list[Path]:
    """Print the cells, and write cells.csv, map.png and, where a cell is complete, best.yaml.

    Args:
        sweep: the sweep.
        found: its cells, at least one.
        out: the directory of the files.

    Returns:
        The paths of the files.

    Raises:
        OSError: a file cannot be written.
    """
    print_cells(found)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "cells.csv", out / "map.png"]
    write_cells(found, written[0])
    write_map(found, written[1])
    if found.best is not None:
        written.append(out / "best.yaml")
        write_best(sweep, found, written[2])
    return written


def print_cells(found: Cells) -> None:
    """Print the table, its cost and the best cell, to stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(_table(found))
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


def cost(found: Cells) -> str:
    """The cost of a sweep in optimizer steps, also as a share of all cells run to their end."""
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


def write_map(found: Cells, path: Path) -> None:
    """Write the picture of `draw_map` as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    draw_map(found).savefig(path, format="png", dpi=150)


def draw_map(found: Cells, tolerance: float = AutoHorizon.tolerance) -> Figure:
    """The final loss over horizon x learning rate.

    Args:
        found: the cells of a sweep, at least one.
        tolerance: largest relative error that is called safe; by default the controller's.

    Returns:
        The figure: colour and number where a cell was run to its end, a star on the best; hatched
        with the last value where all were stopped early, a cross where all failed; a line round
        the fields that the error proxy predicts to be safe, where runs logged it.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    horizons = sorted({cell.horizon for cell in found.cells}, key=_horizon_order)
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


def _horizon_order(horizon: float | str) -> tuple[bool, float]:
    return (True, 0.0) if isinstance(horizon, str) else (False, horizon)


def _fields(found: Cells, horizons: Sequence[float | str], lrs: Sequence[float]) -> Fields:
    """The best cell at each horizon and learning rate, None where there is none."""
    places: dict[tuple[int, int], list[Cell]] = {}
    for cell in found.cells:
        column = min(range(len(lrs)), key=lambda i: abs(math.log(lrs[i] / cell.lr)))
        places.setdefault((horizons.index(cell.horizon), column), []).append(cell)
    best = {place: sort_cells(cells, found.goal)[0] for place, cells in places.items()}
    return [[best.get((row, column)) for column in range(len(lrs))] for row in range(len(horizons))]


def _array(fields: Fields, name: str) -> np.ndarray:
    """An attribute of the cells, (horizons, learning rates); NaN where there is none."""
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
    grey = Rectangle(
        (x - 0.5, y - 0.5), 1, 1, facecolor="0.96", edgecolor="0.8", lw=0,
        hatch="///" if is_stopped else None,
    )  # fmt: skip
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
