"""The command line: `selectflow init | shards | select | compare | audit | tune | doctor | ...`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from selectflow.core.files import print_anything

if TYPE_CHECKING:
    from selectflow.data import Layout

# A command imports what it alone needs when it runs, so that the others start quickly.
_tell = partial(print, flush=True)
_group = partial(typer.Typer, rich_markup_mode=None)
app = _group(
    help="Online data selection for PyTorch.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
shards = _group(help="Write, check and look at WebDataset shards.")
select = _group(help="What a run kept, as shards.")
app.add_typer(shards, name="shards")
app.add_typer(select, name="select")


def _option(metavar: str | None, text: str, default: Any = None, *names: str, **more: Any) -> Any:
    shown = not any(default is each for each in (None, False, ...))
    return typer.Option(default, *names, metavar=metavar, help=text, show_default=shown, **more)


def _argument(metavar: str, text: str, default: Any = ..., **more: Any) -> Any:
    return typer.Argument(default, metavar=metavar, help=text, show_default=False, **more)


_ROOT = _argument("DIR", "Dataset directory or its URL.")
_SOURCES_HELP = "Dataset directory or its URL; NAME=ROOT each, where they are several sources."
_PER_SHARD = _option("N", "Samples of a shard (default 256; text 4096).")
_MAX_BYTES = _option("N", "Bytes of contents that close a shard.")
_PACK = _option("N", "Samples of a record (default 1; text 64).")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` None: the arguments of the process.

    Returns 0, or 2 for an error of the user, which is printed to stderr. Arguments that cannot be
    read end the process with 2, by SystemExit.
    """
    print_anything()
    words = _with_wandb_mode(sys.argv[1:] if argv is None else argv)
    try:
        typer.main.get_command(app).main(words, prog_name="selectflow", standalone_mode=False)
    except typer.TyperException as error:
        text = re.sub(r"^Invalid value for '(.*?)'", r"argument \1", error.format_message())
        print(f"error: {text}; see --help", file=sys.stderr)
        raise SystemExit(2) from None
    except typer.Abort:  # typer's name for Ctrl-C
        raise KeyboardInterrupt from None
    except (ValueError, OSError) as error:
        # Our own errors explain themselves; any other ValueError is a defect and keeps its trace.
        if isinstance(error, ValueError) and not type(error).__module__.startswith("selectflow."):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _with_wandb_mode(argv: Sequence[str]) -> list[str]:
    """`compare --wandb` without a mode is online; an option of typer always has a value."""
    words = list(argv)
    if words[:1] == ["compare"] and "--wandb" in words:
        after = words.index("--wandb") + 1
        if after == len(words) or words[after].startswith("-"):
            words.insert(after, "online")
    return words


# option of the command line -> argument of the function, for each kind of dataset
_NOISE = {"label_noise": "label_noise"}
_OPTIONS = {
    "digits": _NOISE,
    "torchvision": _NOISE | {"target": "num_target"},
    "folder": _NOISE | {"target": "num_target", "test": "num_test", "size": "size"},
    "text": {
        "train": "num_train", "target": "num_target", "test": "num_test", "block": "block",
        "tokenizer": "tokenizer", "domain": "target_domain", "rest": "rest", "mixture": "mixture",
    },
}  # fmt: skip
_DATASET_HELP = (
    "digits; torchvision:NAME, as torchvision:CIFAR10; folder:PATH, images as "
    "PATH/<class>/<name>.png; text or code: the text of Python itself; text:files:FOLDER, text as "
    "FOLDER/<domain>/<name>.txt; text:jsonl:FILE; text:hf:NAME."
)
_MIXTURE_HELP = "Share of each domain, and of shuffled, duplicate and boilerplate text."


def _dataset(text: str) -> str:
    text = "text" if text == "code" else text
    if not re.fullmatch("digits|text|(torchvision|folder|text):.+", text):
        known = "digits, torchvision:NAME, folder:PATH, text, text:SOURCE or code"
        raise typer.BadParameter(f"must be {known}, got {text!r}")
    return text


