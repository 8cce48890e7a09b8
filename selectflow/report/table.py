"""A comparison as a table: for the terminal and as CSV."""

import csv
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from selectflow.report.compare import Comparison, Row, Stat

_STATS = (
    "steps",
    "wall_s",
    "accuracy",
    "accuracy_at_step",
    "uniform_in_same_time",
    "kept_altered",
    "select_share",
)


def to_table(comparison: Comparison) -> Table:
    """The comparison as a table of the terminal, shares in percent.

    Args:
        comparison: what `summarize` returns.

    Returns:
        One line per group, mean ± sample standard deviation over seeds; "-" where not recorded.
    """
    at_step = "equal\nsteps" if comparison.step is None else f"at step\n{comparison.step:.0f}"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="test accuracy and shares in %, mean ± standard deviation over seeds",
        caption_justify="left",
    )
    table.add_column("group", overflow="fold")
    for head in (
        "seeds",
        "steps",
        "training\ns",
        "accuracy\nat the end",
        f"accuracy\n{at_step}",
        "uniform in\nsame time",
        "altered\namong kept",
        "time for\nselection",
    ):
        table.add_column(head, justify="right")
    for row in comparison.rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    shares = (row.accuracy, row.accuracy_at_step, row.uniform_in_same_time, row.kept_altered)
    return [
        row.label,
        str(row.num_runs),
        f"{row.steps.mean:.0f}" if row.steps else "-",
        f"{row.wall_s.mean:.1f}" if row.wall_s else "-",
        *(_percent(share) for share in shares),
        _percent(row.select_share, digits=0),
    ]


def _percent(share: Stat | None, digits: int = 1) -> str:
    if share is None:
        return "-"
    mean = f"{100 * share.mean:.{digits}f}"
    return mean if share.sd is None else f"{mean} ± {100 * share.sd:.{digits}f}"


def print_table(comparison: Comparison) -> None:
    """Print the comparison to stdout, without cutting it where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(to_table(comparison))


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write the comparison with all its digits.

    Args:
        comparison: what `summarize` returns.
        path: the file; shares in [0, 1], times in seconds, empty where not recorded.

    Raises:
        OSError: the file cannot be written.
    """
    names = [f"{name}_{part}" for name in _STATS for part in ("mean", "sd")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "num_runs", "common_step", *names])
        for row in comparison.rows:
            stats = [getattr(row, name) for name in _STATS]
            values = [value for s in stats for value in ((s.mean, s.sd) if s else (None, None))]
            writer.writerow([row.label, row.num_runs, comparison.step, *values])
