"""The pictures of a comparison: what they show, as panels, and their drawing by matplotlib."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectflow.report.compare import Comparison
from selectflow.report.groups import Groups
from selectflow.report.runs import KEPT, KEPT_ALTERED, Points, Run, end, series, total
from selectflow.report.tables import AXES, DYNAMICS, Quantity, quantity
from selectflow.run.metrics import (
    HORIZON,
    KEPT_FRACTION,
    SOURCE_KEPT,
    SOURCE_SHARE,
    STEP,
    TARGET_LOSS,
    TEST_LOSS,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; their yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# a second mark, for print and for an eighth group; lengths of dash and gap in units of the line
DASHES = ((), (5, 2), (1.5, 1.5), (5, 1.5, 1.5, 1.5))
_TEXT, _SOFT, _RULE = "#1c1f23", "#5b626b", "#e0e3e6"
_VARIABLES = {colour: f"--c{place}" for place, colour in enumerate(COLOURS)} | {
    _TEXT: "--text", _SOFT: "--soft", _RULE: "--rule",
}  # fmt: skip
_MAX_POINTS = 200  # of a line: as many as a picture can show
_MAX_SOURCES = 8  # that are drawn
_KEPT_BINS = 25  # 16 examples of one step say little about the share of altered labels
Floats = npt.NDArray[np.float64]

EDGES: Floats = np.linspace(-4, 4, 41)
"""Edges of the bins of standardised scores; the outermost also count what lies beyond."""


# --- mean lines -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The mean of several runs as a line, with its standard deviation (0 for a single run).

    NaN where the value of one of them is not finite.
    """

    x: Floats
    mean: Floats
    sd: Floats


_EMPTY = Curve(np.empty(0), np.empty(0), np.empty(0))


def binned(points: Points, num: int) -> Points:
    """At most `num` means of neighbouring points, for a metric too noisy to be drawn."""
    size = math.ceil(len(points) / num)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(statistics.fmean(x for x, _ in p), statistics.fmean(y for _, y in p)) for p in parts]


def mean_curve(lines: Sequence[Points], scale: float = 1.0) -> Curve:
    """The mean of lines, given as points with rising x, times `scale`; see `curve`."""
    if not lines or not all(lines):
        return _EMPTY
    first, last = max(points[0][0] for points in lines), min(points[-1][0] for points in lines)
    x = np.array(sorted({x for points in lines for x, _ in points if first <= x <= last}))
    if x.size > _MAX_POINTS:
        x = x[np.linspace(0, x.size - 1, _MAX_POINTS).round().astype(int)]
    values = np.stack([np.interp(x, *np.transpose(points)) for points in lines])
    sd = values.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros_like(x)
    return Curve(x, scale * values.mean(axis=0), scale * sd)


def curve(
    runs: Sequence[Run], metric: str, over: str = STEP, bins: int | None = None, scale: float = 1.0
) -> Curve:
    """The mean line of runs of one group.

    Over samples or seconds a point is still a step: the mean place of all runs at that step, and
    the mean value there. So seeds that ran at different speeds are averaged at equal progress.

    Args:
        bins: average each run to at most this many points first; None for no averaging.
        scale: factor of the values.

    Returns:
        Mean and sample standard deviation at every step of any run, interpolated between the
        points of each, over the range that all of them cover, thinned to 200 points. Empty if a
        run lacks the metric or the axis.
    """
    lines = [series(run, metric) for run in runs]
    line = mean_curve([points if bins is None else binned(points, bins) for points in lines], scale)
    if over == STEP or not line.x.size:
        return line
    places = [[(step, place) for place, step in series(run, STEP, over)] for run in runs]
    if not all(places):
        return _EMPTY
    x = np.mean([np.interp(line.x, *np.transpose(points)) for points in places], axis=0)
    return Curve(x, line.mean, line.sd)


# --- panels ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The mean line of a group, in shown units; its place among them decides colour and dashes."""

    label: str
    place: int
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """Lines over one axis; labels have their units.

    Attributes:
        title: of the picture.
        x_label: quantity and unit.
        y_label: quantity and unit.
        lines: one for each group.
        levels: horizontal lines, (y, name).
        from_zero: whether the y axis includes 0.
        edges: of the bins of a histogram, whose lines have the share of each bin as `mean`.
    """

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    levels: list[tuple[float, str]] = field(default_factory=list)
    from_zero: bool = False
    edges: Floats | None = None


def axes_of(comparison: Comparison) -> list[Quantity]:
    """The axes on which at least one run goes on: steps, samples seen and scored, tokens, time."""
    return [axis for axis in AXES if any(total(run, axis.metric) for run in comparison.all_runs)]