def _mixture(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: float(share) for name, share in pairs}
    except ValueError:
        raise typer.BadParameter(
            f"must be NAME=SHARE,..., as code=0.2,prose=0.5,shuffled=0.3, got {text!r}"
        ) from None


@app.command()
def init(
    kind: Literal["vision", "language"] = _argument("KIND", "vision or language."),
    folder: Path = _argument("DIR", "Where to (default: here).", Path(".")),
) -> None:
    """Write a trainer and commented configurations to begin with."""
    from selectflow.run.starters import write_starter

    written = write_starter(kind, folder)
    trainer, config = (path.relative_to(folder) for path in written[:2])
    print(f"wrote {', '.join(map(str, written))}")
    print(f"to run it{'' if folder == Path() else f' in {folder}'}: python {trainer} {config}")


@app.command()
def doctor() -> None:
    """Versions, devices, precision, and what is missing for which extra."""
    from selectflow.run.doctor import examine

    for line in examine():
        print(line)


@shards.command()
def make(
    dataset: str = _argument("DATASET", _DATASET_HELP, parser=_dataset),
    root: Path = _option("DIR", "Where to write.", ...),
    seed: int = _option("N", "Seed of random choices.", 0),
    label_noise: float | None = _option("SHARE", "Share of wrong training labels (images)."),
    target: int | None = _option("N", "Samples of the target set."),
    test: int | None = _option("N", "Samples of the test set (folder, text)."),
    size: int | None = _option("PIXELS", "Height and width of the images (folder)."),
    train: int | None = _option("N", "Samples of the training set (text; needed for a mixture)."),
    block: int | None = _option("TOKENS", "Length of a block (text; default 128)."),
    tokenizer: str | None = _option("NAME", "bytes (default), bpe:SIZE or an existing one (text)."),
    domain: str | None = _option("NAME", "Domain of the target and test sets (default code)."),
    rest: str | None = _option("RULE", "What fills no block: drop (default), pad or pack (text)."),
    mixture: str | None = _option("NAME=SHARE,...", _MIXTURE_HELP, parser=_mixture),
    per_shard: int | None = _PER_SHARD,
    max_bytes: int | None = _MAX_BYTES,
    pack: int | None = _PACK,
) -> None:
    """Write a dataset."""
    given = {name: value for name, value in locals().items() if value is not None}
    from selectflow import data

    kind, _, argument = dataset.partition(":")
    names = _OPTIONS[kind]
    for name in set().union(*_OPTIONS.values()) - names.keys() & given.keys():
        flag, *flags = (f"--{each.replace('_', '-')}" for each in (name, *names))
        wrong = f"{flag} must be left out for {kind}, got {given[name]}"
        raise data.DataError(f"{wrong}; it takes {', '.join(flags)}")
    options = {names[name]: given[name] for name in names if name in given}
    layout = _layout(given, **({"per_shard": 4096, "pack": 64} if kind == "text" else {}))
    if kind == "digits":
        manifest = data.make_digits(root, **options, seed=seed, **vars(layout))
    elif kind == "text":
        text = data.TextOptions(argument or "python", **options)
        manifest = data.make_text(root, text, seed=seed, layout=layout)
    else:
        write = data.make_torchvision if kind == "torchvision" else data.make_folder
        manifest = write(root, argument, **options, seed=seed, layout=layout)
    print(f"wrote {root}: {manifest.sizes}")


def _layout(given: dict[str, Any], **defaults: int) -> Layout:
    """How samples are laid out in shards: as given, else by the defaults."""
    from selectflow.data import Layout

    names = ("per_shard", "max_bytes", "pack")
    return Layout(**(defaults | {n: given[n] for n in names if given.get(n) is not None}))


