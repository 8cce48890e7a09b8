"""The command line: `selectflow tune SWEEP.yaml`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectflow.tune.cell_table import Cells
    from selectflow.tune.sweep import Sweep

# A command imports what it alone needs when it runs, so that the others start quickly.


def add_arguments(tune: argparse.ArgumentParser) -> None:
    """Add the arguments of `selectflow tune` to its parser."""
    tune.add_argument("sweep", type=Path, metavar="SWEEP", help="YAML of a sweep, as W&B has it")
    where = tune.add_mutually_exclusive_group()
    where.add_argument(
        "--local", action="store_true", help="here, without a server; resumes (default)"
    )
    where.add_argument("--wandb", action="store_true", help="create it on W&B and serve it")
    tune.add_argument(
        "--jobs", type=_count, default=os.cpu_count() or 1, metavar="N",
        help="processes at once, of one thread each (default: one per core)",
    )  # fmt: skip
    tune.add_argument(
        "--out", type=Path, metavar="DIR", help="of the record and runs (default: runs/<sweep>)"
    )
    tune.add_argument("--count", type=_count, metavar="N", help="most runs of this agent (--wandb)")
    tune.set_defaults(command=_tune)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _tune(args: argparse.Namespace) -> None:
    from selectflow.tune.sweep import load_sweep  # noqa: PLC0415

    sweep = load_sweep(args.sweep)
    out = args.out or Path("runs", sweep.name)
    found = _serve(sweep, args.count) if args.wandb else _tune_here(sweep, out, args.jobs)
    if found.cells:
        _write(sweep, found, out)


def _tune_here(sweep: Sweep, out: Path, jobs: int) -> Cells:
    from selectflow.tune.record import read_cells  # noqa: PLC0415
    from selectflow.tune.search import tune  # noqa: PLC0415

    try:
        study = tune(sweep, out, jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on where {out} is", file=sys.stderr)
        raise SystemExit(130) from None
    return read_cells(sweep, study, out)


def _serve(sweep: Sweep, count: int | None) -> Cells:
    from selectflow.tune.cells import cells_of_runs  # noqa: PLC0415
    from selectflow.tune.wandb_server import run_dirs, serve  # noqa: PLC0415

    serve(sweep, count)
    return cells_of_runs(sweep, run_dirs(sweep))


def _write(sweep: Sweep, found: Cells, out: Path) -> None:
    from selectflow.tune.cell_table import print_cells, write_cells  # noqa: PLC0415
    from selectflow.tune.cells import write_best  # noqa: PLC0415
    from selectflow.tune.map import write_map  # noqa: PLC0415

    print_cells(found)
    out.mkdir(parents=True, exist_ok=True)
    write_cells(found, out / "cells.csv")
    write_map(found, out / "map.png")
    written = [out / "cells.csv", out / "map.png"]
    if found.best is not None:
        write_best(sweep, found, out / "best.yaml")
        written.append(out / "best.yaml")
    print(f"wrote {', '.join(map(str, written))}")
