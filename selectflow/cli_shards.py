"""The command line: `selectflow shards make | verify | ls | head`."""

import argparse
from pathlib import Path
from typing import Any

# A command imports what it alone needs when it runs, so that the others start quickly.


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `selectflow shards` to its parser."""
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_make(kinds)
    verify = kinds.add_parser("verify", help="read and decode every sample")
    verify.set_defaults(command=_verify)
    ls = kinds.add_parser("ls", help="splits, their sizes and how they were made")
    ls.set_defaults(command=_ls)
    head = kinds.add_parser("head", help="the first samples of a split")
    head.add_argument("--split", default="train", help="name of the split (default train)")
    head.add_argument("--count", type=int, default=16, metavar="N", help="samples (default 16)")
    head.add_argument(
        "--image", type=Path, metavar="PNG", help="save the images there as one contact sheet"
    )
    head.set_defaults(command=_head)
    for command in (verify, ls, head):
        command.add_argument("root", metavar="DIR", help="dataset directory or its URL")


def _add_make(kinds: Any) -> None:
    make = kinds.add_parser("make", help="write a dataset")
    make.add_argument(
        "dataset", metavar="DATASET", type=_dataset,
        help="digits; torchvision:NAME, as torchvision:CIFAR10; folder:PATH, images as "
        "PATH/<class>/<name>.png; text or code: what comes with Python; text:files:FOLDER, text as "
        "FOLDER/<domain>/<name>.txt; text:jsonl:FILE; text:hf:NAME",
    )  # fmt: skip
    make.add_argument("--root", type=Path, required=True, metavar="DIR", help="where to write")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="of random choices")
    for name, kind, metavar, text in (
        ("label-noise", float, "SHARE", "share of training labels made wrong, in [0, 1] (images)"),
        ("target", int, "N", "samples of the target set"),
        ("test", int, "N", "samples of the test set (folder, text)"),
        ("size", int, "PIXELS", "height and width of the images (folder)"),
        ("train", int, "N", "samples of the training set (text; needed for a mixture)"),
        ("block", int, "TOKENS", "length of a block (text; default 128)"),
        ("tokenizer", str, "NAME", "bytes, bpe:SIZE, or an existing one (text; default bytes)"),
        ("domain", str, "NAME", "of the target and test sets (text; default code)"),
        ("rest", str, "RULE", "of what fills no block: drop, pad or pack (text; default drop)"),
        ("mixture", _mixture, "NAME=SHARE,...", "domains and shuffled, duplicate, boilerplate"),
    ):
        make.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    add_layout(make)
    make.set_defaults(command=_make)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how samples are laid out in shards."""
    for name, text in (
        ("per-shard", "samples of a shard (default 256; text 4096)"),
        ("max-bytes", "bytes of contents that close a shard"),
        ("pack", "samples of a record, for small ones (default 1; text 64)"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)


def layout_of(args: argparse.Namespace, **defaults: int) -> Any:
    """The `Layout` that the options of `add_layout` say; `defaults` for those left out."""
    from selectflow.data import Layout  # noqa: PLC0415

    given = {name: getattr(args, name) for name in _LAYOUT}
    named = {name: value for name, value in given.items() if value is not None}
    return Layout(**(defaults | named))


# option of the command line -> argument of the function, for each dataset
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
_LAYOUT = ("per_shard", "max_bytes", "pack")


def _dataset(text: str) -> tuple[str, str]:
    kind, colon, argument = text.partition(":")
    kind = "text" if text == "code" else kind
    needs = {"digits": (False,), "torchvision": (True,), "folder": (True,), "text": (False, True)}
    if bool(argument) not in needs.get(kind, ()) or (colon and not argument):
        raise argparse.ArgumentTypeError(
            "must be digits, torchvision:NAME, folder:PATH, text, text:SOURCE or code, "
            f"got {text!r}"
        )
    return kind, argument


def _mixture(text: str) -> dict[str, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name: float(share) for name, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be NAME=SHARE,..., as code=0.2,prose=0.5,shuffled=0.3, got {text!r}"
        ) from None


def _make(args: argparse.Namespace) -> None:
    from selectflow import data  # noqa: PLC0415

    kind, argument = args.dataset
    names = _OPTIONS[kind]
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in {name for options in _OPTIONS.values() for name in options} - names.keys():
        if name in given:
            raise data.DataError(
                f"--{name.replace('_', '-')} must be left out for {kind}, got {given[name]}; "
                f"it takes {', '.join('--' + name.replace('_', '-') for name in names)}"
            )
    options = {names[name]: given[name] for name in names if name in given} | {"seed": args.seed}
    layout = layout_of(args, **({"per_shard": 4096, "pack": 64} if kind == "text" else {}))
    if kind == "digits":
        manifest = data.make_digits(args.root, **options, **vars(layout))
    elif kind == "text":
        seed = options.pop("seed")
        made = data.TextOptions(argument or "python", **options)
        manifest = data.make_text(args.root, made, seed=seed, layout=layout)
    elif kind == "torchvision":
        manifest = data.make_torchvision(args.root, argument, **options, layout=layout)
    else:
        manifest = data.make_folder(args.root, argument, **options, layout=layout)
    sizes = (f"{split} {manifest.num_samples(split)}" for split in manifest.splits)
    print(f"wrote {args.root}: {', '.join(sizes)}")


def _verify(args: argparse.Namespace) -> None:
    from selectflow.data import DataError, verify  # noqa: PLC0415

    faults = verify(args.root)
    for fault in faults:
        print(fault.message)
    if faults:
        shards = sorted({fault.shard for fault in faults})
        raise DataError(
            f"every sample must be readable, got faults in {', '.join(shards)}; restore them, "
            "write the dataset again, or train without those samples by data.max_errors"
        )
    print(f"{args.root}: every sample can be read")


def _ls(args: argparse.Namespace) -> None:
    from selectflow.data import DataError, find_manifest, find_splits, open_catalog  # noqa: PLC0415

    print(f"{'split':12} {'shards':>8} {'samples':>10} {'MiB':>10}")
    for split in find_splits(args.root):
        held = open_catalog(args.root, split)
        size = held.num_bytes / 2**20
        print(f"{split:12} {len(held.entries):8} {held.num_samples:10} {size:10.2f}")
    first = held.entries[0]
    print(f"fields: {', '.join(first.fields)}; samples of a record: {first.pack}")
    try:
        manifest = find_manifest(args.root)
    except DataError:
        print("made from: not known, without a manifest")
        return
    options = (f"{name}={value}" for name, value in manifest.options.items())
    print(f"made from: {' '.join(options)} seed={manifest.seed}")


def _head(args: argparse.Namespace) -> None:
    from selectflow.data import contact_sheet, head  # noqa: PLC0415

    samples = head(args.root, args.split, args.count)
    for sample in samples:
        values = {name: value for name, value in sample.items() if name != "__key__"}
        print(sample["__key__"], *(f"{name}={_short(value)}" for name, value in values.items()))
    if args.image:
        contact_sheet(samples, args.image)
        print(f"wrote {args.image}")


def _short(value: Any) -> str:
    if hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
