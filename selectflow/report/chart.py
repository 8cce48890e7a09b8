"""Panels as PNG, in matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectflow.report.panels import Histogram, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def draw(panels: Sequence[Panel | Histogram], columns: int = 3) -> Figure:
    """Panels side by side, with one legend for the groups.

    Args:
        panels: at least one.
        columns: panels in a row, at most.

    Returns:
        The figure: the mean line of each group, and a band of one standard deviation over seeds.
    """
    # Imported here, so that training without a chart does not pay for it. A Figure of one's own
    # draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows + 0.6), layout="constrained")
    handles: dict[str, Line2D] = {}
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        if isinstance(panel, Panel):
            handles |= _draw_lines(axes, panel)
        else:
            _draw_histogram(axes, panel)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)  # else the grid crosses the lines of a histogram
        axes.spines[["top", "right"]].set_visible(False)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    return figure


def _draw_lines(axes: Axes, panel: Panel) -> dict[str, Line2D]:
    handles: dict[str, Line2D] = {}
    for line in panel.lines:
        x, mean, sd = line.curve.x, line.curve.mean, line.curve.sd
        style = (0, line.dash) if line.dash else "-"
        (handles[line.label],) = axes.plot(x, mean, linestyle=style, color=line.colour, lw=1.8)
        axes.fill_between(x, mean - sd, mean + sd, color=line.colour, alpha=0.18, linewidth=0)
    for y, name in panel.levels:
        axes.axhline(y, color="0.5", linewidth=1, linestyle=(0, (1, 1)))
        font = {"va": "bottom", "ha": "right", "color": "0.35", "fontsize": 9}
        # x in shares of the panel, y in data
        axes.text(0.99, y, name, font, transform=axes.get_yaxis_transform())
    if panel.from_zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    return handles


def _draw_histogram(axes: Axes, panel: Histogram) -> None:
    for line in panel.lines:
        style = (0, line.dash) if line.dash else "-"
        axes.stairs(line.curve.mean, panel.edges, color=line.colour, ls=style, label=line.label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def write_png(panels: Sequence[Panel | Histogram], path: Path, columns: int = 3) -> None:
    """Write the picture of `draw` as PNG.

    Args:
        panels: at least one.
        path: the file.
        columns: panels in a row, at most.

    Raises:
        OSError: the file cannot be written.
    """
    draw(panels, columns).savefig(path, format="png", dpi=150)
