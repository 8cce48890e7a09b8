"""The samples that a run scored highest and lowest, as pictures or text, on stdout and at W&B.

A table of the recent ones is shown with each evaluation, one of the whole run at its end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow.parquet import read_table

from selectflow.core.batches import Batch
from selectflow.data import (
    DataError,
    Sources,
    Tokenizer,
    open_tokenizer,
    picture,
    read_metadata,
    read_samples,
)
from selectflow.run.config import RunConfig
from selectflow.run.ledger import LEDGER_FOLDER, read_parts
from selectflow.run.log import Tracker
from selectflow.run.task import Task
from selectflow.strategies import Selection

_SIDE = 64  # pixels
_LENGTH = 280  # characters of a text
_WIDTH = 100  # characters of a line
_ENDS = {"highest": 1, "lowest": -1}


class Sample(NamedTuple):
    """One sample over a run.

    Attributes:
        key: its id.
        score: mean of its scores, each in standard deviations from the mean of its pool.
        times: pools it was in.
        kept: times it was kept.
    """

    key: str
    score: float
    times: int
    kept: int


@dataclass(frozen=True)
class Shown:
    """A sample as a reader sees it.

    Attributes:
        sample: its id and scores.
        facts: what is known of it: label, score, how often it was kept.
        png: its picture; None for text.
        text: its text; "" for a picture.
        altered: whether its label was altered; None: not known.
    """

    sample: Sample
    facts: list[str]
    png: bytes | None
    text: str
    altered: bool | None


def read_scored(run_dir: Path) -> Iterator[Any]:
    """The candidates of a run in tables of whole steps, with standardised scores.

    Args:
        run_dir: its directory.

    Yields:
        Tables of step, key, score and kept: those of the ledger, of a run by offline selection
        those of its sweep as one pool at step 0; none where the run has neither.

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
    for table in parts:
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
        A table with a row for each `Sample`.
    """
    grouped = pa.concat_tables(sums).group_by("key", use_threads=False)
    total = grouped.aggregate([(n, "sum") for n in ("score_sum", "score_count", "kept_sum")])
    times = total["score_count_sum"]
    means = total["score_sum_sum"].to_numpy() / times.to_numpy()
    columns = {"key": total["key"], "score": means, "times": times, "kept": total["kept_sum_sum"]}
    return pa.table(columns).sort_by([("score", "descending"), ("key", "ascending")])


def extremes(
    ranked: Any, root: Sources, metadata: Mapping[str, Mapping[str, Any]], num: int
) -> tuple[list[Shown], list[Shown]]:
    """The samples with the highest and with the lowest mean score.

    Args:
        ranked: a table of `rank_samples`.
        root: the dataset, as `PoolStream` takes it.
        metadata: sample key -> what the writer of the data recorded.
        num: samples at each end, fewer where there are not twice as many.

    Returns:
        Highest first, and lowest first; without those that the dataset does not hold.

    Raises:
        DataError: the dataset cannot be read.
    """
    num = min(num, len(ranked) // 2)
    best, worst = ranked.slice(0, num), ranked.slice(len(ranked) - num)
    ends = [[Sample(**row) for row in part.to_pylist()] for part in (best, worst)]
    ends[1].reverse()
    found = read_samples(root, "train", [sample.key for part in ends for sample in part])
    tokenizers = _tokenizers(root)

    def source_of(key: str) -> str:
        return key.partition("/")[0] if isinstance(root, Mapping) else ""

    highest, lowest = (
        [
            show(s, found[s.key], metadata.get(s.key, {}), tokenizers.get(source_of(s.key)))
            for s in part
            if s.key in found
        ]
        for part in ends
    )
    return highest, lowest


def extreme_rows(run_dir: Path, source: Sources, num: int = 16) -> list[dict[str, Any]]:
    """The samples of a run with the highest and the lowest mean score, as rows of a table.

    Args:
        run_dir: its directory.
        source: the dataset that it read, as `PoolStream` takes it.
        num: samples at each end.

    Raises:
        DataError: the dataset cannot be read.
        LedgerError: the ledger cannot be read.
    """
    metadata = read_metadata(source, "train", max_errors=math.inf)
    sums = [sum_samples(table) for table in read_scored(run_dir)]
    if not sums:
        return []
    ends = extremes(rank_samples(sums), source, metadata, num)
    return [
        {
            "end": end, "key": shown.sample.key, "score": shown.sample.score,
            "altered": shown.altered, "facts": ", ".join(shown.facts), "text": shown.text,
            "png": shown.png,
        }
        for end, samples in zip(("highest", "lowest"), ends, strict=True)
        for shown in samples
    ]  # fmt: skip


def _tokenizers(root: Sources) -> dict[str, Tokenizer]:
    """The tokenizer of each source by name; "" where there is one source.

    Images, shards without a manifest and a lost tokenizer have none: ids of tokens are shown.
    """
    found: dict[str, Tokenizer] = {}
    for name, source in (root if isinstance(root, Mapping) else {"": root}).items():
        if isinstance(source, str | Path):
            with suppress(DataError):
                found[name] = open_tokenizer(source)
    return found


def show(
    sample: Sample,
    fields: Mapping[str, Any],
    made: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Shown:
    """A sample as a picture or text.

    Args:
        sample: its scores.
        fields: its content, as `read_split` yields it.
        made: what the writer of the data recorded about it.
        tokenizer: of its tokens; None: bytes are text, others stay ids.
    """
    facts = [f"score {sample.score:+.2f} sd", f"kept {sample.kept} of {sample.times}"]
    if "cls" in fields:
        facts.insert(0, f"label {fields['cls']}")
    altered = bool(made["altered"]) if "altered" in made else None
    if altered and "true_label" in made:
        facts[0] += f", really {made['true_label']}"
    known = dict.fromkeys(str(made[name]) for name in ("domain", "origin") if name in made)
    facts[:0] = known
    image = next((fields[f] for f in ("png", "jpg", "jpeg", "npy") if f in fields), None)
    if image is not None and np.ndim(image) == 3:
        return Shown(sample, facts, _png(dict(fields)), "", altered)
    return Shown(sample, facts, None, _text(fields, tokenizer)[:_LENGTH], altered)


def _png(fields: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    picture(fields, _SIDE).save(file, "PNG")
    return file.getvalue()


def _text(fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> str:
    if "txt" in fields:
        return str(fields["txt"])
    tokens = np.asarray(fields.get("npy", []))
    if tokenizer is not None and tokens.ndim == 1:
        return tokenizer.decode(tokens.tolist())
    if tokens.dtype == np.uint8:  # bytes are text
        return tokens.tobytes().decode("utf-8", "replace")
    return "tokens " + " ".join(map(str, tokens.ravel()[:_LENGTH].tolist()))


# --- the recent ones, while the run goes on -------------------------------------------------------


class SampleTable:
    """Collects the extremes of the scores of a stretch of steps.

    A score is in standard deviations of its pool, from the pool's mean, so that those of different
    steps compare. An example that comes again is listed once, with its more extreme score.

    Args:
        num: examples at each end, >= 1.
        kinds: ids of samples by what they are.
        show: `show(batch, index)` -> the example as text; None: there is none.
    """

    def __init__(
        self,
        num: int,
        kinds: Mapping[str, frozenset[str]],
        show: Callable[[Batch, int], str] | None = None,
    ) -> None:
        self._num, self._kinds, self._show = num, kinds, show
        self._rows: dict[str, list[dict[str, Any]]] = {end: [] for end in _ENDS}

    def add(self, step: int, selection: Selection) -> None:
        """Look at the scores of one pool; skip a pool whose scores are all equal.

        Args:
            step: the optimizer step that it was for, from 1.
            selection: of a pool that is a mapping with a list "key".
        """
        scores = selection.scores.double()
        spread = scores.std(correction=0)
        if not spread > 0:
            return
        scores = (scores - scores.mean()) / spread
        for end, sign in _ENDS.items():
            top = torch.sort(sign * scores, descending=True, stable=True)
            best = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            for score, index in list(best)[: self._num]:
                self._offer(end, step, sign * score, selection.pool, index)

    def _offer(self, end: str, step: int, score: float, pool: Batch, index: int) -> None:
        sign, rows, key = _ENDS[end], self._rows[end], pool["key"][index]
        known = next((row for row in rows if row["key"] == key), None)
        beaten = known or (rows[-1] if len(rows) == self._num else None)
        if beaten is not None:
            if sign * score <= sign * beaten["score"]:
                return
            rows.remove(beaten)
        origin = ", ".join(kind for kind, keys in self._kinds.items() if key in keys)
        text = self._show(pool, index) if self._show else ""
        row = {"end": end, "score": score, "origin": origin, "step": step, "key": key}
        rows.append(row | {"text": one_line(text)})
        rows.sort(key=lambda row: -sign * row["score"])

    def rows(self) -> list[dict[str, Any]]:
        """The highest, highest first, then the lowest, lowest first; rows have equal keys."""
        return [dict(row) for rows in self._rows.values() for row in rows]

    def clear(self) -> None:
        """Begin a new stretch."""
        self._rows = {end: [] for end in _ENDS}

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {end: [dict(row) for row in rows] for end, rows in self._rows.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`; of more rows than are wanted, the outermost."""
        self._rows = {end: list(state.get(end, ()))[: self._num] for end in _ENDS}


