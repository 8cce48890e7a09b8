"""Values over seeds: mean, spread, and paired tests against a baseline.

The test is Student's t on the differences of runs with the same seed. With three to five seeds an
exact test of signs could not answer: its smallest two-sided p is 2 / 2^n, 0.25 for three seeds and
0.06 for five, whatever the data. The price is the assumption that the differences are about normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; `sd` is None for a single one."""

    mean: float
    sd: float | None
    num: int


@dataclass(frozen=True)
class Paired:
    """Differences to a baseline over seeds.

    Attributes:
        mean: mean difference, group minus baseline.
        low: lower end of its 95% interval, by Student's t.
        high: upper end.
        p: two-sided p value of this comparison by itself.
        corrected_p: the same, corrected for the number of groups compared; see `holm`.
        num: pairs, >= 2.
    """

    mean: float
    low: float
    high: float
    p: float
    corrected_p: float
    num: int

    @property
    def is_seen(self) -> bool:
        """Whether a difference is seen: the corrected p is below 0.05."""
        return self.corrected_p < SIGNIFICANT


def stat(values: Sequence[float | None]) -> Stat | None:
    """Mean and sample standard deviation, None if a value is missing or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    sd = statistics.stdev(known) if len(known) > 1 else None
    return Stat(statistics.fmean(known), sd, len(known))


def paired(differences: Sequence[float]) -> Paired | None:
    """Student's t test that the mean of paired differences is 0.

    Args:
        differences: of each seed, group minus baseline.

    Returns:
        The test; None for fewer than two pairs.
    """
    # scipy.special alone: scipy.stats takes a second to import
    from scipy.special import stdtr, stdtrit  # noqa: PLC0415

    num = len(differences)
    if num < 2:
        return None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(num)
    if error == 0:  # the limit of the formula
        p = 1.0 if mean == 0 else 0.0
        return Paired(mean, mean, mean, p, p, num)
    half = float(stdtrit(num - 1, 0.975)) * error
    p = 2 * float(stdtr(num - 1, -abs(mean) / error))
    return Paired(mean, mean - half, mean + half, p, p, num)


def holm(tests: Sequence[Paired | None]) -> list[Paired | None]:
    """The tests with p values corrected for their number, by Holm's step-down method.

    The more groups are compared, the more of them differ by chance: of 14 without any effect one
    has p < 0.05 more often than not.
    """
    known = sorted((test.p, place) for place, test in enumerate(tests) if test is not None)
    corrected, largest = list(tests), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        test = tests[place]
        assert test is not None
        corrected[place] = replace(test, corrected_p=largest)
    return corrected
