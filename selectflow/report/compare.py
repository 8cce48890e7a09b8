"""Runs side by side: aligned by step or by wall-clock, averaged over seeds."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from selectflow.report.runs import ReportError, Run

STEP = "train/step"
WALL = "perf/wall_s"  # seconds of training so far, evaluation not counted
SELECT = "perf/select_s"  # seconds of them spent on choosing
ACCURACY = "test/accuracy"
KEPT_ALTERED = "select/kept_altered"  # share of altered labels among the kept

Points = list[tuple[float, float]]

# Runs that differ in these are not of one task, and a table of them would mislead.
_TASK = ("data.name", "data.label_noise", "model.name", "model.hidden", "model.width")
# Runs of one group may differ in these: the seeds, and what does not change the result.
_FREE = ("name", "root", "seed", "overwrite", "device", "num_threads", "data.root", "data.seed")
_LOOK_AHEAD = ("horizon", "interval", "derivative", "curvature", "nominal", "memory_gib")


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; `sd` is None for a single one."""

    mean: float
    sd: float | None
    num: int


@dataclass(frozen=True)
class Curve:
    """The mean of several runs as a line, with its standard deviation (0 for a single run)."""

    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    sd: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One group of a comparison; a value is None where one of its runs does not have it."""

    label: str
    num_runs: int
    steps: Stat | None
    wall_s: Stat | None
    accuracy: Stat | None  # at the end of each run
    accuracy_at_step: Stat | None
    uniform_in_same_time: Stat | None  # uniform with the same seed, when each run ended
    kept_altered: Stat | None  # mean over the run
    select_share: Stat | None  # of perf/wall_s


@dataclass(frozen=True)
class Comparison:
    """All groups, and the step at which they are compared."""

    rows: list[Row]
    step: float | None


def series(run: Run, metric: str, over: str = STEP) -> Points:
    """A metric of a run against its steps or its seconds.

    Args:
        run: the run.
        metric: name of the metric.
        over: name of the metric on the x axis.

    Returns:
        (x, value) for each line that has both; null values are left out.
    """
    lines = [(line.get(over), line.get(metric)) for line in run.metrics]
    return [(float(x), float(y)) for x, y in lines if x is not None and y is not None]


def value_at(run: Run, metric: str, at: float | None, over: str = STEP) -> float | None:
    """The last value of a metric known at a step or second.

    Args:
        run: the run.
        metric: name of the metric.
        at: the step or second; None for the end of the run.
        over: what `at` counts.

    Returns:
        The last value at or before `at`, None if there is none.
    """
    known = [y for x, y in series(run, metric, over) if at is None or x <= at]
    return known[-1] if known else None


def stat(values: Sequence[float | None]) -> Stat | None:
    """Mean and sample standard deviation, None if a value is missing or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Stat(statistics.fmean(known), sd, len(known))


