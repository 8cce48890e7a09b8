"""The selection ledger: every decision of a run as Parquet, one row a candidate.

`selection/` of a run directory holds parts, `part-<first step>.parquet`, in which the rows of a
step stand together, in the order of its pool. The columns:

    step     int64   optimizer step that the pool was for, from 1
    epoch    int64   of the candidate's source, from 0; null where the pools have no epochs
    key      string  the candidate's sample id
    score    double  larger is kept first, the float32 or float64 it was compared as; null where
                     control found that selection does not pay, and all of a pool was trained on:
                     each step then has the rows of its part alone; under select.weighting=relu the
                     weight of a kept one is max(0, score), by the mean of these over the kept of
                     its pool
    loss     double  at the parameters of the decision; null where the strategy needed none
    kept     bool    whether it was trained on
    horizon  int64   updates that the sensitivity looked ahead; null without a look-ahead
    source   string  name of the candidate's source; null where the sources have no names

Where several processes train, each writes parts of its own (`ledger_files`); the rows of a step are
those of rank 0, then those of rank 1, and so on.

Parts can be read while the run goes on, by `read_ledger`, pandas, pyarrow or duckdb: each appears
whole, and the newest is replaced by a longer one until it is full. Where a part ends depends on
its rows alone, so that a run that was killed and resumed leaves the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow.parquet import read_table, write_table

from selectflow.core.files import atomic_file
from selectflow.offline.score import SampleScores
from selectflow.run.ledger_files import (
    LedgerError,
    Part,
    Writer,
    last_whole_step,
    leftovers,
    merged,
    parts_of,
    read_part,
)
from selectflow.strategies import Selection

__all__ = ["Ledger", "LedgerError", "read_ledger"]

LEDGER_FOLDER = "selection"
"""Name of the ledger inside a run directory."""

_PART_ROWS = 1 << 16  # fill a part: some 600 KB, written in 20 ms
_METADATA = b"selectflow"
_SCHEMA = pa.schema(
    {
        "step": pa.int64(), "epoch": pa.int64(), "key": pa.string(), "score": pa.float64(),
        "loss": pa.float64(), "kept": pa.bool_(), "horizon": pa.int64(), "source": pa.string(),
    }
)  # fmt: skip


class Ledger:
    """Appends the decisions of a run, step by step.

    What was added is held in memory until `flush`. It needs the run directory for itself.

    Args:
        run_dir: the run directory; the ledger is made with its first rows.
        stream: what the pools depend on, as `PoolStream.identity`; kept with the rows.
        rank: of this process among those that write the ledger.
        size: how many these are.
    """

    def __init__(
        self, run_dir: Path, stream: Mapping[str, Any] | None = None, rank: int = 0, size: int = 1
    ) -> None:
        self._folder, self._writer = run_dir / LEDGER_FOLDER, Writer(rank, size)
        metadata = {_METADATA: json.dumps({"stream": dict(stream or {})}).encode()}
        self._schema = _SCHEMA.with_metadata(metadata)
        self._first = 0  # step that the open part begins with
        self._batches: list[Any] = []  # of the open part
        self._num_open = self._num_written = self._num_closed = 0  # rows: of it, on disk, before

    def add(self, step: int, *selections: Selection) -> None:
        """Append the decisions of one step.

        Args:
            step: optimizer step that the pools were for; larger than the last.
            selections: of its pools, mappings with a list "key", and maybe a list "epoch".

        Raises:
            OSError: a part that is full cannot be written; it names the file.
        """
        if not self._batches:
            self._first = step
        for selection in selections:
            self._batches.append(_rows(step, selection, self._schema))
            self._num_open += self._batches[-1].num_rows
        if self._num_open >= _PART_ROWS:
            self.flush()
            self._num_closed += self._num_open
            self._batches, self._num_open, self._num_written = [], 0, 0

    def flush(self) -> None:
        """Put all rows on the disk.

        Raises:
            OSError: they cannot be written; names the file, whose earlier rows are still there.
        """
        if self._num_written == self._num_open:
            return
        table = pa.Table.from_batches(self._batches, self._schema).combine_chunks()
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / self._writer.part(self._first), table)
        self._batches, self._num_written = table.to_batches(), table.num_rows

    def state_dict(self) -> dict[str, int]:
        """How many rows there are, all of them on the disk."""
        self.flush()
        return {"rows": self._num_closed + self._num_open}

    def load_state_dict(self, state: Mapping[str, int] | None, step: int) -> None:
        """Go on after `step`, where `state_dict` was taken; rows of later steps are removed.

        Args:
            state: what it gave; None: of a run in another number of processes.
            step: optimizer steps done.

        Raises:
            LedgerError: the rows up to that step are not all there.
        """
        for leftover in leftovers(self._folder):
            if self._is_ours(leftover.writer):
                leftover.path.unlink(missing_ok=True)
        parts = parts_of(self._folder)
        for writer in filter(self._is_ours, parts):
            while parts[writer] and parts[writer][-1].first > step:
                parts[writer].pop().path.unlink()
            if parts[writer] and writer != self._writer:
                path = parts[writer][-1].path
                rows = read_part(path, None)
                if len(kept := rows.filter(rows["step"].to_numpy() <= step)) < len(rows):
                    _write(path, kept)
        own = parts.get(self._writer, [])
        self._batches, self._num_open, self._num_written = [], 0, 0
        self._num_closed = sum(read_part(part.path, []).num_rows for part in own[:-1])
        if own:
            self._reopen(own[-1], step)
        found = self._num_closed + self._num_open
        if state is not None and found != state["rows"]:
            raise LedgerError(
                f"ledger must hold {state['rows']} rows up to step {step}, got {found} in "
                f"{self._folder}; put its files back, or replace the run with overwrite=true"
            )

    def _is_ours(self, writer: Writer) -> bool:
        """Whether this process cuts back what another wrote: its own, or one that is no more."""
        return writer == self._writer or (
            writer.size != self._writer.size and not self._writer.rank
        )

    def _reopen(self, part: Part, step: int) -> None:
        """Cut the last part back to `step`, and go on in it unless it is full."""
        table = read_part(part.path, None).cast(self._schema)
        whole = table.num_rows
        table = table.filter(table["step"].to_numpy() <= step)
        if table.num_rows >= _PART_ROWS:
            self._num_closed += table.num_rows
            return
        self._first, self._batches = part.first, table.to_batches()
        self._num_open = table.num_rows
        self._num_written = whole if whole == self._num_open else 0
        self.flush()


def read_ledger(run_dir: str | Path, columns: Sequence[str] | None = None) -> Any:
    """The ledger of a run, also of one that goes on.

    Args:
        columns: names of those wanted; None: all.

    Returns:
        A `pyarrow.Table` in the order of the steps; `table["score"].to_numpy()` is a column as an
        array, `table.to_pandas()` a data frame.

    Raises:
        LedgerError: there is none yet, a part cannot be read, or an unknown column.
    """
    return pa.concat_tables(read_parts(run_dir, columns))


def read_parts(
    run_dir: str | Path, columns: Sequence[str] | None = None, rank: int | None = None
) -> Iterator[Any]:
    """The ledger of a run in tables of whole steps, some 65,000 rows each; as `read_ledger`.

    Args:
        rank: of the process whose rows are wanted; None: all.
    """
    parts = parts_of(Path(run_dir, LEDGER_FOLDER))
    if unknown := [name for name in columns or () if name not in _SCHEMA.names]:
        raise LedgerError(f"columns must be of {_SCHEMA.names}, got {unknown}; see `read_ledger`")
    if not parts or not (upto := last_whole_step(parts)):
        raise LedgerError(
            f"run must have a ledger, got {str(run_dir)!r} without {LEDGER_FOLDER}/part-*.parquet; "
            "name a run directory, and wait for its first evaluation"
        )
    if rank is not None:
        parts = {writer: own for writer, own in parts.items() if writer.rank == rank}
    yield from merged(parts, columns, upto)


def num_writers(run_dir: str | Path) -> set[int]:
    """In how many processes a run was trained; several numbers where it went on in another."""
    return {writer.size for writer in parts_of(Path(run_dir, LEDGER_FOLDER))}


def read_stream(run_dir: str | Path, rank: int = 0) -> dict[str, Any]:
    """What the pools of a run depend on, as `PoolStream.identity`; empty where it is not known.

    Args:
        rank: of the process whose pools they are.

    Raises:
        LedgerError: as `read_ledger`.
    """
    metadata = next(read_parts(run_dir, ["step"], rank)).schema.metadata
    stream: dict[str, Any] = json.loads(metadata[_METADATA])["stream"]
    return stream


def last_step(run_dir: str | Path) -> int:
    """The last step whose decision can be read.

    Raises:
        LedgerError: as `read_ledger`.
    """
    step = 0
    for part in read_parts(run_dir, ["step"]):
        step = part["step"][-1].as_py()
    return step


# --- samples over a run ---------------------------------------------------------------------------


def read_scored(run_dir: Path) -> Iterator[Any]:
    """The candidates of a run in tables of whole steps, with standardised scores.

    Yields:
        Tables of step, key, score and kept, of what was scored: those of the ledger, of a run by
        offline selection those of its sweep as one pool at step 0; none where it has neither.

    Raises:
        LedgerError: a part of the ledger cannot be read.
    """
    offline = run_dir / "selected" / "scores.parquet"
    if offline.is_file():
        table = read_table(offline, columns=["key", "score", "kept"])
        parts = iter([table.append_column("step", pa.array(np.zeros(len(table), np.int64)))])
    elif any((run_dir / LEDGER_FOLDER).glob("*.parquet")):
        parts = read_parts(run_dir, ["step", "key", "score", "kept"])
    else:
        return
    for part in parts:
        table = part.filter(part["score"].is_valid())
        scores = standardised(table["score"].to_numpy(), table["step"].to_numpy())
        place = table.schema.get_field_index("score")
        yield table.set_column(place, "score", pa.array(scores))


def standardised(
    scores: npt.NDArray[np.float64], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Scores in standard deviations from the mean of their step; 0 where all of it are equal.

    The scale of scores changes by orders of magnitude while a model learns; this compares steps.

    Args:
        scores: of shape (N,).
        steps: of shape (N,), equal ones beside each other.
    """
    if not scores.size:
        return scores
    starts = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1))
    sizes = np.diff(starts, append=len(steps))
    deviations = scores - np.repeat(np.add.reduceat(scores, starts) / sizes, sizes)
    sd = np.sqrt(np.add.reduceat(deviations**2, starts) / sizes)
    sd[np.maximum.reduceat(scores, starts) == np.minimum.reduceat(scores, starts)] = np.inf
    return np.asarray(deviations / np.repeat(sd, sizes))


