"""A comparison in words and tables: for the terminal, for the page, and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from selectflow.report.compare import SIGNIFICANT, Comparison, Paired, Row, Stat
from selectflow.report.runs import KEPT, KEPT_ALTERED
from selectflow.run.metrics import (
    CONTROLLED,
    HORIZON,
    INTERVAL,
    LEARNING_RATE,
    LR_MULTIPLIER,
    SAMPLES_SCORED,
    SAMPLES_SEEN,
    SCORER_GAIN,
    SCORER_LOSS,
    SELECTED,
    SOURCE_KEPT,
    SOURCE_SHARE,
    STEP,
    TOKENS_SEEN,
    WALL_S,
)

NONE = "-"
NOT_FINITE = "not finite"


# --- quantities -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """How a metric is shown.

    Attributes:
        metric: its name in metrics.jsonl.
        title: its name for readers.
        unit: of the shown value.
        scale: shown value = scale * logged value.
    """

    metric: str
    title: str
    unit: str
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Title and unit, as on an axis."""
        return f"{self.title} ({self.unit})"

    @property
    def digits(self) -> int:
        """Decimals of the shown value: 1 in percent, 3 else."""
        return 1 if self.scale == 100 else 3

    @property
    def difference_unit(self) -> str:
        """Unit of a difference of two shown values."""
        return self.unit.replace("%", "points")


AXES = (
    Quantity(STEP, "optimizer steps", "count"),
    Quantity(SAMPLES_SEEN, "samples trained on", "count"),
    Quantity(SAMPLES_SCORED, "samples scored", "count"),
    Quantity(TOKENS_SEEN, "tokens trained on", "count"),
    Quantity(WALL_S, "training and selection time", "s"),
)

_RELATIVE_ERROR, _TRUST = CONTROLLED["relative_error"], CONTROLLED["trust_ratio"]
DYNAMICS = (
    Quantity(SELECTED, "steps that were selected for", "%", 100.0),
    Quantity(HORIZON, "horizon H", "optimizer updates"),
    Quantity(INTERVAL, "look-ahead every", "optimizer steps"),
    Quantity(CONTROLLED["lead"], "lead of the dearer one in contests, in equal time", "%", 100.0),
    Quantity(LR_MULTIPLIER, "learning rate over its schedule", "factor"),
    Quantity(LEARNING_RATE, "learning rate", "per update"),
    Quantity(_RELATIVE_ERROR, "relative error by the proxy", "ratio"),
    Quantity(_TRUST, "trust ratio, real over predicted change", "ratio"),
    Quantity(SCORER_LOSS, "loss of the scorer on what is kept", "nats"),
    Quantity(SCORER_GAIN, "target loss spared by the scorer's choice", "%", 100.0),
)
_ALTERED = Quantity(KEPT_ALTERED, "altered samples among the kept", "%", 100.0)
_KNOWN = {known.metric: known for known in (*AXES, *DYNAMICS, _ALTERED)}


def quantity(metric: str) -> Quantity:
    """How a metric of any name is shown; a loss of the trainers is a cross-entropy, in nats."""
    if metric in _KNOWN:
        return _KNOWN[metric]
    split, _, name = metric.partition("/")
    title = f"{split} {name.replace('_', ' ')}" if name else metric
    if metric.startswith(KEPT):
        kind = metric.removeprefix(KEPT).replace("_", " ").replace("/", " ")
        return Quantity(metric, f"{kind} among the kept", "%", 100.0)
    for prefix, what in ((SOURCE_SHARE, "share"), (SOURCE_KEPT, "kept")):
        if metric.startswith(prefix):
            source = metric.removeprefix(prefix)
            return Quantity(metric, f"{what} of source {source}", "%", 100.0)
    if name == "accuracy":
        return Quantity(metric, title, "%", 100.0)
    return Quantity(metric, title, "nats" if name == "loss" else "as logged")


def is_higher_better(metric: str) -> bool:
    """Whether more of a metric is better: of an accuracy or a score, not of a loss or an error."""
    name = metric.rpartition("/")[2]
    return any(word in name for word in ("accuracy", "f1", "recall", "precision", "bleu", "auc"))


# --- numbers --------------------------------------------------------------------------------


