"""A comparison as one picture: accuracy over steps and over time, and the noise that was kept."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from selectflow.report.compare import ACCURACY, KEPT_ALTERED, STEP, WALL, curve, groups
from selectflow.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")  # a second mark, for print and for an eighth group
_KEPT_BINS = 40  # 16 examples of one step say little about the share of altered labels


def draw(runs: Sequence[Run]) -> "Figure":
    """Test accuracy over steps and over seconds, and the share of altered labels kept.

    Args:
        runs: runs of one task.

    Returns:
        The figure: the mean line of each group, and a band of one standard deviation over seeds.

    Raises:
        ReportError: see `compare.groups`.
    """
    # Imported here, so that training without a chart does not pay for it. A Figure of one's own
    # draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = groups(runs)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    over_steps = figure.add_subplot(1, 3, 1)
    over_time = figure.add_subplot(1, 3, 2, sharey=over_steps)
    kept = figure.add_subplot(1, 3, 3)
    _panel(over_steps, found, ACCURACY, STEP)
    _panel(over_time, found, ACCURACY, WALL)
    _panel(kept, found, KEPT_ALTERED, STEP, bins=_KEPT_BINS)
    in_stream = runs[0].config.get("data", {}).get("label_noise")
    if in_stream is not None:
        kept.axhline(100 * in_stream, color="0.5", linewidth=1, linestyle=(0, (1, 1)))
        style = {"va": "bottom", "ha": "right", "color": "0.35", "fontsize": 9}
        where = kept.get_yaxis_transform()  # x in shares of the panel, y in data
        kept.text(0.99, 100 * in_stream + 1, "in the stream", style, transform=where)
    over_steps.set(title="at equal steps", xlabel="optimizer steps", ylabel="test accuracy (%)")
    over_time.set(title="at equal time", xlabel="training and selection time (s)")
    kept.set(title="noise kept", xlabel="optimizer steps", ylabel="altered labels among kept (%)")
    kept.set_ylim(bottom=0)
    handles, labels = over_steps.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panel(
    axes: "Axes", found: dict[str, list[Run]], metric: str, over: str, bins: int | None = None
) -> None:
    recorded = False
    marks = zip(cycle(_COLOURS), cycle(_STYLES), strict=False)
    for (name, members), (colour, style) in zip(found.items(), marks, strict=False):
        line = curve(members, metric, over, bins)
        recorded |= line.x.size > 0
        mean, sd = 100 * line.mean, 100 * line.sd
        seeds = f"{len(members)} seed{'s' if len(members) > 1 else ''}"
        axes.plot(line.x, mean, style, color=colour, label=f"{name} ({seeds})", linewidth=1.8)
        axes.fill_between(line.x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
    if not recorded:
        axes.text(0.5, 0.5, f"{metric} not recorded", transform=axes.transAxes, ha="center")
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def write_png(runs: Sequence[Run], path: Path) -> None:
    """Write the picture of `draw` as PNG.

    Args:
        runs: runs of one task.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    draw(runs).savefig(path, format="png", dpi=150)
