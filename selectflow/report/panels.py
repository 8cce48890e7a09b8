"""What the pictures of a comparison show, as data; `chart` draws it as PNG, `svg` on the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from selectflow.report.align import Curve, Floats, curve, end, mean_curve, total
from selectflow.report.compare import Comparison
from selectflow.report.groups import Groups
from selectflow.report.quantities import (
    AXES,
    HORIZON,
    KEPT,
    KEPT_ALTERED,
    LR_MULTIPLIER,
    STEP,
    TARGET_LOSS,
    TEST_LOSS,
    Quantity,
    quantity,
)
from selectflow.report.runs import Run
from selectflow.report.selected import EDGES, Selected

# Okabe and Ito's colours, told apart by the colour-blind; their yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# a second mark, for print and for an eighth group; lengths of dash and gap in units of the line
DASHES = ((), (5, 2), (1.5, 1.5), (5, 1.5, 1.5, 1.5))
_KEPT_BINS = 25  # 16 examples of one step say little about the share of altered labels
_DYNAMICS = (HORIZON, LR_MULTIPLIER, "train/lr", "select/relative_error", "select/trust_ratio")


@dataclass(frozen=True)
class Line:
    """The mean line of a group.

    Attributes:
        label: the group.
        place: its number among the groups, which decides colour and dashes.
        curve: mean and spread, in shown units.
    """

    label: str
    place: int
    curve: Curve

    @property
    def colour(self) -> str:
        """One of `COLOURS`."""
        return COLOURS[self.place % len(COLOURS)]

    @property
    def dash(self) -> tuple[float, ...]:
        """One of `DASHES`."""
        return DASHES[self.place % len(DASHES)]


@dataclass(frozen=True)
class Panel:
    """Lines over one axis; labels have their units. `levels` are horizontals, (y, name)."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    levels: list[tuple[float, str]] = field(default_factory=list)
    from_zero: bool = False


@dataclass(frozen=True)
class Histogram:
    """Shares of candidates by score; a line's curve has the share of each bin as `mean`."""

    title: str
    x_label: str
    y_label: str
    edges: Floats
    lines: list[Line]


def histograms(label: str, selected: Selected) -> list[Histogram]:
    """Standardised scores of kept and rejected, and of altered and clean candidates, of a group."""
    pairs = [("kept", "rejected"), ("clean", "altered")]
    panels = []
    for names in pairs:
        lines = []
        for place, name in enumerate(names):
            counts = selected.histograms.get(name)
            if counts is not None and counts.sum():
                share = 100 * counts / counts.sum()
                lines.append(Line(name, place, Curve(EDGES, share, np.zeros_like(share))))
        if lines:
            title = f"{label}: {' and '.join(names)}"
            score = "score (standard deviations from the mean of its pool)"
            panels.append(Histogram(title, score, "share of each kind (%)", EDGES, lines))
    return panels


def group_names(comparison: Comparison) -> list[str]:
    """Labels with the number of seeds, for a legend."""
    return [
        f"{row.label} ({row.num_runs} seed{'s' if row.num_runs > 1 else ''})"
        for row in comparison.rows
    ]


def axes_of(comparison: Comparison) -> list[Quantity]:
    """The axes on which at least one run goes on: steps, samples seen and scored, tokens, time."""
    return [axis for axis in AXES if any(total(run, axis.metric) for run in comparison.all_runs)]


def curves(comparison: Comparison, axis: Quantity) -> list[Panel]:
    """Quality and losses over one axis."""
    names = dict.fromkeys((comparison.quality, comparison.loss, TEST_LOSS, TARGET_LOSS))
    panels = []
    for metric in names:
        shown = quantity(metric)
        lines = _lines(comparison.runs, shown, axis)
        if lines:
            panels.append(Panel(shown.title, axis.label, shown.label, lines))
    return panels


def selection(comparison: Comparison) -> list[Panel]:
    """Shares among the kept, horizon and learning rate, over steps."""
    step, groups = AXES[0], comparison.runs
    panels = kept_shares(comparison, _kept_metrics(groups))
    for metric in _DYNAMICS:
        shown = quantity(metric)
        lines = _lines(groups, shown, step)
        if lines and not _is_flat(metric, lines):
            title = shown.title
            panels.append(Panel(title, step.label, shown.label, lines, from_zero=True))
    return panels


def kept_shares(comparison: Comparison, metrics: Iterable[str]) -> list[Panel]:
    """Shares among the kept over steps, by the metrics that say them; none where all are 0."""
    panels = []
    for metric in metrics:
        shown = quantity(metric)
        noise = comparison.task.get("data.label_noise")
        known = metric == KEPT_ALTERED and isinstance(noise, int | float)
        levels = [(100 * float(noise), "in the stream")] if known else []  # type: ignore[arg-type]
        lines = _lines(comparison.runs, shown, AXES[0], _KEPT_BINS)
        if any(line.curve.mean.any() for line in lines):
            panels.append(Panel(shown.title, AXES[0].label, shown.label, lines, levels, True))
    return panels


def domains(selected: dict[str, list[Selected]], names: Sequence[str]) -> list[Panel]:
    """Share of each domain among the kept over steps, from the ledgers.

    Args:
        selected: of each group, what its runs selected.
        names: all groups, in order.
    """
    known = sorted({domain for runs in selected.values() for run in runs for domain in run.domains})
    panels = []
    for domain in known:
        lines = []
        for name, runs in selected.items():
            points = [run.domain_share(domain) for run in runs]
            line = _scaled(mean_curve(points), 100)
            if line.x.size:
                lines.append(Line(name, names.index(name), line))
        title = f"domain {domain} among the kept"
        label = f"{title}, one seed of each (%)"  # ledgers are large: one is read
        panels.append(Panel(title, AXES[0].label, label, lines, from_zero=True))
    return panels


def _kept_metrics(groups: Groups) -> list[str]:
    runs = [run for members in groups.values() for run in members]
    found = {name for run in runs for line in run.metrics for name in line if name.startswith(KEPT)}
    return sorted(found - {"select/kept_fraction"})


def _is_flat(metric: str, lines: Iterable[Line]) -> bool:
    """Whether a picture would say nothing: one constant for all, as of a learning rate."""
    if metric == HORIZON:
        return False
    values = np.concatenate([line.curve.mean for line in lines])
    return bool(np.ptp(values) == 0)


def _lines(groups: Groups, shown: Quantity, axis: Quantity, bins: int | None = None) -> list[Line]:
    lines = []
    for place, (name, members) in enumerate(groups.items()):
        if not _goes_on(members, axis):
            continue
        line = _scaled(curve(members, shown.metric, axis.metric, bins), shown.scale)
        if line.x.size:
            lines.append(Line(name, place, line))
    return lines


def _goes_on(members: Sequence[Run], axis: Quantity) -> bool:
    """Whether a group moves on an axis: one that scores nothing stays at 0 samples scored."""
    ends = [end(run, axis.metric) for run in members]
    return axis.metric == STEP or all(ends)


def _scaled(line: Curve, scale: float) -> Curve:
    return Curve(line.x, scale * line.mean, scale * line.sd)
