"""A comparison as tables: for the terminal, for the page, and as CSV."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from selectflow.report import words
from selectflow.report.compare import Comparison, Row
from selectflow.report.quantities import quantity
from selectflow.report.seeds import Paired, Stat


@dataclass(frozen=True)
class Grid:
    """A table as text: a title, a head for each column, a list of cells for each group."""

    title: str
    head: list[str]
    cells: list[list[str]]


def grids(comparison: Comparison) -> list[Grid]:
    """How good the groups are, how they differ, what they cost, how soon they reach a loss."""
    parts = [_quality(comparison), *_differences(comparison)]
    return [*parts, _cost(comparison), _reach(comparison)]


def _quality(comparison: Comparison) -> Grid:
    shown = quantity(comparison.quality)
    digits, scale = words.quality_digits(comparison), shown.scale
    step = "equal steps" if comparison.step is None else f"step {comparison.step:.0f}"
    time = "equal time" if comparison.time_s is None else f"{words.short(comparison.time_s)} s"
    head = [
        "group", "seeds", "at the end", f"at {step}", f"at {time}",
        f"{comparison.baseline} in same time",
    ]  # fmt: skip
    cells = []
    for row in comparison.rows:
        stats = (row.quality, row.quality_at_step, row.quality_at_time, row.baseline_in_same_time)
        numbers = (words.spread(found, digits, scale) for found in stats)
        cells.append([row.label, words.runs_of(row), *numbers])
    return Grid(f"{shown.label}, mean ± standard deviation over seeds", head, cells)


def _differences(comparison: Comparison) -> list[Grid]:
    others = [row for row in comparison.rows if row.label != comparison.baseline]
    if not any(row.at_equal_steps or row.in_same_time for row in others):
        return []  # one group, or one seed
    unit = quantity(comparison.quality).unit.replace("%", "points")
    head = [
        "group", "compared", "seen", f"difference ({unit})", "95% interval", "p", "p, corrected",
        "pairs",
    ]  # fmt: skip
    cells = []
    for row in others:
        both = {"at equal steps": row.at_equal_steps, "in the same time": row.in_same_time}
        for question, test in both.items():
            if test:
                told = [words.verdict(test, comparison), *words.difference(test, comparison)]
                cells.append([row.label, question, *told])
    title = f"difference to {comparison.baseline}: paired t test over seeds"
    return [Grid(title, head, cells)]


def _cost(comparison: Comparison) -> Grid:
    head = [
        "group", "steps", "samples seen", "samples scored", "tokens", "time (s)", "upfront (s)",
        "selecting (%)", "time per step",
    ]  # fmt: skip
    cells = []
    for row in comparison.rows:
        counts = (row.steps, row.samples_seen, row.samples_scored, row.tokens_seen)
        cells.append([
            row.label, *map(words.number, counts), words.spread(row.wall_s, 1),
            words.number(row.upfront_s), words.spread(row.select_share, 0, 100),
            words.NONE if row.overhead is None else f"x {row.overhead.mean:.2f}",
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
            row.label, words.reached(row, row.reach_step), words.reached(row, row.reach_s),
            words.spread(row.loss, 3), words.spread(row.kept_altered, 1, 100),
        ]
        for row in comparison.rows
    ]  # fmt: skip
    return Grid(f"how soon the {loss.title} {wanted} is reached", *_without_empty(head, cells))


def _without_empty(head: list[str], cells: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that no group has."""
    kept = [i for i in range(len(head)) if any(line[i] != words.NONE for line in cells)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in cells]


def print_tables(comparison: Comparison) -> None:
    """Print notes and tables to stdout, without cutting them where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    for grid in grids(comparison):
        table = Table(
            title=grid.title, title_justify="left", title_style="", box=box.SIMPLE_HEAD,
            pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        for place, head in enumerate(grid.head):
            table.add_column(head, justify="right" if place else "left", no_wrap=not place)
        for cells in grid.cells:
            table.add_row(*cells)
        console.print(table)


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write the comparison with all its digits, a line for each group.

    Args:
        comparison: what `summarize` returns.
        path: the file; shares in [0, 1], times in seconds, differences group minus baseline,
            empty where not recorded.

    Raises:
        OSError: the file cannot be written.
    """
    head, lines = to_records(comparison)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(lines)


def to_records(comparison: Comparison) -> tuple[list[str], list[list[object]]]:
    """Names of the columns, and the values of each group."""
    known = {
        "quality_metric": comparison.quality, "baseline": comparison.baseline,
        "common_step": comparison.step, "common_time_s": comparison.time_s,
    }  # fmt: skip
    records = [_record(row) | known for row in comparison.rows]
    head = list(dict.fromkeys(name for record in records for name in record))
    return head, [[record.get(name) for name in head] for record in records]


_PARTS = {Stat: ("mean", "sd"), Paired: ("mean", "low", "high", "p", "corrected_p", "num")}
_TESTS = ("at_equal_steps", "in_same_time")


def _record(row: Row) -> dict[str, object]:
    record: dict[str, object] = {}
    for name in (field.name for field in fields(row)):
        value = getattr(row, name)
        if isinstance(value, Stat | Paired):
            record |= {f"{name}_{part}": getattr(value, part) for part in _PARTS[type(value)]}
        elif value is not None or name == "num_reached":
            record[name] = value
        else:
            parts = _PARTS[Paired if name in _TESTS else Stat]
            record |= {f"{name}_{part}": None for part in parts}
    return record
