"""The comparison: groups at their ends, at equal steps and equal time, against a baseline.

Every value is a mean over seeds. Differences are tested by Student's paired t over runs with the
same seed. An exact test of signs could not answer with three to five seeds: its smallest two-sided
p is 2 / 2^n, 0.25 for three seeds and 0.06 for five, whatever the data. The price of the t test is
the assumption that differences are about normal.

A run that diverged has no number. A mean or a test that it is part of has none either, and its
group comes after those that have one.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from selectflow.report.groups import (
    Groups,
    broken,
    differences,
    finished,
    groups,
    label,
    lengths,
    resumed,
    task_of,
)
from selectflow.report.runs import (
    KEPT_ALTERED,
    ReportError,
    Run,
    broken_at,
    common_end,
    end,
    first_reach,
    series,
    total,
    value_at,
)
from selectflow.run.metrics import (
    SAMPLES_SCORED,
    SAMPLES_SEEN,
    SELECT_S,
    STEP,
    TARGET_LOSS,
    TEST_ACCURACY,
    TEST_LOSS,
    TOKENS_SEEN,
    UPFRONT_S,
    WALL_S,
)

_BASELINE = "uniform"
_QUALITIES = (TEST_ACCURACY, TEST_LOSS, TARGET_LOSS)
SIGNIFICANT = 0.05
"""A corrected p below this is called a difference."""


# --- statistics over seeds -------------------------------------------------------------------


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; `sd` is None for a single one.

    Where `num_broken` > 0 of the values are not finite, the mean is NaN and `sd` None.
    """

    mean: float
    sd: float | None
    num: int
    num_broken: int = 0


@dataclass(frozen=True)
class Paired:
    """Differences to a baseline over seeds; all numbers are NaN where one is not finite.

    Attributes:
        mean: mean difference, group minus baseline.
        low, high: ends of its 95% interval, by Student's t.
        p: two-sided p value of this comparison by itself.
        corrected_p: the same, corrected for the number of groups compared; see `holm`.
        num: pairs, >= 2 unless one is not finite.
        num_broken: pairs of which the group, and of which the baseline, is not finite.
    """

    mean: float
    low: float
    high: float
    p: float
    corrected_p: float
    num: int
    num_broken: tuple[int, int] = (0, 0)

    @property
    def is_finite(self) -> bool:
        """Whether there are numbers."""
        return self.num_broken == (0, 0)

    @property
    def is_seen(self) -> bool:
        """Whether a difference is seen: the corrected p is below 0.05."""
        return self.corrected_p < SIGNIFICANT


def stat(values: Sequence[float | None]) -> Stat | None:
    """Mean and sample standard deviation, None if a value is missing or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if broken := sum(not math.isfinite(value) for value in known):
        return Stat(math.nan, None, len(known), broken)
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Stat(statistics.fmean(known), sd, len(known))


def paired(differences: Sequence[float]) -> Paired | None:
    """Student's t test that the mean of paired differences is 0; None for fewer than two."""
    from scipy.stats import ttest_1samp  # noqa: PLC0415  a second to import

    num = len(differences)
    if num < 2:
        return None
    mean = statistics.fmean(differences)
    if np.ptp(differences) <= 1e-12 * abs(mean):  # equal but for rounding: the limit of the test
        p = 1.0 if mean == 0 else 0.0
        return Paired(mean, mean, mean, p, p, num)
    test = ttest_1samp(differences, 0.0)
    low, high = map(float, test.confidence_interval(0.95))
    return Paired(mean, low, high, float(test.pvalue), float(test.pvalue), num)


def holm(tests: Sequence[Paired | None]) -> list[Paired | None]:
    """The tests with p values corrected for their number, by Holm's step-down method.

    The more groups are compared, the more of them differ by chance: of 14 without any effect one
    has p < 0.05 more often than not.
    """
    tested = ((place, test) for place, test in enumerate(tests) if test and test.is_finite)
    known = sorted((test.p, place) for place, test in tested)
    factors = range(len(known), 0, -1)
    raised = accumulate((min(1.0, p * n) for (p, _), n in zip(known, factors, strict=True)), max)
    found = list(tests)
    for (_, place), p in zip(known, raised, strict=True):
        found[place] = replace(tests[place], corrected_p=p)  # type: ignore[type-var]
    return found