def sum_samples(table: Any) -> Any:
    """Sums of a table of `read_scored` by key, for `rank_samples`."""
    # without threads, so that each call adds in the same order
    grouped = table.group_by("key", use_threads=False)
    return grouped.aggregate([("score", "sum"), ("score", "count"), ("kept", "sum")])


def rank_samples(sums: Sequence[Any]) -> Any:
    """Samples by mean score, best first; equal ones by key.

    Args:
        sums: tables of `sum_samples`, at least one.

    Returns:
        A table of key, score (the mean), times (pools it was in) and kept (times it was).
    """
    grouped = pa.concat_tables(sums).group_by("key", use_threads=False)
    total = grouped.aggregate([(n, "sum") for n in ("score_sum", "score_count", "kept_sum")])
    times = total["score_count_sum"]
    means = total["score_sum_sum"].to_numpy() / times.to_numpy()
    columns = {"key": total["key"], "score": means, "times": times, "kept": total["kept_sum_sum"]}
    return pa.table(columns).sort_by([("score", "descending"), ("key", "ascending")])


def mean_scores(run_dir: str | Path) -> SampleScores:
    """The mean score of every candidate over all pools of a run that held it.

    Raises:
        LedgerError: there is none, or it cannot be read.
    """
    table = read_ledger(run_dir, ["key", "score"])
    table = table.filter(table["score"].is_valid())
    # numbered by first row: `Table.group_by` keeps no order, and adds up in none
    encoded = table["key"].dictionary_encode().combine_chunks()
    rows = encoded.indices.to_numpy()
    occurrences, total = np.bincount(rows), np.bincount(rows, table["score"].to_numpy())
    score = torch.from_numpy(total / occurrences)
    return SampleScores(encoded.dictionary.to_pylist(), score, torch.from_numpy(occurrences))