def curves(comparison: Comparison, axis: Quantity) -> list[Panel]:
    """Quality and losses over one axis."""
    names = dict.fromkeys((comparison.quality, comparison.loss, TEST_LOSS, TARGET_LOSS))
    panels = [_panel(comparison.runs, quantity(metric), axis) for metric in names]
    return [panel for panel in panels if panel.lines]


def selection(
    comparison: Comparison, shares: Mapping[str, Mapping[str, Points]] | None = None
) -> list[Panel]:
    """Shares among the kept, horizon, learning rate and domains (see `domains`), over steps."""
    runs = comparison.all_runs
    found = {name for run in runs for line in run.metrics for name in line if name.startswith(KEPT)}
    panels = kept_shares(comparison, sorted(found - {KEPT_FRACTION}))
    for shown in DYNAMICS:
        panel = _panel(comparison.runs, shown, AXES[0], from_zero=True)
        means = [line.curve.mean for line in panel.lines]
        # a constant, as the learning rate may be, says nothing
        if means and (shown.metric == HORIZON or np.ptp(np.concatenate(means))):
            panels.append(panel)
    return panels + sources(comparison) + domains(shares or {}, list(comparison.runs))


def sources(comparison: Comparison) -> list[Panel]:
    """Share of each source in the pools and the kept part of it, over steps.

    Of many sources those with the largest share in the last lines of the runs; none where no share
    was logged.
    """
    last: Counter[str] = Counter()
    for run in comparison.all_runs:
        for metric, share in (run.metrics[-1] if run.metrics else {}).items():
            if metric.startswith(SOURCE_SHARE):
                last[metric.removeprefix(SOURCE_SHARE)] += share
    metrics = [kind + name for name, _ in last.most_common(_MAX_SOURCES)
               for kind in (SOURCE_SHARE, SOURCE_KEPT)]  # fmt: skip
    panels = [_panel(comparison.runs, quantity(each), AXES[0], from_zero=True) for each in metrics]
    return [panel for panel in panels if panel.lines]


def kept_shares(comparison: Comparison, metrics: Iterable[str]) -> list[Panel]:
    """Shares among the kept over steps, by the metrics that say them; none where all are 0."""
    noise = comparison.task.get("data.label_noise")
    known = isinstance(noise, int | float) and comparison.task.get("data.name") == "digits"
    panels = []
    for shown in map(quantity, metrics):
        panel = _panel(comparison.runs, shown, AXES[0], _KEPT_BINS, from_zero=True)
        if known and shown.metric == KEPT_ALTERED:
            panel.levels.append((100 * float(noise), "in the stream"))  # type: ignore[arg-type]
        panels.append(panel)
    return [panel for panel in panels if any(line.curve.mean.any() for line in panel.lines)]


def domains(shares: Mapping[str, Mapping[str, Points]], names: Sequence[str]) -> list[Panel]:
    """Share of each domain among the kept over steps.

    Args:
        shares: group -> domain -> (step, share among the kept) of one of its runs.
        names: all groups, in order.
    """
    panels = []
    for domain in sorted(set().union(*shares.values())):
        lines = [
            Line(name, names.index(name), mean_curve([found[domain]], 100))
            for name, found in shares.items()
            if domain in found
        ]
        title = f"domain {domain} among the kept"
        label = f"{title}, one seed of each (%)"  # ledgers are large: one is read
        panels.append(Panel(title, AXES[0].label, label, lines, from_zero=True))
    return panels


def histograms(label: str, counts: Mapping[str, npt.NDArray[np.int64]]) -> list[Panel]:
    """Standardised scores of kept and rejected, and of altered and clean candidates, of a group.

    Args:
        counts: kind of candidate -> candidates in the bins of `EDGES`.
    """
    panels = []
    for names in (("kept", "rejected"), ("clean", "altered")):
        lines = [
            Line(name, place, Curve(EDGES[:-1], 100 * found / found.sum(), np.zeros(len(found))))
            for place, name in enumerate(names)
            if (found := counts.get(name)) is not None and found.any()
        ]
        if lines:
            title = f"{label}: {' and '.join(names)}"
            score = "score (standard deviations from the mean of its pool)"
            share = "share of each kind (%)"
            panels.append(Panel(title, score, share, lines, from_zero=True, edges=EDGES))
    return panels


