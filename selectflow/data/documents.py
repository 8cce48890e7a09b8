"""Documents with a domain: the text that comes with Python, files, JSON lines, Hugging Face."""

from __future__ import annotations

import ast
import json
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from selectflow.data.folders import find_files
from selectflow.data.manifest import DataError

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
_LEFT_OUT |= {"__pycache__", "ensurepip", "turtledemo"}
_SUFFIXES = (".txt", ".md")
_TABLES = "encodings"  # its modules are lists of characters, made by a program


class Document(NamedTuple):
    """A text of one domain."""

    name: str  # unique in its source
    domain: str  # what kind of text it is
    text: str


class DocumentGroup(NamedTuple):
    """Documents that must not be divided between splits, as the code and docstrings of a file."""

    identity: str  # decides on the split; equal for equal texts
    read: Callable[[], Iterable[Document]]


def find_documents(source: str) -> list[DocumentGroup]:
    """The documents that `TextOptions.source` names.

    Raises:
        DataError: There is no such kind of source, or it cannot be read.
    """
    kind, _, where = source.partition(":")
    readers = {"files": text_files, "jsonl": json_lines, "hf": hugging_face}
    if source == "python":
        return source_text()
    if kind not in readers or not where:
        raise DataError(
            f"source must be python, files:FOLDER, jsonl:FILE or hf:NAME, got {source!r}; "
            "python needs nothing"
        )
    return readers[kind](where)


def source_text() -> list[DocumentGroup]:
    """The text that comes with Python; it depends on its version.

    "code" is the source of the standard library without its docstrings, which are "docstrings", one
    document for each file. "prose" is the language reference, "tables" the modules of `encodings`,
    "headers" Python's own C headers, if they are installed.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415 - a long text that few need

    groups = []
    for name, path in _python_files():
        key, domain = str(name.with_suffix("")), "tables" if name.parts[0] == _TABLES else "code"
        groups.append(DocumentGroup(key, partial(_read_file, path, key, domain)))
    include = Path(sysconfig.get_path("include"))
    for path in sorted(include.rglob("*.h")):
        key = f"include/{path.relative_to(include).with_suffix('')}"
        groups.append(DocumentGroup(key, partial(_read_file, path, key, "headers")))
    return groups + [
        _alone(Document(f"topics/{name}", "prose", text), f"topics/{name}")
        for name, text in sorted(topics.items())
    ]


def python_sources() -> Iterator[str]:
    """The standard library's source files as they are, in the order of their paths."""
    for _, path in _python_files():
        yield path.read_text(encoding="utf-8")


def _python_files() -> Iterator[tuple[Path, Path]]:
    """Relative and absolute paths."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not _LEFT_OUT & set(name.parts):
            yield name, path


def _read_file(path: Path, key: str, domain: str) -> Iterator[Document]:
    text, docstrings = path.read_text(encoding="utf-8"), ""
    if domain == "code":
        text, docstrings = split_docstrings(text)
    yield Document(key, domain, text)
    if docstrings:
        yield Document(f"{key}/docstrings", "docstrings", docstrings)


def split_docstrings(source: str) -> tuple[str, str]:
    """Python source without its docstrings, and the docstrings, joined by empty lines."""
    lines: list[str | None] = [*source.split("\n")]  # as ast counts them: not at form feeds
    docstrings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                docstrings.append(text)
                statement = node.body[0]
                first, last = statement.lineno - 1, statement.end_lineno
                lines[first:last] = [None] * len(lines[first:last])
    return "\n".join(line for line in lines if line is not None), "\n\n".join(docstrings)


def text_files(folder: str | Path) -> list[DocumentGroup]:
    """The files `<folder>/<domain>/**/*.txt` and `.md`, in upper or lower case, as they are.

    Hidden files and those of other endings are left out, which a warning counts.

    Raises:
        DataError: There are none, also in one domain alone, or one is not UTF-8.
    """
    root = Path(folder)
    files = find_files(root, _SUFFIXES, deep=True)
    if not files:
        raise DataError(
            f"folder must hold text as <domain>/<name>.txt, got none in {str(folder)!r}; "
            "correct the path"
        )
    groups, stems = [], Counter(path.with_suffix("") for path in files)
    for path in files:
        try:
            text = _read_utf8(path)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} must be UTF-8, got {error}; convert or remove it") from error
        name, stem = path.relative_to(root), path.relative_to(root).with_suffix("")
        key = name if stems[path.with_suffix("")] > 1 else stem
        groups.append(_alone(Document(str(key), name.parts[0], text)))
    return groups


def json_lines(path: str | Path) -> list[DocumentGroup]:
    """The lines `{"text": str, "domain": str}` of a file; without a domain it is "text".

    Raises:
        DataError: The file cannot be read, or a line is not like this; names it.
    """
    try:
        lines = _read_utf8(Path(path)).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable UTF-8, got {error}; correct it") from error
    groups = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            rule = f"line {number} of {path} must be a JSON object"
            raise DataError(f"{rule}, got {error}; correct it") from error
        groups.append(_alone(_of_row(f"{Path(path).stem}/{number:08d}", row)))
    if not groups:
        raise DataError(f"{path} must hold at least one line, got none; correct the path")
    return groups


def hugging_face(name: str) -> list[DocumentGroup]:
    """The rows of a dataset's split "train": column "text", and "domain" where there is one.

    Args:
        name: A folder that `Dataset.save_to_disk` wrote, or what `datasets.load_dataset` takes,
            with a configuration after a comma: "wikitext,wikitext-2-raw-v1".

    Raises:
        DataError: The library is missing, or the dataset cannot be loaded or has no text.
    """
    rows = _load_rows(name)
    columns = list(getattr(rows, "column_names", []))
    if "text" not in columns:
        raise DataError(f"dataset must have a column 'text', got {columns}; rename the one it has")
    return [_alone(_of_row(f"row/{number:08d}", rows[number])) for number in range(len(rows))]


def _load_rows(name: str) -> Any:
    try:
        import datasets  # noqa: PLC0415 - heavy, and needed for this source alone
    except ImportError as error:
        raise DataError(
            f"hf:{name} needs the datasets library, got none; pip install datasets"
        ) from error
    try:
        if Path(name).is_dir() and not list(Path(name).glob("*.parquet")):
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(*name.split(","), split="train")
    except Exception as error:  # the library documents no closed list of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"hf:{name} must be a folder of save_to_disk or a dataset on Hugging Face, got "
            f"{type(error).__name__}: {reason}; without a network, save it to disk elsewhere"
        ) from error
    return rows["train"] if isinstance(rows, datasets.DatasetDict) else rows


def _read_utf8(path: Path) -> str:
    """The text of a file, its line ends as they are, without a byte order mark."""
    return path.read_bytes().decode("utf-8-sig")


def _of_row(name: str, row: Any) -> Document:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise DataError(f"{name} must have a string 'text', got {row!r:.80}; correct or drop it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold halves of surrogate pairs
        raise DataError(f"{name} must have a text of whole characters, got {error}") from error
    domain = row.get("domain")
    return Document(name, "text" if domain in (None, "") else str(domain), text)


def _alone(document: Document, identity: str = "") -> DocumentGroup:
    # by its text, so that a copy under another name goes to the same split
    identity = identity or f"{zlib.crc32(document.text.encode()):08x}"
    return DocumentGroup(identity, lambda: (document,))