def spread(found: Stat | None, digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation; the mean alone for one seed; "not finite" if it is not."""
    if found is None:
        return NONE
    if found.num_broken:
        return NOT_FINITE + _of(found.num_broken, found.num)
    mean = f"{scale * found.mean:.{digits}f}"
    return mean if found.sd is None else f"{mean} ± {scale * found.sd:.{digits}f}"


def _of(num: int, all_of: int) -> str:
    """Which part of the seeds it is true of; nothing where of all."""
    return "" if num == all_of else f" in {num} of {all_of}"


def short(value: float) -> str:
    """A number in about three digits: 0.0123, 4.56, 789, 12.3k, 4.5M; "not finite" if it is not."""
    if not math.isfinite(value):
        return NOT_FINITE
    for limit, divisor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def verdict(test: Paired | None, metric: str) -> str:
    """better, worse, "no difference seen", or "not finite"; "-" without a test."""
    if test is None:
        return NONE
    if not test.is_finite:
        return NOT_FINITE
    if not test.is_seen:
        return "no difference seen"
    return "better" if (test.mean > 0) == is_higher_better(metric) else "worse"


def reached(row: Row, key: str) -> str:
    """Steps or seconds to the loss; how many of the runs reach it, where not all do.

    A loss that ends not finite is not called reached, wherever it has been before.
    """
    if (loss := row.stats["loss"]) and loss.num_broken:
        return spread(loss, 3)
    if row.num_reached is None:
        return NONE
    if row.num_reached < row.num_runs:
        return "never" if row.num_reached == 0 else f"{row.num_reached} of {row.num_runs} runs"
    return _number(row.stats[key])


def runs_of(row: Row) -> str:
    """Number of seeds, and of runs left out."""
    return f"{row.num_runs} (-{row.num_left_out})" if row.num_left_out else str(row.num_runs)


def _number(found: Stat | None) -> str:
    return NONE if found is None else spread(found, 0) if found.num_broken else short(found.mean)


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


# --- sentences ------------------------------------------------------------------------------


def sentences(comparison: Comparison) -> list[str]:
    """The verdict on each group, a sentence at equal steps and one in equal time.

    Each is on the loss and on the quality. A last sentence says how they were tested.
    """
    found, baseline = [], comparison.baseline
    others = [row for row in comparison.rows if row.label != baseline]
    for row in others:
        conditions = {
            "at_equal_steps": f"At step {comparison.step or 0:.0f}",
            "in_same_time": f"In the time of {row.label}",
        }
        for question, condition in conditions.items():
            tests = {comparison.loss: row.tests[f"loss_{question}"]}
            tests |= {comparison.quality: row.tests[question]}
            known = {metric: test for metric, test in tests.items() if test}
            if judged := [_judged(test, metric, baseline) for metric, test in known.items()]:
                found.append(f"{condition}, {row.label} against {baseline}: {', '.join(judged)}.")
        if not any(row.tests.values()):
            found.append(f"{row.label} against {baseline}: not tested, as fewer than 2 seeds pair.")
    if any(test and test.is_finite for row in others for test in row.tests.values()):
        found.append(
            "p: paired t test over seeds, corrected by Holm's method for the number of groups "
            f"({len(others)}); below {SIGNIFICANT} is called better or worse. Values are those of "
            "the step or second named, not the best before it."
        )
    return found


def _judged(test: Paired, metric: str, baseline: str) -> str:
    if not test.is_finite:
        parts = [
            f"{quantity(metric).title}{of} is not finite with {num} of {test.num} seeds"
            for of, num in zip(("", f" of {baseline}"), test.num_broken, strict=True)
            if num
        ]
        return " and ".join(parts)
    shown, p, seeds = quantity(metric), _p(test.corrected_p), f"{test.num} seeds"
    p = f"p {p}" if p.startswith("<") else f"p = {p}"
    size, unit = shown.scale * test.mean, shown.difference_unit
    if test.is_seen:
        by = f"{abs(size):.{shown.digits}f} {unit}"
        return f"{shown.title} is {verdict(test, metric)} by {by} ({p}, {seeds})"
    by = f"{size:+.{shown.digits}f} {unit}"
    return f"{shown.title} is not told apart with {seeds} ({by}, {p})"


# --- tables ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A table as text: a title, a head for each column, a list of cells for each group."""

    title: str
    head: list[str]
    cells: list[list[str]]


def grids(comparison: Comparison) -> list[Grid]:
    """The tables: quality, differences to the baseline, costs, and steps to a loss."""
    parts = [_quality(comparison), _differences(comparison), _cost(comparison), _reach(comparison)]
    return [grid for grid in parts if grid.cells]  # no differences of one group, or of one seed


def _quality(comparison: Comparison) -> Grid:
    shown = quantity(comparison.quality)
    step = "equal steps" if comparison.step is None else f"step {comparison.step:.0f}"
    time = "equal time" if comparison.time_s is None else f"{short(comparison.time_s)} s"
    columns = {
        "quality": "at the end",
        "quality_at_step": f"at {step}",
        "quality_at_time": f"at {time}",
        "baseline_in_same_time": f"{comparison.baseline} in same time",
    }
    cells = [
        [row.label, runs_of(row)]
        + [spread(row.stats[key], shown.digits, shown.scale) for key in columns]
        for row in comparison.rows
    ]
    title = f"{shown.label}, mean ± standard deviation over seeds"
    return Grid(title, ["group", "seeds", *columns.values()], cells)


def _differences(comparison: Comparison) -> Grid:
    shown, cells = quantity(comparison.quality), []
    for row in comparison.rows:
        questions = {"at equal steps": "at_equal_steps", "in the same time": "in_same_time"}
        for question, key in questions.items():
            test = row.tests[key]
            if test and not test.is_finite:
                blank = [NONE] * 4
                cells.append([row.label, question, NOT_FINITE, *blank, str(test.num)])
            elif test:
                values = (shown.scale * x for x in (test.mean, test.low, test.high))
                mean, low, high = (f"{value:+.{shown.digits}f}" for value in values)
                cells.append([
                    row.label, question, verdict(test, comparison.quality), mean,
                    f"{low} to {high}", _p(test.p), _p(test.corrected_p), str(test.num),
                ])  # fmt: skip
    head = [
        "group", "compared", "seen", f"difference ({shown.difference_unit})", "95% interval", "p",
        "p, corrected", "pairs",
    ]  # fmt: skip
    return Grid(f"difference to {comparison.baseline}: paired t test over seeds", head, cells)


def _cost(comparison: Comparison) -> Grid:
    head = [
        "group", "steps", "samples seen", "samples scored", "tokens", "time (s)", "upfront (s)",
        "selecting (%)", "time per step",
    ]  # fmt: skip
    counts = ("steps", "samples_seen", "samples_scored", "tokens_seen")
    cells = []
    for row in comparison.rows:
        stats, overhead = row.stats, row.stats["overhead"]
        cells.append([
            row.label, *(_number(stats[key]) for key in counts), spread(stats["wall_s"], 1),
            _number(stats["upfront_s"]), spread(stats["select_share"], 0, 100),
            NONE if overhead is None else f"x {spread(replace(overhead, sd=None), 2)}",
        ])  # fmt: skip
    title = (
        f"what it cost, evaluation not counted; time per step over that of {comparison.baseline}"
    )
    return Grid(title, *_without_empty(head, cells))


def _reach(comparison: Comparison) -> Grid:
    loss = quantity(comparison.loss)
    wanted = f"that {comparison.baseline} ends with"
    if comparison.reach is not None:
        wanted = f"of {comparison.reach:g}"
    head = ["group", "steps to it", "seconds to it", f"{loss.label} at the end"]
    head += ["altered among the kept (%)"]
    cells = [
        [
            row.label, reached(row, "reach_step"), reached(row, "reach_s"),
            spread(row.stats["loss"], 3), spread(row.stats["kept_altered"], 1, 100),
        ]
        for row in comparison.rows
    ]  # fmt: skip
    return Grid(f"how soon the {loss.title} {wanted} is reached", *_without_empty(head, cells))


def _without_empty(head: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that no group has."""
    kept = [i for i in range(len(head)) if any(line[i] != NONE for line in cells)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in cells]


def terminal() -> Console:
    """Standard output; 200 columns wide where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def print_tables(comparison: Comparison) -> None:
    """Print notes, tables and the verdict to stdout, never cut except to a terminal's width."""
    console = terminal()
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for grid in grids(comparison):
        table = Table(
            title=escape(grid.title), title_justify="left", title_style="", box=box.SIMPLE_HEAD,
            pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        for place, head in enumerate(grid.head):
            table.add_column(escape(head), justify="right" if place else "left", no_wrap=not place)
        for cells in grid.cells:
            table.add_row(*map(escape, cells))  # a label is text, not markup
        console.print(table)
    for sentence in sentences(comparison):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def write_csv(records: Sequence[Mapping[str, object]], path: Path) -> None:
    """Write records with the same keys, at least one, as CSV.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def to_records(comparison: Comparison) -> list[dict[str, object]]:
    """The comparison with all its digits, a record for each group, its label first.

    Shares are in [0, 1], times in seconds, differences group minus baseline; None: not recorded.
    """
    return [
        {"label": row.label, "num_runs": row.num_runs, "num_left_out": row.num_left_out}
        | _parts(row.stats, ("mean", "sd"))
        | {"num_reached": row.num_reached}
        | _parts(row.tests, ("mean", "low", "high", "p", "corrected_p", "num"))
        | {"quality_metric": comparison.quality, "baseline": comparison.baseline}
        | {"common_step": comparison.step, "common_time_s": comparison.time_s}
        for row in comparison.rows
    ]


def _parts(values: Mapping[str, Stat | Paired | None], names: Sequence[str]) -> dict[str, object]:
    return {
        f"{key}_{name}": getattr(value, name, None)
        for key, value in values.items()
        for name in names
    }
