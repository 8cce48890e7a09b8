"""The standard library's own text: code, docstrings, prose, tables and C headers."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from selectflow.data.documents import Document, Unit

_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
_LEFT_OUT |= {"__pycache__", "ensurepip", "turtledemo"}
_TABLES = "encodings"  # its modules are lists of characters, made by a program

SOURCE_DOMAINS = ("code", "docstrings", "prose", "tables", "headers")


def source_text() -> list[Unit]:
    """The text that comes with Python; it depends on its version.

    "code" is the source of the standard library without its docstrings, which are "docstrings", one
    document for each file. "prose" is the language reference, "tables" the modules of `encodings`,
    "headers" Python's own C headers, where they are installed.
    """
    units = []
    for name, path in _python_files():
        key = str(name.with_suffix(""))
        read = partial(_table if name.parts[0] == _TABLES else _module, path, key)
        units.append(Unit(key, read))
    include = Path(sysconfig.get_path("include"))
    for path in sorted(include.rglob("*.h")):
        key = f"include/{path.relative_to(include).with_suffix('')}"
        units.append(Unit(key, partial(_header, path, key)))
    return [*units, *_reference()]


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


def _module(path: Path, key: str) -> Iterator[Document]:
    code, docstrings = split_docstrings(path.read_text(encoding="utf-8"))
    yield Document(key, "code", code)
    if docstrings:
        yield Document(f"{key}/docstrings", "docstrings", docstrings)


def _table(path: Path, key: str) -> Iterator[Document]:
    yield Document(key, "tables", path.read_text(encoding="utf-8"))


def _header(path: Path, key: str) -> Iterator[Document]:
    yield Document(key, "headers", path.read_text(encoding="utf-8"))


def _reference() -> Iterator[Unit]:
    from pydoc_data.topics import topics  # noqa: PLC0415 - a long text that few need

    for name, text in sorted(topics.items()):
        key = f"topics/{name}"
        yield Unit(key, partial(_topic, key, text))


def _topic(key: str, text: str) -> Iterator[Document]:
    yield Document(key, "prose", text)


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
