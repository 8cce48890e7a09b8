"""The comparison: groups at their ends, at equal steps and equal time, against a baseline."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selectflow.report.align import Points, common_end, end, first_reach, series, total, value_at
from selectflow.report.groups import Groups, differences, groups, label, task_of
from selectflow.report.notes import finished, lengths, resumed, too_short
from selectflow.report.quantities import (
    ACCURACY,
    KEPT_ALTERED,
    SCORED,
    SEEN,
    SELECT,
    STEP,
    TARGET_LOSS,
    TEST_LOSS,
    TOKENS,
    WALL,
)
from selectflow.report.runs import ReportError, Run
from selectflow.report.seeds import Paired, Stat, holm, paired, stat

_BASELINE = "uniform"
_QUALITIES = (ACCURACY, TEST_LOSS, TARGET_LOSS)


@dataclass(frozen=True)
class Row:
    """One group of a comparison; a value is None where one of its runs does not have it.

    Attributes:
        label: the strategy and what tells it from others.
        num_runs: seeds compared.
        num_left_out: runs of this label that did not finish and are left out.
        steps: optimizer steps at the end.
        samples_seen: samples trained on at the end.
        samples_scored: samples scored at the end, those of offline selection included.
        tokens_seen: tokens trained on at the end.
        wall_s: seconds of training and selecting, those before the first step included.
        upfront_s: seconds of recording and sweeping before the first step (offline).
        select_share: share of `wall_s` spent on choosing.
        overhead: seconds a step, `upfront_s` included, over those of the baseline.
        kept_altered: share of altered labels among the kept, mean over the run.
        quality: at the end of each run.
        quality_at_step: at the step that all runs have reached.
        quality_at_time: at the second that all runs have reached.
        baseline_in_same_time: quality of the baseline with the same seed when each run ended.
        loss: loss at the end.
        reach_step: steps to the loss to reach; None where a run never does.
        reach_s: seconds to it.
        num_reached: runs that reach it; None without such a loss.
        at_equal_steps: `quality_at_step` against the baseline's, by seed.
        in_same_time: `quality` against `baseline_in_same_time`, by seed.
    """

    label: str
    num_runs: int
    num_left_out: int
    steps: Stat | None
    samples_seen: Stat | None
    samples_scored: Stat | None
    tokens_seen: Stat | None
    wall_s: Stat | None
    upfront_s: Stat | None
    select_share: Stat | None
    overhead: Stat | None
    kept_altered: Stat | None
    quality: Stat | None
    quality_at_step: Stat | None
    quality_at_time: Stat | None
    baseline_in_same_time: Stat | None
    loss: Stat | None
    reach_step: Stat | None
    reach_s: Stat | None
    num_reached: int | None
    at_equal_steps: Paired | None
    in_same_time: Paired | None


@dataclass(frozen=True)
class Comparison:
    """All groups, and what they are compared by.

    Attributes:
        rows: a group each, in order of appearance.
        runs: the runs compared, by group.
        task: the options that all runs share.
        baseline: label of the group that the others are tested against.
        quality: metric by which they are judged.
        loss: metric of `Row.loss` and of the loss to reach.
        reach: the loss to reach; None: what the baseline with the same seed ends with.
        step: the step of `Row.quality_at_step`; None where it is not known.
        time_s: the second of `Row.quality_at_time`.
        notes: what a reader must know: runs left out, of different lengths, resumed.
    """

    rows: list[Row]
    runs: Groups
    task: dict[str, object]
    baseline: str
    quality: str
    loss: str
    reach: float | None
    step: float | None
    time_s: float | None
    notes: list[str]

    @property
    def all_runs(self) -> list[Run]:
        """The runs compared, one group after the other."""
        return [run for members in self.runs.values() for run in members]


def summarize(
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    quality: str | None = None,
    loss: str = TEST_LOSS,
    reach: float | None = None,
    partial: bool = False,
) -> Comparison:
    """Compare runs by group.

    Args:
        runs: runs of one task.
        baseline: label of the group to test against; None: "uniform", else the first one.
        quality: metric to judge by; None: the first of test/accuracy, test/loss and target/loss
            that all runs have.
        loss: metric of the loss to reach.
        reach: the loss to reach; None: for each run what the baseline with its seed ends with.
        partial: compare runs that have not finished as far as they got. Otherwise they are left
            out, unless none has finished.

    Raises:
        ReportError: no such baseline; else see `groups`.
    """
    kept, out, notes = finished(runs, partial)
    found = groups(kept)
    name = _baseline(found, baseline)
    judged, step, time_s = quality or _quality(kept), common_end(kept, STEP), common_end(kept, WALL)
    baselines = {run.seed: run for run in found[name]}
    known = _Known(name, baselines, judged, loss, reach, step, time_s)
    left = Counter(label(run) for run in out)
    rows = [_row(of, members, left[label(members[0])], known) for of, members in found.items()]
    untimed = [row.label for row in rows if row.wall_s and row.baseline_in_same_time is None]
    notes += [*lengths(found), *resumed(kept), *differences(found)]
    notes += too_short(name, [of for of in untimed if of != name])
    rows, task = _corrected(rows), task_of(kept)
    return Comparison(rows, found, task, name, judged, loss, reach, step, time_s, notes)


@dataclass(frozen=True)
class _Known:
    """What every row is compared by; see `Comparison`. Baselines are by seed."""

    baseline: str
    baselines: Mapping[tuple[Any, Any], Run]
    quality: str
    loss: str
    reach: float | None
    step: float | None
    time_s: float | None


def _baseline(found: Groups, wanted: str | None) -> str:
    if wanted is None:
        return _BASELINE if _BASELINE in found else next(iter(found))
    if wanted not in found:
        names = ", ".join(map(repr, found))
        raise ReportError(f"baseline must be one of {names}, got {wanted!r}; choose one of them")
    return wanted


def _quality(runs: Sequence[Run]) -> str:
    everywhere = (m for m in _QUALITIES if all(end(run, m) is not None for run in runs))
    return next(everywhere, ACCURACY)


def _row(name: str, members: Sequence[Run], left_out: int, known: _Known) -> Row:
    def at_end(metric: str) -> Stat | None:
        return stat([end(run, metric) for run in members])

    def at(place: float | None, axis: str) -> list[float | None]:
        return [value_at(run, known.quality, place, axis) for run in members]

    def over(axis: str) -> Stat | None:
        return stat([total(run, axis) for run in members])

    baselines = [known.baselines.get(run.seed) for run in members]
    at_step = at(known.step, STEP)
    baseline_at_step = [
        None if of is None else value_at(of, known.quality, known.step) for of in baselines
    ]
    ends = [end(run, known.quality) for run in members]
    same_time = [_in_same_time(run, known) for run in members]
    reached = [_reach(run, known) for run in members]
    num_reached = sum(place is not None for place in reached)
    asked = any(end(run, known.loss) is not None for run in members)
    is_baseline = name == known.baseline
    return Row(
        label=name,
        num_runs=len(members),
        num_left_out=left_out,
        steps=over(STEP),
        samples_seen=over(SEEN),
        samples_scored=over(SCORED),
        tokens_seen=over(TOKENS),
        wall_s=over(WALL),
        upfront_s=stat([_upfront_s(run) for run in members]),
        select_share=stat([_select_share(run) for run in members]),
        overhead=stat([_overhead(run, known.baselines) for run in members]),
        kept_altered=stat([_mean(series(run, KEPT_ALTERED)) for run in members]),
        quality=stat(ends),
        quality_at_step=stat(at_step),
        quality_at_time=stat(at(known.time_s, WALL)),
        baseline_in_same_time=None if is_baseline else stat(same_time),
        loss=at_end(known.loss),
        reach_step=stat([place and place[0] for place in reached]),
        reach_s=stat([place and place[1] for place in reached]),
        num_reached=num_reached if asked else None,
        at_equal_steps=None if is_baseline else _test(at_step, baseline_at_step),
        in_same_time=None if is_baseline else _test(ends, same_time),
    )


def _test(values: Sequence[float | None], others: Sequence[float | None]) -> Paired | None:
    """The paired test over the seeds that have both; None for fewer than two."""
    both = zip(values, others, strict=True)
    return paired([one - other for one, other in both if one is not None and other is not None])


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with p values corrected for the number of groups."""
    steps = holm([row.at_equal_steps for row in rows])
    times = holm([row.in_same_time for row in rows])
    tests = zip(rows, steps, times, strict=True)
    return [replace(row, at_equal_steps=one, in_same_time=two) for row, one, two in tests]


