"""The final loss of a sweep's cells over horizon and learning rate, as a picture.

A field of the map is the best cell of the sweep at that horizon and learning rate. The safe region
is where the runs' own estimate of their relative error, `select/relative_error`, is on average at
most the tolerance: there the first-order prediction that selects is expected to hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from selectflow.control.ladder import AutoHorizon
from selectflow.tune.results import Cell, Cells, sort_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Fields = list[list["Cell | None"]]
_SAFE = "#D55E00"  # Okabe and Ito's vermilion: seen on every tone of viridis
_MAX_COLUMNS = 12  # more learning rates than that share columns


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
    title = f"{found.metric} at the end of the run, mean over seeds"
    axes.set_title(title, fontsize=11, parse_math=False)  # the metric is a user's text
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