def _panel(
    groups: Groups, shown: Quantity, axis: Quantity, bins: int | None = None, **how: Any
) -> Panel:
    lines = []
    for place, (name, members) in enumerate(groups.items()):
        # a group that scores nothing stays at 0 samples scored
        if axis.metric == STEP or all(end(run, axis.metric) for run in members):
            line = curve(members, shown.metric, axis.metric, bins, shown.scale)
            if line.x.size:
                lines.append(Line(name, place, line))
    return Panel(shown.title, axis.label, shown.label, lines, **how)


# --- drawing --------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], columns: int = 3, legend: bool = True) -> Figure:
    """Panels side by side: the mean of each group, and a band of one standard deviation.

    Args:
        panels: at least one. A line that ends before its group does, as a value is not finite, ends
            in a cross.
        columns: panels in a row, at most.
        legend: whether one legend below names the groups; histograms have their own.
    """
    # Imported here, so that training without a chart does not pay for it.
    from matplotlib import rc_context  # noqa: PLC0415

    with rc_context({"text.parse_math": False}):  # a label is text, and may have two dollar signs
        return _draw(panels, columns, legend)


def _draw(panels: Sequence[Panel], columns: int, legend: bool) -> Figure:
    # A Figure of one's own draws with Agg and leaves pyplot's global state alone.
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows + 0.6 * legend), layout="constrained")
    handles: dict[str, Any] = {}
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(panel.title, color=_TEXT)
        axes.set_xlabel(panel.x_label, color=_SOFT)
        axes.set_ylabel(panel.y_label, color=_SOFT)
        axes.tick_params(colors=_SOFT)
        axes.grid(color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)  # else the grid crosses the lines of a histogram
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_SOFT)
        found = _draw_lines(axes, panel)
        handles |= {} if panel.edges is not None else found
    if handles and legend:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
        )
    return figure


def _draw_lines(axes: Axes, panel: Panel) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for line in panel.lines:
        x, mean, sd = line.curve.x, line.curve.mean, line.curve.sd
        colour, dash = COLOURS[line.place % len(COLOURS)], DASHES[line.place % len(DASHES)]
        style: Any = (0, dash) if dash else "-"
        if panel.edges is not None:
            axes.stairs(mean, panel.edges, color=colour, ls=style, label=line.label)
            continue
        (handles[line.label],) = axes.plot(x, mean, ls=style, color=colour, lw=1.8)
        breaks = np.flatnonzero(np.isfinite(mean[:-1]) & np.isnan(mean[1:]))
        if breaks.size:
            axes.plot(x[breaks], mean[breaks], "x", color=colour, ms=8, mew=2)
        if sd.any():
            axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.18, linewidth=0)
    for y, name in panel.levels:
        axes.axhline(y, color=_SOFT, linewidth=1, linestyle=(0, (1, 1)))
        font = {"va": "bottom", "ha": "right", "color": _SOFT, "fontsize": 9}
        # x in shares of the panel, y in data
        axes.text(0.99, y, name, font, transform=axes.get_yaxis_transform())
    if panel.from_zero:
        low, high = axes.get_ylim()
        is_zero = not any(line.curve.mean.any() for line in panel.lines)  # a horizon of 0
        axes.set_ylim(min(0, low), 1 if is_zero else high)
    if panel.edges is not None:
        axes.legend(frameon=False, fontsize=9, labelcolor=_SOFT)
    return handles


def write_png(panels: Sequence[Panel], path: Path, columns: int = 3) -> None:
    """Write the picture of `draw` as PNG, at most `columns` panels in a row.

    Raises:
        OSError: the file cannot be written.
    """
    draw(panels, columns).savefig(path, format="png", dpi=150)


def to_svg(panel: Panel, name: str) -> str:
    """The svg element of a panel for an HTML page, the same for the same panel and name.

    `name` is unique in the page and begins the ids of the element's parts. Colours are variables
    of the page's style, so that both a light and a dark page work: --c0 to --c6 of lines, --text,
    --soft and --rule of the rest.
    """
    from matplotlib import rc_context  # noqa: PLC0415

    file = io.StringIO()
    # text as text: it can be searched and read aloud, and is smaller than outlines of letters
    style: Any = {"svg.fonttype": "none", "font.family": "DejaVu Sans"}
    style["svg.hashsalt"] = "selectflow"  # the same ids each time
    with rc_context(style):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw([panel], legend=False).savefig(file, format="svg", transparent=True, metadata=nothing)
    head, _, body = file.getvalue().partition("<svg")[2].partition(">")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour.lower(), f"var({variable})")
    box = re.search('viewBox="(.*?)"', head)
    assert box
    label = escape(f"{panel.y_label} over {panel.x_label}")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{body}'
