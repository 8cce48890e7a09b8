"""The command line: `selectflow shards | select | compare | audit | schema`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selectflow import cli_compare
from selectflow.audit_config import load_audit
from selectflow.cli_select import add_commands as add_select
from selectflow.cli_shards import add_commands as add_shards
from selectflow.config import json_schema

# A command imports what it alone needs when it runs, so that the others start quickly.


def _audit(args: argparse.Namespace) -> None:
    from selectflow.audit_report import measured_before, run_audit  # noqa: PLC0415
    from selectflow.report.audit import print_budget  # noqa: PLC0415

    config = load_audit(args.config, args.overrides)
    folder = run_audit(config, lambda done: print(done, flush=True))
    print_budget(measured_before(config, folder))
    print(f"wrote {folder}")


def _schema(args: argparse.Namespace) -> None:
    print(json_schema())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selectflow", description="Online data selection for PyTorch."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shards = commands.add_parser("shards", help="write, check and look at WebDataset shards")
    add_shards(shards)

    select = commands.add_parser("select", help="what a run kept, as shards")
    add_select(select)

    compare = commands.add_parser("compare", help="tables, pictures and a page of several runs")
    cli_compare.add_command(compare)

    audit = commands.add_parser("audit", help="compare influence with leave-one-out retraining")
    audit.add_argument("config", type=Path, metavar="CONFIG", help="YAML of an audit")
    audit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in seeds=1")
    audit.set_defaults(command=_audit)

    schema = commands.add_parser("schema", help="JSON schema of a run's configuration")
    schema.set_defaults(command=_schema)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None for those of the process.

    Returns:
        0, or 2 for an error of the user, which is printed to stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        # Our own errors explain themselves; any other ValueError is a defect and keeps its trace.
        if isinstance(error, ValueError) and not type(error).__module__.startswith("selectflow."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
