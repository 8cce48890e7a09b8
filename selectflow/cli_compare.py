"""The command line: `selectflow compare`."""

from __future__ import annotations

import argparse
from pathlib import Path

# The command imports what it needs when it runs, so that the others start quickly.


def add_arguments(compare: argparse.ArgumentParser) -> None:
    """Add the arguments of `selectflow compare` to its parser."""
    compare.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="run directory, glob of them, or entity/project/run_id at W&B",
    )  # fmt: skip
    compare.add_argument(
        "--out", type=Path, default=Path("."), metavar="DIR",
        help="where compare.csv, compare.html and the pictures go (default: here)",
    )  # fmt: skip
    compare.add_argument(
        "--baseline",
        metavar="GROUP",
        help="group to test against (default uniform, else the first)",
    )
    compare.add_argument(
        "--metric", metavar="NAME",
        help="what to judge by (default: test/accuracy, else test/loss, else target/loss)",
    )  # fmt: skip
    compare.add_argument(
        "--loss", default="test/loss", metavar="NAME",
        help="loss that is to be reached (default test/loss)",
    )  # fmt: skip
    compare.add_argument(
        "--reach", type=float, metavar="LOSS",
        help="time and steps to this loss (default: what the baseline of the same seed ends with)",
    )  # fmt: skip
    compare.add_argument(
        "--partial", action="store_true",
        help="compare unfinished runs as far as they got (default: leave them out)",
    )  # fmt: skip
    compare.add_argument(
        "--wandb", nargs="?", const="online", choices=("online", "offline"), metavar="MODE",
        help="log the comparison as a W&B run: online (the default, offline where W&B cannot be "
        "reached) or offline, for `wandb sync`",
    )  # fmt: skip
    compare.add_argument(
        "--project", default="selectflow", metavar="NAME", help="W&B project (default selectflow)"
    )
    compare.set_defaults(command=_compare)


def _compare(args: argparse.Namespace) -> None:
    from selectflow.report.compare import summarize  # noqa: PLC0415
    from selectflow.report.outputs import to_report, write_outputs  # noqa: PLC0415
    from selectflow.report.runs import load_runs  # noqa: PLC0415
    from selectflow.report.samples import examine_groups  # noqa: PLC0415
    from selectflow.report.table import print_tables  # noqa: PLC0415
    from selectflow.run.wandb import log_report  # noqa: PLC0415

    comparison = summarize(
        load_runs(args.runs),
        baseline=args.baseline,
        quality=args.metric,
        loss=args.loss,
        reach=args.reach,
        partial=args.partial,
    )
    print_tables(comparison)
    written = write_outputs(comparison, examine_groups(comparison.runs), args.out)
    print(f"wrote {', '.join(map(str, written))}")
    if args.wandb:
        report = to_report(comparison, written)
        groups = {run.config.get("track", {}).get("group") for run in comparison.all_runs}
        group = groups.pop() if len(groups) == 1 else None
        run_id = log_report(report, args.out, mode=args.wandb, project=args.project, group=group)
        if run_id:
            print(f"logged to W&B as run {run_id}")
