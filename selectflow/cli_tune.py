"""The command line: `selectflow tune SWEEP.yaml`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selectflow.sweep import Sweep

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
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes at once, of one thread each (default: one per core)",
    )  # fmt: skip
    tune.add_argument(
        "--out", type=Path, metavar="DIR", help="of the record and runs (default: runs/<sweep>)"
    )
    tune.add_argument("--count", type=int, metavar="N", help="most runs of this agent (--wandb)")
    tune.set_defaults(command=_tune)


def _tune(args: argparse.Namespace) -> None:
    from selectflow.sweep import load_sweep  # noqa: PLC0415

    sweep = load_sweep(args.sweep)
    if args.wandb:
        from selectflow.tune_wandb import serve  # noqa: PLC0415

        serve(sweep, args.count)
        return
    _tune_here(sweep, args.out or Path("runs", sweep.name), max(1, args.jobs))


def _tune_here(sweep: Sweep, out: Path, jobs: int) -> None:
    from selectflow.report.cells import print_cells, write_cells  # noqa: PLC0415
    from selectflow.report.map import write_map  # noqa: PLC0415
    from selectflow.tune import tune  # noqa: PLC0415
    from selectflow.tune_record import read_cells, write_best  # noqa: PLC0415

    try:
        study = tune(sweep, out, jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on where {out} is", file=sys.stderr)
        raise SystemExit(130) from None
    found = read_cells(sweep, study, out)
    print_cells(found)
    write_cells(found, out / "cells.csv")
    write_map(found, out / "map.png")
    written = [out / "cells.csv", out / "map.png"]
    if found.best is not None:
        write_best(sweep, found, out / "best.yaml")
        written.append(out / "best.yaml")
    print(f"wrote {', '.join(map(str, written))}")