@shards.command()
def verify(root: str = _ROOT) -> None:
    """Read and decode every sample."""
    from selectflow import data

    faults = data.verify(root)
    for fault in faults:
        print(fault.message)
    if faults:
        names = sorted({fault.shard for fault in faults})
        raise data.DataError(
            f"every sample must be readable, got faults in {', '.join(names)}; restore them, "
            "write the dataset again, or train without those samples by data.max_errors"
        )
    print(f"{root}: every sample can be read")


@shards.command()
def ls(
    roots: list[str] = _argument("ROOT", _SOURCES_HELP),
    by: str | None = _option("WHAT", "Its sources: shard, key or json.FIELD, as in data.by."),
    split: str = _option("SPLIT", "Split of the sources.", "train"),
) -> None:
    """Splits, their sizes and how they were made; or the sources of a split."""
    from selectflow.data.listing import list_sources, list_splits

    lines = list_splits(roots[0])
    if len(roots) > 1 or by:
        lines = list_sources(dict(map(_named, roots)) if len(roots) > 1 else roots[0], split, by)
    for line in lines:
        print(line)


def _named(text: str) -> tuple[str, str]:
    name, found, root = text.partition("=")
    if not found:
        raise typer.BadParameter(f"must be NAME=ROOT where there are several, got {text!r}")
    return name, root


@shards.command("head")
def show_head(
    root: str = _ROOT,
    split: str = _option("SPLIT", "Name of the split.", "train"),
    count: int = _option("N", "Number of samples.", 16),
    image: Path | None = _option("PNG", "Save the images there as one contact sheet."),
) -> None:
    """The first samples of a split."""
    from selectflow.data import contact_sheet, head

    samples = head(root, split, count)
    for sample in samples:
        values = {name: value for name, value in sample.items() if name != "__key__"}
        print(sample["__key__"], *(f"{name}={_short(value)}" for name, value in values.items()))
    if image:
        contact_sheet(samples, image)
        print(f"wrote {image}")


def _short(value: Any) -> str:
    is_array = hasattr(value, "dtype")
    text = f"{value.dtype}{list(value.shape)}" if is_array else repr(value)
    return text if is_array or len(text) <= 60 else text[:57] + "..."


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < (share := float(text)) <= 1:
            return share
    raise typer.BadParameter(f"must be in (0, 1], got {text!r}; 0.5 is the better half")


@select.command("write-shards")
def write_shards(
    run: Path = _argument("RUN", "Run directory with a ledger."),
    out: Path = _option("DIR", "Where to write.", ...),
    top: float | None = _option(
        "SHARE", "Best share of the candidates by mean score, not those kept.", parser=_share
    ),
    source: str | None = _option("DIR", "The run's dataset or its URL, if it was moved."),
    per_shard: int | None = _PER_SHARD,
    max_bytes: int | None = _MAX_BYTES,
    pack: int | None = _PACK,
) -> None:
    """What a run kept, as a dataset of its own."""
    from selectflow.run.offline import write_kept

    manifest, num = write_kept(run, out, top, source, _layout(locals()))
    print(f"wrote {out}: {manifest.sizes}; of {num} candidates")


_WANDB_HELP = """Log the comparison as a W&B run: online (the default, offline where W&B cannot be
reached) or offline, for `wandb sync`."""