def one_line(text: str) -> str:
    """The text with line ends and control characters escaped, as in Python source."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def lines(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Rows as text: score, origin or facts, and the sample, one line each and clipped.

    Args:
        rows: each with "end", "score", "key", "text" and "origin".
        title: of the table.
    """
    origins = max((len(row["origin"]) for row in rows), default=0)
    found = [title]
    for end in _ENDS:
        for row in rows:
            if row["end"] == end:
                head = f"  {end:<7} {row['score']:+6.2f} sd  {row['origin']:<{origins}}  "
                line = head + (row["text"] or row["key"])
                found.append(line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…")
    return "\n".join(found)


class SampleDisplay:
    """Shows the samples of a run; none where its scores do not compare samples.

    Args:
        config: the run; `track.samples` is the number at each end, 0: W&B alone, at the end.
        task: whose samples they are.
        tracker: of the run.
    """

    def __init__(self, config: RunConfig, task: Task, tracker: Tracker) -> None:
        self._num, self._run_dir = config.track.samples, config.run_dir
        self._source, self._tracker = task.source, tracker
        # scores of a uniform choice are random, those of a replay are another run's
        self._is_scored = config.select.strategy != "uniform" and not config.select.replay
        # offline selection is over when the run starts
        self._is_live = self._num > 0 and self._is_scored and not config.select.is_offline
        self._table = SampleTable(self._num, task.kinds, task.show)

    def add(self, step: int, selections: Sequence[Selection]) -> None:
        """Look at the pools of the optimizer step `step`, from 1."""
        for selection in selections if self._is_live else ():
            self._table.add(step, selection)

    def show_recent(self, step: int) -> None:
        """Show the samples of the highest and of the lowest scores since the last call."""
        if rows := self._table.rows():
            print(lines(rows, f"scores of the pools up to step {step}"), flush=True)
            self._tracker.show(lambda: rows, "recent")
        self._table.clear()

    def show_all(self) -> None:
        """Show the extremes by mean score over the whole run; at W&B also where `samples` is 0."""
        source, run_dir = self._source, self._run_dir
        if source is None or not self._is_scored:
            return
        if self._num:
            rows = [
                row | {"origin": row["facts"], "text": one_line(row["text"])}
                for row in extreme_rows(run_dir, source, self._num)
            ]
            print(lines(rows, "mean scores of the whole run"), flush=True)
        self._tracker.show(lambda: extreme_rows(run_dir, source))

    def state_dict(self) -> dict[str, Any]:
        """The samples since the last `show_recent`."""
        return self._table.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`."""
        self._table.load_state_dict(state)
