"""The files of a selection ledger: each process of a run writes parts of its own, read as one.

A part is `part-<first step>.parquet`, of the process of rank r of n `part-<first
step>-rank<r>of<n>.parquet`. A run that goes on in another number of processes leaves parts of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

ADDED = {"source": pa.string()}
"""Columns that ledgers of earlier versions do not have."""

_NAME = re.compile(r"part-(\d+)(?:-rank(\d+)of(\d+))?\.parquet")


class LedgerError(ValueError):
    """A ledger that is not there, or not whole; the message says where and what to do."""


class Writer(NamedTuple):
    """Which process wrote a part: that of `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def part(self, first: int) -> str:
        """The name of its part that begins with the step `first`."""
        of = "" if self.size == 1 else f"-rank{self.rank}of{self.size}"
        return f"part-{first:08d}{of}.parquet"


class Part(NamedTuple):
    """One file: its writer, the step that it begins with, and where it is."""

    writer: Writer
    first: int
    path: Path


def parts_of(folder: Path) -> dict[Writer, list[Part]]:
    """The parts of each writer in the order of steps; writers by number and rank."""
    found: dict[Writer, list[Part]] = {}
    for path in folder.glob("part-*.parquet"):
        if (part := _part(path)) is not None:
            found.setdefault(part.writer, []).append(part)
    order = sorted(found, key=lambda writer: (writer.size, writer.rank))
    return {writer: sorted(found[writer], key=lambda part: part.first) for writer in order}


def leftovers(folder: Path) -> Iterator[Part]:
    """Halves of parts that were being written when a process was killed."""
    for path in folder.glob(".part-*.tmp"):
        if match := _NAME.search(path.name):
            yield Part(*_named(match), path)


def _part(path: Path) -> Part | None:
    match = _NAME.fullmatch(path.name)
    return Part(*_named(match), path) if match else None


def _named(match: re.Match[str]) -> tuple[Writer, int]:
    return Writer(int(match[2] or 0), int(match[3] or 1)), int(match[1])


def read_part(path: Path, columns: Sequence[str] | None) -> Any:
    """The rows of one part; columns that an earlier version did not write are null.

    Raises:
        LedgerError: it is no whole file.
    """
    try:
        with ParquetFile(path) as file:
            known = file.schema_arrow.names
            lacking = [name for name in (ADDED if columns is None else columns) if name in ADDED]
            lacking = [name for name in lacking if name not in known]
            wanted = None if columns is None else [name for name in columns if name not in lacking]
            table = file.read(wanted, use_threads=False)
            for name in lacking:
                table = table.append_column(name, pa.nulls(file.metadata.num_rows, ADDED[name]))
            return table if columns is None else table.select(list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LedgerError(
            f"part of the ledger must be a whole Parquet file, got {path} ({reason}); put it back "
            "from a copy, or run again with overwrite=true"
        ) from error


def merged(
    parts: dict[Writer, list[Part]], columns: Sequence[str] | None, upto: float
) -> Iterator[Any]:
    """Tables of whole steps; the rows of a step are those of rank 0, then those of rank 1, ...

    Args:
        upto: the last step that is wanted.
    """
    if len(parts) == 1:
        for part in next(iter(parts.values())):
            table = read_part(part.path, columns)
            yield table if upto == math.inf else _until(table, part, upto)
        return
    wanted = None if columns is None else list(dict.fromkeys(["step", *columns]))
    left = {writer: iter(own) for writer, own in parts.items()}
    held: dict[Writer, Any] = {}  # rows of its present part that were not handed out
    while True:
        for writer, own in left.items():
            following = next(own, None) if writer not in held else None
            if following is not None:
                held[writer] = read_part(following.path, wanted)
        if not held:
            return
        tables = [held[writer] for writer in parts if writer in held]
        if min(table["step"][0].as_py() for table in tables) > upto:
            return
        last = min(map(_last_step, tables))
        found = pa.concat_tables([_rows_to(table, min(last, upto)) for table in tables])
        found = found.take(np.argsort(_steps(found), kind="stable"))
        yield found if columns is None else found.select(list(columns))
        rest = {writer: table.filter(_steps(table) > last) for writer, table in held.items()}
        held = {writer: table for writer, table in rest.items() if len(table)}


def last_whole_step(parts: dict[Writer, list[Part]]) -> float:
    """The last step that all processes have written; inf: all there are, of one process."""
    if list(parts) == [Writer()]:
        return math.inf
    last: dict[int, list[int]] = {}  # steps, by the number of processes
    for writer, own in parts.items():
        step = _last_step(read_part(own[-1].path, ["step"]))
        last.setdefault(writer.size, []).append(step)
    return max((min(steps) for size, steps in last.items() if len(steps) == size), default=0)


def newest_step(folder: Path) -> Any:
    """The rows of the last step that all processes have written: step, key, score and kept.

    None where there is none yet. However long the run is, the last parts alone are read.

    Raises:
        LedgerError: a part cannot be read.
    """
    parts = parts_of(folder)
    if not parts or not (upto := last_whole_step(parts)):
        return None
    last = {writer: own[-2:] for writer, own in parts.items()}  # one may be a part ahead of another
    *_, table = merged(last, ["step", "key", "score", "kept"], upto)
    return table.filter(_steps(table) == _last_step(table))


def _until(table: Any, part: Part, upto: float) -> Any:
    """The rows of a part up to a step; it may have been read without its steps."""
    return table.filter(_steps(read_part(part.path, ["step"])) <= upto)


def _rows_to(table: Any, upto: float) -> Any:
    return table.filter(_steps(table) <= upto)


def _steps(table: Any) -> Any:
    return table["step"].to_numpy()


def _last_step(table: Any) -> int:
    return int(table["step"][-1].as_py())
