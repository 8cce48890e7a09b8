"""Files in folders of classes: which are taken, and a word about the others."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from selectflow.data.manifest import DataError

_log = logging.getLogger(__name__)


def find_files(folder: str | Path, suffixes: Sequence[str], *, deep: bool = False) -> list[Path]:
    """The files `<folder>/<class>/<name><suffix>`, sorted; a warning counts those left out.

    Left out are names that begin with a dot, as programs and systems make for themselves, other
    endings, and files beside the classes.

    Args:
        folder: Where the classes are.
        suffixes: Endings to take, in lower case; a file's own may be of any case.
        deep: True takes files in folders inside a class, too.

    Raises:
        DataError: No such folder, one that cannot be read, or a class without such a file.
    """
    root, left_out = Path(folder), Counter[str]()
    taken: list[Path] = []
    for path in _visible(root, left_out):
        if not path.is_dir():
            left_out["beside the classes"] += 1
            continue
        others = Counter[str]()
        files = list(_take(path, suffixes, deep, others, ()))
        if not files:
            raise DataError(
                f"class {path.name!r} must hold files that end in {', '.join(suffixes)}, got "
                f"{_listed(others)} in {str(path)!r}; convert them, or move the folder elsewhere"
            )
        taken += files
        left_out += others
    if left_out:
        _log.warning("left out of %s: %s", folder, _listed(left_out))
    return sorted(taken)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


def _take(
    folder: Path, suffixes: Sequence[str], deep: bool, left_out: Counter[str], above: Sequence[Path]
) -> Iterator[Path]:
    here = folder.resolve()
    if here in above:  # a link to a folder that it lies in
        return
    for path in _visible(folder, left_out):
        if path.is_dir():
            inside = list(_take(path, suffixes, deep, left_out, (*above, here)))
            if deep:
                yield from inside
            else:
                left_out["in folders inside a class"] += len(inside)
        elif path.suffix.lower() in suffixes:
            yield path
        else:
            left_out[f"that end in {path.suffix!r}"] += 1


def _visible(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"folder must be one that can be read, got {str(folder)!r} ({error.strerror}); "
            "correct the path"
        ) from error
    for path in paths:
        if path.name.startswith("."):
            left_out["hidden"] += 1
        else:
            yield path