@app.command()
def compare(
    runs: list[str] = _argument("RUN", "Run directory, glob, or entity/project/run_id at W&B."),
    out: Path = _option("DIR", "Where compare.csv, compare.html and pictures go.", Path(".")),
    baseline: str | None = _option("GROUP", "Group to test against (default uniform, or first)."),
    metric: str | None = _option("NAME", "What to judge by (default: test accuracy, else loss)."),
    loss: str = _option("NAME", "Name of the loss to be reached.", "test/loss"),
    reach: float | None = _option("LOSS", "Value of it (default: baseline's last, same seed)."),
    partial: bool = _option(None, "Unfinished runs too, as far as they got.", False, "--partial"),
    wandb: Literal["online", "offline"] | None = _option("[MODE]", _WANDB_HELP),
    project: str | None = _option("NAME", "W&B project (default WANDB_PROJECT, or selectflow)."),
) -> None:
    """Tables, pictures and a page of several runs."""
    from selectflow.report.compare import summarize
    from selectflow.report.page import examine_groups, to_report, write_outputs
    from selectflow.report.runs import load_runs
    from selectflow.report.tables import print_tables
    from selectflow.run.wandb import log_report

    comparison = summarize(
        load_runs(runs), baseline=baseline, quality=metric, loss=loss, reach=reach, partial=partial
    )
    print_tables(comparison)
    written = write_outputs(comparison, examine_groups(comparison.runs), out)
    print(f"wrote {', '.join(map(str, written))}")
    if wandb:
        report = to_report(comparison, written)
        if run_id := log_report(report, out, mode=wandb, project=project):
            print(f"logged to W&B as run {run_id}")


@app.command()
def watch(
    runs: list[str] = _argument("RUN", "Run directory, folder of them, or glob; may come later."),
    port: int | None = _option("N", "Port (default: the first free one from 8765 on).", min=0),
) -> None:
    """The page of `compare` while runs go on, at an address of this machine alone."""
    from selectflow.report.live import LivePage
    from selectflow.report.server import open_server

    with open_server(LivePage(runs), port) as server, suppress(KeyboardInterrupt):
        _tell(f"watching {', '.join(runs)} at {server.url} (Ctrl-C ends it)")
        server.serve_forever()


@app.command()
def audit(
    config: Path = _argument("CONFIG", "YAML of an audit."),
    overrides: list[str] = _argument("KEY=VALUE", "As in seeds=1.", None),
) -> None:
    """Compare influence with leave-one-out retraining."""
    from selectflow.audit.budget import print_budget, read_results, run_audit
    from selectflow.audit.proxy import print_proxy, run_proxy
    from selectflow.audit.study import ProxyConfig, load_audit

    study = load_audit(config, overrides)
    if isinstance(study, ProxyConfig):
        folder, figures = run_proxy(study, _tell)
        print_proxy(figures)
    else:
        folder = run_audit(study, _tell)
        print_budget(read_results(study))
    print(f"wrote {folder}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"must be an integer >= 1, got {text!r}")
    return int(text)


@app.command()
def tune(
    sweep: Path = _argument("SWEEP", "YAML of a sweep, as W&B has it."),
    local: bool = _option(None, "Here, without a server; resumes (default).", False, "--local"),
    wandb: bool = _option(None, "Create it on W&B and serve it.", False, "--wandb"),
    jobs: int | None = _option("N", "Processes at once (default: one per core).", parser=_count),
    out: Path | None = _option("DIR", "Where the record and runs go (default: runs/<sweep>)."),
    count: int | None = _option("N", "Most runs of this agent (--wandb).", parser=_count),
) -> None:
    """Search horizon, learning rate or any other options."""
    if local and wandb:
        raise typer.BadParameter("not allowed with argument --local", param_hint="'--wandb'")
    from selectflow.tune import search
    from selectflow.tune import wandb as server
    from selectflow.tune.cells import write_outputs
    from selectflow.tune.space import load_sweep

    loaded = load_sweep(sweep)
    folder = out or Path("runs", loaded.plain_name)
    if wandb:
        found = server.serve(loaded, count)
    else:
        try:
            study = search.tune(loaded, folder, jobs or os.cpu_count() or 1, _tell)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on where {folder} is", file=sys.stderr)
            raise SystemExit(130) from None
        found = search.read_cells(loaded, study, folder)
    if found.cells:
        print(f"wrote {', '.join(map(str, write_outputs(loaded, found, folder)))}")


@app.command()
def schema() -> None:
    """JSON schema of a run's configuration."""
    from selectflow.run.config import json_schema

    print(json_schema())
