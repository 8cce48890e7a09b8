"""Runs side by side: a metric over steps, samples, tokens or seconds, and its mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from selectflow.report.quantities import COUNTS, SCORED, STEP
from selectflow.report.runs import Run

Points = list[tuple[float, float]]
Floats = npt.NDArray[np.float64]
_MAX_POINTS = 200  # of a line: as many as a picture can show


@dataclass(frozen=True)
class Curve:
    """The mean of several runs as a line, with its standard deviation (0 for a single run)."""

    x: Floats
    mean: Floats
    sd: Floats


def series(run: Run, metric: str, over: str = STEP) -> Points:
    """A metric of a run against its steps, samples, tokens or seconds.

    Args:
        run: the run.
        metric: name of the metric.
        over: name of the metric on the x axis. Counts are 0 before the first step; samples that
            offline selection scored before it count.

    Returns:
        (x, value) for each line that has both; null values are left out.
    """
    upfront = run.offline.get("samples_scored", 0) if over == SCORED else 0
    found = []
    for line in run.metrics:
        x, y = line.get(over), line.get(metric)
        if x is None and over in COUNTS and line.get(STEP) == 0:
            x = 0
        if x is not None and y is not None:
            found.append((float(x) + upfront, float(y)))
    return found


def end(run: Run, metric: str) -> float | None:
    """The last value of a metric, None if it was never logged."""
    points = series(run, metric)
    return points[-1][1] if points else None


def total(run: Run, axis: str) -> float | None:
    """Where a run ends on an axis, what was spent before its first step included."""
    points = series(run, axis, axis)
    return points[-1][0] if points else None


def value_at(run: Run, metric: str, at: float | None, over: str = STEP) -> float | None:
    """The last value of a metric known at a step or second.

    Args:
        run: the run.
        metric: name of the metric.
        at: the step or second; None: not known.
        over: what `at` counts.

    Returns:
        The last value at or before `at`, None if there is none.
    """
    known = [] if at is None else [y for x, y in series(run, metric, over) if x <= at]
    return known[-1] if known else None


def first_reach(run: Run, metric: str, at_most: float, over: str = STEP) -> float | None:
    """The step or second of the first evaluation with a metric at or below a value; None: never."""
    return next((x for x, y in series(run, metric, over) if y <= at_most), None)


def common_end(runs: Sequence[Run], axis: str) -> float | None:
    """The largest step or second that all runs have reached; None where one does not log it.

    Runs that stay at 0, as those that score nothing on the axis of samples scored, do not count.
    """
    ends = [total(run, axis) for run in runs]
    if any(found is None for found in ends):
        return None
    return min((found for found in ends if found), default=None)


def binned(points: Points, num: int) -> Points:
    """At most `num` means of neighbouring points, for a metric too noisy to be drawn."""
    size = math.ceil(len(points) / num)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(statistics.fmean(x for x, _ in p), statistics.fmean(y for _, y in p)) for p in parts]


def curve(runs: Sequence[Run], metric: str, over: str = STEP, bins: int | None = None) -> Curve:
    """The mean line of runs of one group.

    Over samples or seconds a point is still a step: the mean place of all runs at that step, and
    the mean value there. So seeds that ran at different speeds are averaged at equal progress.

    Args:
        runs: the runs.
        metric: what is drawn.
        over: the x axis.
        bins: average each run to at most this many points first; None for no averaging.

    Returns:
        Mean and sample standard deviation at every step of any run, interpolated between the
        points of each, over the range that all of them cover, thinned to 200 points. Empty if a
        run lacks the metric or the axis.
    """
    lines = [series(run, metric) for run in runs]
    line = mean_curve(lines if bins is None else [binned(points, bins) for points in lines])
    if over == STEP or not line.x.size:
        return line
    places = [[(step, place) for place, step in series(run, STEP, over)] for run in runs]
    if not all(places):
        return _EMPTY
    x = np.mean([np.interp(line.x, *np.transpose(points)) for points in places], axis=0)
    return Curve(x, line.mean, line.sd)


_EMPTY = Curve(np.empty(0), np.empty(0), np.empty(0))


def mean_curve(lines: Sequence[Points]) -> Curve:
    """The mean of lines, given as points with rising x; see `curve`."""
    if not lines or not all(lines):
        return _EMPTY
    first, last = max(points[0][0] for points in lines), min(points[-1][0] for points in lines)
    x = np.array(sorted({x for points in lines for x, _ in points if first <= x <= last}))
    if x.size > _MAX_POINTS:
        x = x[np.linspace(0, x.size - 1, _MAX_POINTS).round().astype(int)]
    values = np.stack([np.interp(x, *np.transpose(points)) for points in lines])
    sd = values.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros_like(x)
    return Curve(x, values.mean(axis=0), sd)
