"""The command line: `selectflow shards | select | compare | audit | tune | schema`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selectflow.audit.config import ProxyConfig, load_audit
from selectflow.cli_compare import add_arguments as add_compare
from selectflow.cli_select import add_commands as add_select
from selectflow.cli_shards import add_commands as add_shards
from selectflow.cli_tune import add_arguments as add_tune
from selectflow.run.config import json_schema
from selectflow.run.terminal import print_anything

# A command imports what it alone needs when it runs, so that the others start quickly.


def _audit(args: argparse.Namespace) -> None:
    from selectflow.audit.budget import read_results, run_audit  # noqa: PLC0415
    from selectflow.audit.report import print_budget  # noqa: PLC0415

    config = load_audit(args.config, args.overrides)
    if isinstance(config, ProxyConfig):
        _audit_proxy(config)
        return
    folder = run_audit(config, lambda done: print(done, flush=True))
    print_budget(read_results(config))
    print(f"wrote {folder}")


def _audit_proxy(config: ProxyConfig) -> None:
    from selectflow.audit.proxy import run_proxy  # noqa: PLC0415
    from selectflow.audit.report import print_proxy  # noqa: PLC0415

    folder, figures = run_proxy(config, lambda done: print(done, flush=True))
    print_proxy(figures)
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
    add_compare(compare)

    audit = commands.add_parser("audit", help="compare influence with leave-one-out retraining")
    audit.add_argument("config", type=Path, metavar="CONFIG", help="YAML of an audit")
    audit.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in seeds=1")
    audit.set_defaults(command=_audit)

    tune = commands.add_parser("tune", help="search horizon, learning rate or any other options")
    add_tune(tune)

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
    print_anything()
    try:
        args.command(args)
    except (ValueError, OSError) as error:
        # Our own errors explain themselves; any other ValueError is a defect and keeps its trace.
        if isinstance(error, ValueError) and not type(error).__module__.startswith("selectflow."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
