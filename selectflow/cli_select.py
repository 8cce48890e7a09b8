"""The command line: `selectflow select write-shards`."""

import argparse
from pathlib import Path
from typing import Any

from selectflow.cli_shards import add_layout, layout_of

# A command imports what it alone needs when it runs, so that the others start quickly.


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `selectflow select` to its parser."""
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")
    write = kinds.add_parser("write-shards", help="what a run kept, as a dataset of its own")
    write.add_argument("run", type=Path, metavar="RUN", help="run directory with a ledger")
    write.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    write.add_argument(
        "--top", type=_share, metavar="SHARE",
        help="the best share in (0, 1] of all candidates by mean score, instead of those kept",
    )  # fmt: skip
    write.add_argument(
        "--source", metavar="DIR",
        help="the run's dataset, directory or URL, where it is not where the run read it",
    )  # fmt: skip
    add_layout(write)
    write.set_defaults(command=_write_shards)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}; 0.5 is the better half")
    return share


def _write_shards(args: argparse.Namespace) -> None:
    from selectflow.data import find_splits, open_catalog  # noqa: PLC0415
    from selectflow.run.config import load  # noqa: PLC0415
    from selectflow.run.ledger import last_step, read_stream  # noqa: PLC0415
    from selectflow.run.scores import kept_keys, mean_scores, write_selected  # noqa: PLC0415

    stream = read_stream(args.run)
    config = load(args.run / "config.yaml")
    source = args.source or str(config.data.directory)
    split = stream.get("split", "train")
    _check_same_data(source, open_catalog(source, split).fingerprint, stream)
    scores = mean_scores(args.run)
    kept = kept_keys(args.run) if args.top is None else scores.top(args.top)
    made_from: dict[str, Any] = {"run": config.run_name, "steps": last_step(args.run)}
    made_from |= {"chosen": "kept"} if args.top is None else {"chosen": "top", "share": args.top}
    manifest = write_selected(
        args.out,
        scores,
        kept,
        source,
        made_from,
        seed=config.seed,
        split=split,
        copied=set(find_splits(source)) - {split},
        layout=layout_of(args),
    )
    sizes = (f"{name} {manifest.num_samples(name)}" for name in manifest.splits)
    print(f"wrote {args.out}: {', '.join(sizes)}; of {len(scores.keys)} candidates")


def _check_same_data(source: str, fingerprint: str, stream: dict[str, Any]) -> None:
    from selectflow.data import DataError  # noqa: PLC0415

    known = stream.get("fingerprint", fingerprint)  # pools of a user's own need not say
    if known != fingerprint:
        raise DataError(
            f"source must be the dataset of the run, with fingerprint {known}, got {source} with "
            f"{fingerprint}; pass it by --source"
        )