def label(run: Run) -> str:
    """The strategy of a run, with its horizon H and interval K if it looks ahead."""
    select = run.config.get("select", {})
    strategy = str(select.get("strategy"))
    if strategy != "influence":
        return strategy
    return f"{strategy} H={select.get('horizon')} K={select.get('interval')}"


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seeds only, by label.

    Args:
        runs: runs of one task.

    Returns:
        Runs by label in order of appearance. Where runs of one label differ in an option, the
        option is part of the label.

    Raises:
        ReportError: the runs are of different tasks, or two of one group have the same seed.
    """
    configs = {id(run): dict(_flat(run.config)) for run in runs}
    _check_task(runs, configs)
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = [configs[id(other)] for other in runs if label(other) == label(run)]
        options = sorted({key for config in same for key in config if _counts(key, label(run))})
        mine = configs[id(run)]
        extra = [
            f"{key.rpartition('.')[2]}={mine.get(key)}"
            for key in options
            if any(config.get(key) != mine.get(key) for config in same)
        ]
        found.setdefault(" ".join([label(run), *extra]), []).append(run)
    for name, members in found.items():
        _check_seeds(name, members)
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _counts(key: str, of: str) -> bool:
    unused = () if of.startswith("influence") else tuple(f"select.{name}" for name in _LOOK_AHEAD)
    return key not in (*_FREE, *unused) and not key.startswith("track.")


def _check_task(runs: Sequence[Run], configs: Mapping[int, Mapping[str, Any]]) -> None:
    for one, two in pairwise(runs):
        for key in _TASK:
            first, second = configs[id(one)].get(key), configs[id(two)].get(key)
            if first != second:
                raise ReportError(
                    f"runs must be of one task, got {key} {first!r} in {one.path} and {second!r} "
                    f"in {two.path}; compare them separately"
                )


def _check_seeds(name: str, members: Sequence[Run]) -> None:
    seen: dict[tuple[Any, Any], Run] = {}
    for run in members:
        seed = _seed(run)
        if seed in seen:
            raise ReportError(
                f"runs of one group must differ in their seeds, got seed {seed[0]} twice in "
                f"{name!r}: {seen[seed].path} and {run.path}; leave one out"
            )
        seen[seed] = run


def summarize(runs: Sequence[Run]) -> Comparison:
    """The groups at their ends, at equal steps, and against uniform at equal wall-clock.

    Args:
        runs: runs of one task.

    Returns:
        One row per group. Equal steps: the smallest last step of all runs. Equal wall-clock: what
        the uniform run of the same seed had reached at the second at which a run ended; None
        unless there is one for every seed that was run for so long.

    Raises:
        ReportError: see `groups`.
    """
    found = groups(runs)
    step = _common_last_step(runs)
    baselines = {_seed(run): run for run in runs if label(run) == "uniform"}
    rows = [_row(name, members, step, baselines) for name, members in found.items()]
    return Comparison(rows, step)


def _seed(run: Run) -> tuple[Any, Any]:
    return run.config.get("seed"), run.config.get("data", {}).get("seed")


def _common_last_step(runs: Sequence[Run]) -> float | None:
    ends = [value_at(run, STEP, None) for run in runs]
    known = [end for end in ends if end is not None]
    return min(known) if len(known) == len(runs) else None


def _row(
    name: str, members: Sequence[Run], step: float | None, baselines: Mapping[Any, Run]
) -> Row:
    def end(metric: str) -> Stat | None:
        return stat([value_at(run, metric, None) for run in members])

    at_step = [None if step is None else value_at(run, ACCURACY, step) for run in members]
    return Row(
        label=name,
        num_runs=len(members),
        steps=end(STEP),
        wall_s=end(WALL),
        accuracy=end(ACCURACY),
        accuracy_at_step=stat(at_step),
        uniform_in_same_time=stat([_in_same_time(run, baselines) for run in members]),
        kept_altered=stat([_mean(series(run, KEPT_ALTERED)) for run in members]),
        select_share=stat([_select_share(run) for run in members]),
    )


def _in_same_time(run: Run, baselines: Mapping[Any, Run]) -> float | None:
    baseline, end = baselines.get(_seed(run)), value_at(run, WALL, None)
    if baseline is None or baseline is run or end is None:
        return None
    longest = value_at(baseline, WALL, None)
    if longest is None or longest < end:
        return None  # uniform may have gone on to something better or worse
    return value_at(baseline, ACCURACY, end, WALL)


def _mean(points: Points) -> float | None:
    return statistics.fmean(y for _, y in points) if points else None


def _select_share(run: Run) -> float | None:
    select_s, wall_s = value_at(run, SELECT, None), value_at(run, WALL, None)
    return select_s / wall_s if select_s is not None and wall_s else None


def binned(points: Points, num: int) -> Points:
    """At most `num` means of neighbouring points, for a metric too noisy to be drawn."""
    size = math.ceil(len(points) / num)
    parts = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(statistics.fmean(x for x, _ in p), statistics.fmean(y for _, y in p)) for p in parts]


def curve(runs: Sequence[Run], metric: str, over: str = STEP, bins: int | None = None) -> Curve:
    """The mean line of runs of one group.

    Args:
        runs: the runs.
        metric: what is drawn.
        over: the x axis.
        bins: average each run to at most this many points first; None for no averaging.

    Returns:
        Mean and sample standard deviation at every x of any run, interpolated between the points
        of each, over the range that all of them cover. Empty if a run lacks the metric.
    """
    lines = [series(run, metric, over) for run in runs]
    if bins is not None:
        lines = [binned(points, bins) for points in lines]
    empty = np.empty(0)
    if not all(lines):
        return Curve(empty, empty, empty)
    first, last = max(points[0][0] for points in lines), min(points[-1][0] for points in lines)
    x = np.array(sorted({x for points in lines for x, _ in points if first <= x <= last}))
    values = np.stack([np.interp(x, *np.transpose(points)) for points in lines])
    sd = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(x)
    return Curve(x, values.mean(axis=0), sd)
