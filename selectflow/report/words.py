"""Numbers of a comparison as people read them, the same in the terminal and on the page."""

from __future__ import annotations

from selectflow.report.compare import Comparison, Row
from selectflow.report.quantities import is_higher_better, quantity
from selectflow.report.seeds import Paired, Stat

NONE = "-"


def spread(found: Stat | None, digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation; the mean alone for one seed."""
    if found is None:
        return NONE
    mean = f"{scale * found.mean:.{digits}f}"
    return mean if found.sd is None else f"{mean} ± {scale * found.sd:.{digits}f}"


def number(found: Stat | None) -> str:
    """The mean in three or four digits, large ones as 12k or 3.4M."""
    return NONE if found is None else short(found.mean)


def short(value: float) -> str:
    """A number in about three digits: 0.0123, 4.56, 789, 12.3k, 4.5M."""
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def quality_digits(comparison: Comparison) -> int:
    """Decimals of the quality: 1 in percent, 3 else."""
    return 1 if quantity(comparison.quality).scale == 100 else 3


def verdict(test: Paired | None, comparison: Comparison) -> str:
    """better, worse or "no difference seen"; "-" without a test."""
    if test is None:
        return NONE
    if not test.is_seen:
        return "no difference seen"
    return "better" if (test.mean > 0) == is_higher_better(comparison.quality) else "worse"


def difference(test: Paired, comparison: Comparison) -> list[str]:
    """Mean difference and its 95% interval in the unit of the quality, p, corrected p and pairs."""
    scale, digits = quantity(comparison.quality).scale, quality_digits(comparison)
    mean, low, high = (f"{scale * x:+.{digits}f}" for x in (test.mean, test.low, test.high))
    return [mean, f"{low} to {high}", _p(test.p), _p(test.corrected_p), str(test.num)]


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def reached(row: Row, found: Stat | None) -> str:
    """Steps or seconds to the loss; how many of the runs reach it, where not all do."""
    if row.num_reached is None:
        return NONE
    if row.num_reached < row.num_runs:
        return "never" if row.num_reached == 0 else f"{row.num_reached} of {row.num_runs} runs"
    return number(found)


def runs_of(row: Row) -> str:
    """Number of seeds, and of runs left out."""
    return f"{row.num_runs} (-{row.num_left_out})" if row.num_left_out else str(row.num_runs)