def _in_same_time(run: Run, known: _Known) -> float | None:
    """Quality of the baseline with the same seed at the second when a run ended."""
    baseline, ended = known.baselines.get(run.seed), end(run, WALL)
    longest = None if baseline is None else end(baseline, WALL)
    if baseline is None or ended is None or longest is None or longest < ended:
        return None  # it may have gone on to something better or worse
    return value_at(baseline, known.quality, ended, WALL)


def _reach(run: Run, known: _Known) -> tuple[float, float | None] | None:
    """Step and second at which a run first has the loss to reach, None where it never does."""
    wanted = known.reach
    if wanted is None:
        ends = {seed: end(of, known.loss) for seed, of in known.baselines.items()}
        values = [value for value in ends.values() if value is not None]
        wanted = ends.get(run.seed)
        if wanted is None and values:  # no baseline has its seed
            wanted = statistics.fmean(values)
    if wanted is None or (step := first_reach(run, known.loss, wanted)) is None:
        return None
    return step, first_reach(run, known.loss, wanted, WALL)


def _upfront_s(run: Run) -> float | None:
    found = run.offline.get("upfront_s", run.summary.get("perf/upfront_s"))
    return None if found is None else float(found)


def _select_share(run: Run) -> float | None:
    select_s, wall_s = end(run, SELECT), end(run, WALL)
    return select_s / wall_s if select_s is not None and wall_s else None


def _overhead(run: Run, baselines: Mapping[tuple[Any, Any], Run]) -> float | None:
    mine = _step_s(run)
    paces = [_step_s(of) for seed, of in baselines.items() if seed == run.seed]
    paces = paces or [_step_s(of) for of in baselines.values()]
    known = [pace for pace in paces if pace]
    return mine / statistics.fmean(known) if mine is not None and known else None


def _step_s(run: Run) -> float | None:
    wall_s, steps = end(run, WALL), run.last_step
    return wall_s / steps if wall_s is not None and steps else None


def _mean(points: Points) -> float | None:
    return statistics.fmean(y for _, y in points) if points else None