# --- groups against the baseline ----------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One group of a comparison.

    Attributes:
        label: the strategy, and the options in which it differs from other groups of it.
        num_runs: seeds compared.
        num_left_out: runs of this label that did not finish and are left out.
        stats: the values of `_measure` over seeds; None where one of the runs lacks it.
        num_reached: runs that reach the loss to reach, and end with a number; None where it is not
            known.
        tests: the quality against the baseline's, "at_equal_steps" and "in_same_time", and the
            loss, "loss_at_equal_steps" and "loss_in_same_time"; None for fewer than two pairs.
    """

    label: str
    num_runs: int
    num_left_out: int
    stats: dict[str, Stat | None]
    num_reached: int | None
    tests: dict[str, Paired | None]


@dataclass(frozen=True)
class Comparison:
    """All groups, and the terms of their comparison.

    Attributes:
        rows: one for each group, in order of appearance.
        runs: the runs compared, by group; those that end with no number last.
        task: the options that all runs share.
        baseline: label of the group that the others are tested against.
        quality: metric by which they are judged.
        loss: metric of the loss, which is also judged and is to be reached.
        reach: the loss to reach; None: what the baseline with the same seed ends with.
        step: the last step that all runs have reached; None where it is not known.
        time_s: the last second that all runs have reached.
        notes: for the reader: runs left out, that diverged, of different lengths, resumed.
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
        loss: metric of the loss, which is judged too and is to be reached.
        reach: the loss to reach; None: for each run what the baseline with its seed ends with.
        partial: compare runs that have not finished as far as they got. Otherwise they are left
            out, unless none has finished.

    Raises:
        ReportError: no such baseline; else see `groups`.
    """
    kept, out, notes = finished(runs, partial)
    found = groups(kept)
    if baseline is None:
        baseline = _BASELINE if _BASELINE in found else next(iter(found))
    if baseline not in found:
        names = ", ".join(map(repr, found))
        raise ReportError(f"baseline must be one of {names}, got {baseline!r}; choose one of them")
    if quality is None:
        everywhere = (m for m in _QUALITIES if all(end(run, m) is not None for run in kept))
        quality = next(everywhere, TEST_ACCURACY)
    found = dict(sorted(found.items(), key=lambda item: _is_broken(item[1], quality)))
    judged = (quality, loss, *_QUALITIES)
    notes += [*broken(kept, judged), *lengths(found), *resumed(kept), *differences(found)]
    comparison = Comparison(
        rows=[],
        runs=found,
        task=task_of(kept),
        baseline=baseline,
        quality=quality,
        loss=loss,
        reach=reach,
        step=common_end(kept, STEP),
        time_s=common_end(kept, WALL_S),
        notes=notes,
    )
    left = Counter(map(label, out))
    rows = [_row(name, left[label(members[0])], comparison) for name, members in found.items()]
    corrected = {key: holm([row.tests[key] for row in rows]) for key in rows[0].tests}
    for place, row in enumerate(rows):
        row.tests.update({key: tests[place] for key, tests in corrected.items()})
    untimed = [
        row.label
        for row in rows
        if row.label != baseline
        if row.stats["wall_s"] and row.stats["baseline_in_same_time"] is None
    ]
    if untimed:
        notes.append(
            f"{baseline} was not run with all seeds for as long as {', '.join(untimed)}: give it "
            "more steps to compare in the same time"
        )
    return replace(comparison, rows=rows)


def _row(name: str, left_out: int, of: Comparison) -> Row:
    members, baselines = of.runs[name], {run.seed: run for run in of.runs[of.baseline]}
    measured = [_measure(run, baselines, of) for run in members]
    stats = {key: stat([values[key] for values in measured]) for key in measured[0]}
    is_known = any(values["loss"] is not None for values in measured)
    is_known &= all(_loss_to_reach(run, baselines, of) is not None for run in members)
    num_reached = sum(values["reach_step"] is not None for values in measured)
    pairs = [(run, baselines[run.seed]) for run in members if run.seed in baselines]
    if name == of.baseline:
        pairs = []
    tests = _tests(pairs, of.quality, of.step)
    tests |= {f"loss_{key}": test for key, test in _tests(pairs, of.loss, of.step).items()}
    return Row(name, len(members), left_out, stats, num_reached if is_known else None, tests)


def _is_broken(runs: Sequence[Run], metric: str) -> bool:
    """Whether one of a group's runs ends with a value of a metric that is not finite."""
    return any(broken_at(run, metric) is not None for run in runs)