def kept_keys(run_dir: str | Path) -> list[str]:
    """Keys of the candidates that a run trained on, once each, in the order of the first time.

    Raises:
        LedgerError: the run has no ledger, or it cannot be read.
    """
    table = read_ledger(run_dir, ["key", "kept"])
    keys: list[str] = table.filter(table["kept"])["key"].unique().to_pylist()
    return keys


# --- files ----------------------------------------------------------------------------------------


def _rows(step: int, selection: Selection, schema: Any) -> Any:

    pool, horizon = selection.pool, selection.horizon
    scores, losses = selection.scores, selection.losses
    size = len(pool["key"])
    kept = torch.zeros(size, dtype=torch.bool)
    kept[selection.indices] = True
    columns = {
        "step": np.full(size, step),
        "epoch": pool.get("epoch") or pa.nulls(size, pa.int64()),
        "key": pool["key"],
        "score": pa.nulls(size, pa.float64()) if scores is None else scores.double().numpy(),
        "loss": pa.nulls(size, pa.float64()) if losses is None else losses.double().numpy(),
        "kept": kept.numpy(),
        "horizon": pa.nulls(size, pa.int64()) if horizon is None else np.full(size, horizon),
        "source": pool.get("source") or pa.nulls(size, pa.string()),
    }
    return pa.RecordBatch.from_pydict(columns, schema)


def _write(path: Path, table: Any) -> None:

    floats = ["score", "loss"]  # by byte planes: those that a float32 leaves empty take no space
    others = [name for name in table.schema.names if name not in floats]
    with atomic_file(path, durable=True) as file:
        write_table(
            table, file, compression="zstd", use_dictionary=others, use_byte_stream_split=floats
        )
