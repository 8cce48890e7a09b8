"""The cells of a sweep as a table, as CSV, as a map, and the best as a configuration."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from selectflow.report.tables import short, terminal, write_csv
from selectflow.run.config import known_keys
from selectflow.run.yaml import dump_yaml, read_yaml, set_key
from selectflow.tune.domains import identity
from selectflow.tune.map import draw_map
from selectflow.tune.results import Cell, Cells, sort_cells
from selectflow.tune.space import Sweep

__all__ = [
    "Cell",
    "Cells",
    "cost",
    "draw_map",
    "print_cells",
    "sort_cells",
    "to_records",
    "write_best",
    "write_outputs",
]


def write_outputs(sweep: Sweep, found: Cells, out: Path) -> list[Path]:
    """Print the cells, at least one, and write cells.csv, map.png and, for a best one, best.yaml.

    Returns:
        The paths of the files, in the directory `out`.

    Raises:
        OSError: a file cannot be written.
    """
    print_cells(found)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "cells.csv", out / "map.png"]
    write_csv(to_records(found), written[0])
    draw_map(found).savefig(written[1], format="png", dpi=150)
    if found.best is not None:
        written.append(out / "best.yaml")
        write_best(sweep, found, written[2])
    return written


def print_cells(found: Cells) -> None:
    """Print the table, its cost and the best cell, to stdout."""
    terminal().print(_table(found))
    print(cost(found))
    if found.best is None:
        print("no cell was run to its end: there is no best one")
        return
    near = len(found.near_best()) - 1
    setting = " ".join(f"{key}={found.best.setting[key]}" for key in _varied(found))
    num_seeds = len(found.best.values)
    print(f"best: {setting}, {found.metric} {_mean_sd(found.best)} over {num_seeds} seeds")
    if near:
        print(f"{near} more within its standard deviation: no difference seen between those")


def _table(found: Cells) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    keys = _varied(found)
    heads = [key.replace(".", ".\n", 1) for key in keys]
    heads += [f"{found.metric}\nat the end", "seeds", "steps", "seconds", "relative\nerror", ""]
    for head in heads:
        table.add_column(escape(head), justify="right")
    for cell in found.cells:
        ending = "" if cell.state == "complete" else f"failed: {cell.note}"
        if cell.state == "stopped":
            ending = f"stopped at {cell.last:.4g}"
        error = "-" if cell.relative_error is None else short(cell.relative_error)
        row = [
            *(str(cell.setting[key]) for key in keys), _mean_sd(cell), str(len(cell.values)),
            str(cell.steps), f"{cell.seconds:.1f}", error, ending,
        ]  # fmt: skip
        table.add_row(*map(escape, row))  # a value is text, not markup
    return table


def _varied(found: Cells) -> list[str]:
    """The parameters that differ between cells."""
    keys = list(found.cells[0].setting) if found.cells else []
    return [key for key in keys if len({identity(cell.setting[key]) for cell in found.cells}) > 1]


def _mean_sd(cell: Cell) -> str:
    if cell.mean is None:
        return "-"
    return f"{cell.mean:.4f}" if cell.sd is None else f"{cell.mean:.4f} ± {cell.sd:.4f}"


def cost(found: Cells) -> str:
    """The cost of a sweep in optimizer steps, also as a share of all cells run to their end."""
    steps, seconds = sum(c.steps for c in found.cells), sum(c.seconds for c in found.cells)
    stopped = sum(cell.state == "stopped" for cell in found.cells)
    share = f", {steps / found.full_steps:.0%} of {found.full_steps}" if found.full_steps else ""
    return (
        f"{len(found.cells)} cells, {stopped} of them stopped early: "
        f"{steps} optimizer steps{share}, {seconds:.1f} s of training"
    )


def to_records(found: Cells) -> list[dict[str, Any]]:
    """Every cell with all its digits, by the name of the column."""
    names = ("last", "steps", "seconds", "relative_error", "note")
    return [
        cell.setting
        | {"state": cell.state, f"{found.metric}_mean": cell.mean, f"{found.metric}_sd": cell.sd}
        | {"num_seeds": len(cell.values)}
        | {name: getattr(cell, name) for name in names}
        for cell in found.cells
    ]


def write_best(sweep: Sweep, found: Cells, path: Path) -> None:
    """Write the configuration of the best cell: the sweep's base with its setting.

    Raises:
        OSError: the file cannot be written.
    """
    assert found.best is not None
    values = read_yaml(sweep.config)
    for override in sweep.arguments(found.best.setting)[1:]:
        set_key(values, override, known_keys(), "select.horizon=2")
    values["name"] = f"{sweep.plain_name}-best-s{{seed}}"
    size = f"{found.best.mean:.4g}" + (f" ± {found.best.sd:.2g}" if found.best.sd else "")
    head = [
        f"The best of the {len(found.cells)} cells of the sweep {sweep.name}: {found.metric} "
        f"{size} over {len(found.best.values)} seeds.",
        "",
        f"  {shlex.join(['python', sweep.keys.program, str(path), 'seed=0'])}",
    ]
    path.write_text("".join(map(_comment, head)) + dump_yaml(values), encoding="utf-8")


def _comment(text: str) -> str:
    """A line of YAML that says a text, whatever is in it."""
    return f"# {''.join(c if c.isprintable() else ' ' for c in text)}".rstrip() + "\n"