def _measure(
    run: Run, baselines: Mapping[tuple[Any, Any], Run], of: Comparison
) -> dict[str, float | None]:
    """All values of a run by name; None where it does not have one."""
    baseline, upfront_s = baselines.get(run.seed), run.summary.get(UPFRONT_S)
    wall_s, select_s, altered = end(run, WALL_S), end(run, SELECT_S), series(run, KEPT_ALTERED)
    reach = None if _is_broken([run], of.loss) else _loss_to_reach(run, baselines, of)
    return {
        "steps": total(run, STEP),
        "samples_seen": total(run, SAMPLES_SEEN),  # trained on
        "samples_scored": total(run, SAMPLES_SCORED),  # by offline selection too
        "tokens_seen": total(run, TOKENS_SEEN),
        "wall_s": total(run, WALL_S),  # of training and selecting, before the first step too
        "upfront_s": run.offline.get("upfront_s", upfront_s),  # of it, before the first step
        "select_share": select_s / wall_s if select_s is not None and wall_s else None,  # of wall_s
        "overhead": _overhead(run, baselines),  # seconds a step over those of the baseline
        "kept_altered": found.mean if (found := stat([y for _, y in altered])) else None,
        "quality": end(run, of.quality),
        "quality_at_step": value_at(run, of.quality, of.step),
        "quality_at_time": value_at(run, of.quality, of.time_s, WALL_S),
        "baseline_in_same_time": _in_same_time(run, baseline, of.quality),
        "loss": end(run, of.loss),
        "reach_step": None if reach is None else first_reach(run, of.loss, reach),
        "reach_s": None if reach is None else first_reach(run, of.loss, reach, WALL_S),
    }


def _tests(
    pairs: Sequence[tuple[Run, Run]], metric: str, step: float | None
) -> dict[str, Paired | None]:
    """Runs against the baseline with their seed: at equal steps, and at the run's last second."""
    compared = {
        "at_equal_steps": [
            (value_at(run, metric, step), value_at(of, metric, step)) for run, of in pairs
        ],
        "in_same_time": [(end(run, metric), _in_same_time(run, of, metric)) for run, of in pairs],
    }
    return {
        key: _paired([(a, b) for a, b in both if a is not None and b is not None])
        for key, both in compared.items()
    }


def _paired(pairs: Sequence[tuple[float, float]]) -> Paired | None:
    """The test on pairs of a group and the baseline."""
    ours, theirs = (sum(not math.isfinite(pair[side]) for pair in pairs) for side in (0, 1))
    if ours or theirs:
        none = math.nan
        return Paired(none, none, none, none, none, len(pairs), (ours, theirs))
    return paired([one - other for one, other in pairs])


def _in_same_time(run: Run, baseline: Run | None, metric: str) -> float | None:
    """A metric of the baseline with the same seed at the second when a run ended."""
    if baseline is None or baseline is run:
        return None
    ended, longest = end(run, WALL_S), end(baseline, WALL_S)
    if ended is None or longest is None or longest < ended:
        return None  # it may have gone on to something better or worse
    return value_at(baseline, metric, ended, WALL_S)


def _loss_to_reach(
    run: Run, baselines: Mapping[tuple[Any, Any], Run], of: Comparison
) -> float | None:
    """By default what the baseline with its seed ends with; None where that is not finite."""
    if of.reach is not None:
        return of.reach
    ends = {seed: end(baseline, of.loss) for seed, baseline in baselines.items()}
    known = [value for value in ends.values() if value is not None]
    own = ends.get(run.seed)
    found = stat(known if own is None else [own])
    return None if found is None or found.num_broken else found.mean


def _overhead(run: Run, baselines: Mapping[tuple[Any, Any], Run]) -> float | None:
    def step_s(of: Run) -> float:
        return (end(of, WALL_S) or 0.0) / of.last_step if of.last_step else 0.0

    others = [baselines[run.seed]] if run.seed in baselines else baselines.values()
    known = [pace for other in others if (pace := step_s(other))]
    mine = step_s(run)
    return mine / statistics.fmean(known) if mine and known else None
