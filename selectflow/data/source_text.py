"""The standard library's own source and prose as blocks of bytes, for language models."""

import platform
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from selectflow.data.build import Layout, build
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError, Manifest

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
_LEFT_OUT |= {"__pycache__", "ensurepip", "turtledemo"}

Text = tuple[str, str, str]  # key, domain, text


def make_code(
    root: str | Path,
    *,
    block: int = 512,
    num_target: int = 200,
    num_test: int = 400,
    seed: int = 0,
    layout: Layout | None = None,
) -> Manifest:
    """Write the source of the standard library and the prose of the language reference.

    A sample is a block of UTF-8 bytes as tokens, uint8 (block,), with the json
    `{"domain": "code" | "prose", "file": str}`. Target and test are code alone; train is code of
    other files, and all of the prose. A file's rest that does not fill a block is left out. The
    text depends on the version of Python, which the manifest names.

    Args:
        root: Dataset directory, made if missing.
        block: Bytes of a block, >= 1.
        num_target: Blocks of the target set, >= 1.
        num_test: Blocks of the test set, >= 1.
        seed: Chooses the files of each split, >= 0.
        layout: How to lay the samples out in shards.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, or the directory holds another dataset.
    """
    sizes = {"block": block, "num_target": num_target, "num_test": num_test}
    for name, value in sizes.items():
        if value < 1:
            raise DataError(f"{name} must be >= 1, got {value}; leave it out for the default")

    def make_splits() -> dict[str, Iterable[Sample]]:
        # a file belongs to one split whole, by its name; a tenth each is for target and test
        parts: dict[str, list[Text]] = {"train": [], "target": [], "test": []}
        for text in _code():
            place = zlib.crc32(f"{seed}/{text[0]}".encode()) % 10
            parts[{0: "target", 1: "test"}.get(place, "train")].append(text)
        held_out = {
            name: list(islice(_blocks(parts[name], block), count))
            for name, count in {"target": num_target, "test": num_test}.items()
        }
        for name, samples in held_out.items():
            if len(samples) < (wanted := sizes[f"num_{name}"]):
                raise DataError(
                    f"num_{name} must be at most {len(samples)}, got {wanted}; lower it or block"
                )
        return {"train": _blocks([*parts["train"], *_prose()], block), **held_out}

    options = {"name": "code", "python": platform.python_version(), **sizes}
    return build(root, make_splits, options, seed, layout or Layout())


def python_sources() -> Iterator[str]:
    """The standard library's source files, in the order of their paths."""
    for _, _, text in _code():
        yield text


def _code() -> Iterator[Text]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _LEFT_OUT & set(name.parts):
            yield str(name.with_suffix("")), "code", path.read_text(encoding="utf-8")


def _prose() -> Iterator[Text]:
    from pydoc_data.topics import topics  # noqa: PLC0415 - a long text that few need

    for name, text in sorted(topics.items()):
        yield f"topics/{name}", "prose", text


def _blocks(texts: Iterable[Text], size: int) -> Iterator[Sample]:
    for name, domain, text in texts:
        data = np.frombuffer(text.encode(), np.uint8)
        key = "".join(c if c.isascii() and (c.isalnum() or c in "_-/") else "-" for c in name)
        for index in range(len(data) // size):
            yield {
                "__key__": f"{key.removeprefix('__')}-{index:05d}",
                "npy": data[index * size : (index + 1) * size],
                "json": {"domain": domain, "file": name},
            }
