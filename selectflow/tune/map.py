"""The map of a sweep: the final loss over horizon and learning rate, and where H is predicted safe.

A field of the map is the best cell of the sweep at that horizon and learning rate. The safe region
is where the runs' own estimate of their relative error, `select/relative_error`, is on average at
most the tolerance: there the first-order prediction that selects is expected to hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selectflow.control.rules import AutoHorizon
from selectflow.tune.cell_table import Cell, Cells, sort_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_SAFE = "#D55E00"  # Okabe and Ito's vermilion: seen on every tone of viridis
_MAX_COLUMNS = 12  # more learning rates than that share columns

Fields = list[list[Cell | None]]


def draw_map(found: Cells, tolerance: float = AutoHorizon.tolerance) -> Figure:
    """The final loss over horizon x learning rate.

    Args:
        found: the cells of a sweep, at least one.
        tolerance: largest relative error that is called safe; unless told, the controller's.

    Returns:
        The figure: colour and number where a cell was run to its end, a star on the best; hatched
        with the last value where all were stopped early, a cross where all failed; a line round
        what the error proxy predicts to be safe, where runs logged it.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    horizons = sorted({cell.horizon for cell in found.cells}, key=_horizon_order)
    lrs = _columns([cell.lr for cell in found.cells])
    fields = _fields(found, horizons, lrs)
    size = (3.4 + 0.95 * len(lrs), 2.4 + 0.6 * len(horizons))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _draw_fields(axes, found, fields)
    axes.set_xticks(range(len(lrs)), [f"{lr:.3g}" for lr in lrs])
    axes.set_yticks(range(len(horizons)), [_horizon_name(horizon) for horizon in horizons])
    axes.set(xlabel="learning rate", ylabel="horizon H (optimizer updates)")
    axes.set_xlim(-0.5, len(lrs) - 0.5)
    axes.set_ylim(-0.5, len(horizons) - 0.5)
    axes.set_title(f"{found.metric} at the end of the run, mean over seeds", fontsize=11)
    notes = ["★ best", "hatched: stopped early"]
    if _draw_safe(axes, fields, tolerance):
        notes.append(f"orange line: round the fields of predicted relative error ≤ {tolerance:g}")
    figure.supxlabel("    ".join(notes), fontsize=8.5, color="0.25")
    return figure


def write_map(found: Cells, path: Path) -> None:
    """Write the picture of `draw_map` as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    draw_map(found).savefig(path, format="png", dpi=150)


def _columns(lrs: Sequence[float]) -> list[float]:
    """The learning rates themselves, or where there are many, a few at equal ratios."""
    distinct = sorted(set(lrs))
    if len(distinct) <= _MAX_COLUMNS:
        return distinct
    low, high = math.log(distinct[0]), math.log(distinct[-1])
    width = (high - low) / _MAX_COLUMNS
    return [math.exp(low + (index + 0.5) * width) for index in range(_MAX_COLUMNS)]


def _fields(found: Cells, horizons: Sequence[float | str], lrs: Sequence[float]) -> Fields:
    """The best cell at each horizon and learning rate, None where there is none."""
    places: dict[tuple[int, int], list[Cell]] = {}
    for cell in found.cells:
        column = min(range(len(lrs)), key=lambda i: abs(math.log(lrs[i] / cell.lr)))
        places.setdefault((horizons.index(cell.horizon), column), []).append(cell)
    best = {place: sort_cells(cells, found.goal)[0] for place, cells in places.items()}
    return [[best.get((row, column)) for column in range(len(lrs))] for row in range(len(horizons))]


def _draw_fields(axes: Axes, found: Cells, fields: Fields) -> None:
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415

    means = [cell.mean for row in fields for cell in row if cell and cell.mean is not None]
    name = "viridis" if found.goal == "maximize" else "viridis_r"
    colours = ScalarMappable(_scale(means), name)
    for y, row in enumerate(fields):
        for x, cell in enumerate(row):
            if cell is not None and cell.mean is not None:
                colour = tuple(colours.to_rgba(np.array([cell.mean]))[0])
                _draw_complete(axes, x, y, cell.mean, colour, is_best=cell is found.best)
            elif cell is not None:
                _draw_incomplete(axes, x, y, cell)
    if means:
        axes.figure.colorbar(colours, ax=axes, label=f"{found.metric} ({found.goal}d)")


def _draw_complete(
    axes: Axes, x: int, y: int, mean: float, colour: tuple[float, ...], *, is_best: bool
) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
    ink = "white" if sum(colour[:3]) < 1.5 else "black"
    text = f"{'★ ' if is_best else ''}{mean:.3g}"
    axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=9.5)


def _draw_incomplete(axes: Axes, x: int, y: int, cell: Cell) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    is_stopped = cell.state == "stopped"
    grey = Rectangle(
        (x - 0.5, y - 0.5), 1, 1, facecolor="0.96", edgecolor="0.8", lw=0,
        hatch="///" if is_stopped else None,
    )  # fmt: skip
    axes.add_patch(grey)
    text = f"{cell.last:.3g} after\n{cell.steps} steps" if is_stopped else "x"
    box = {"facecolor": "0.96", "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="0.35", bbox=box)


def _scale(means: Sequence[float]) -> Normalize:
    """Logarithmic where the values differ by much; a few bad ones do not take all the colours."""
    from matplotlib.colors import LogNorm, Normalize  # noqa: PLC0415

    if not means:
        return Normalize(0, 1)
    low, high = min(means), max(means)
    if low > 0 and high > 3 * low:
        return LogNorm(low, min(high, 20 * low), clip=True)
    return Normalize(low, high if high > low else low + 1)


def _draw_safe(axes: Axes, fields: Fields, tolerance: float) -> bool:
    """The border between fields that are predicted safe and those that are not; whether any was."""

    def is_safe(y: int, x: int) -> bool:
        inside = 0 <= y < len(fields) and 0 <= x < len(fields[0])
        cell = fields[y][x] if inside else None
        return bool(cell and cell.relative_error is not None and cell.relative_error <= tolerance)

    for y, row in enumerate(fields):
        for x in range(len(row)):
            if not is_safe(y, x):
                continue
            for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
                if not is_safe(y + dy, x + dx):
                    xs = [x + 0.5 * dx] * 2 if dx else [x - 0.5, x + 0.5]
                    ys = [y + 0.5 * dy] * 2 if dy else [y - 0.5, y + 0.5]
                    axes.plot(
                        xs, ys, color=_SAFE, lw=3.5, solid_capstyle="projecting", clip_on=False
                    )
    return any(cell and cell.relative_error is not None for row in fields for cell in row)


def _horizon_order(horizon: float | str) -> tuple[bool, float]:
    return (True, 0.0) if isinstance(horizon, str) else (False, horizon)


def _horizon_name(horizon: float | str) -> str:
    return "∞ (offline)" if horizon == math.inf else str(horizon)
