"""The samples that a run scored highest and lowest, as pictures or text, on stdout and in sinks.

A table of the recent ones is shown with each evaluation, one of the whole run at its end.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

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
from selectflow.run.ledger import (
    LEDGER_FOLDER,
    rank_samples,
    read_scored,
    standardised,
    sum_samples,
)
from selectflow.run.ledger_files import newest_step
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
        times: pools it was in; 0: its score is that of one pool.
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


class Newest(NamedTuple):
    """A pool of a run, and which of its samples were kept.

    Attributes:
        step: the optimizer step that it was for.
        kept: samples that were kept, highest score first.
        rejected: samples that were not, lowest first.
    """

    step: int
    kept: list[Shown]
    rejected: list[Shown]

    @property
    def is_even(self) -> bool:
        """Whether all scores of the pool are equal, as where the learning rate is 0."""
        ends = [part[0].sample.score for part in (self.kept, self.rejected) if part]
        return len(ends) == 2 and ends[0] == ends[1]


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
    highest, lowest = _shown(ends, root, metadata)
    return highest, lowest


def newest(run_dir: Path, root: Sources, num: int) -> Newest | None:
    """What a run chose at its last step on the disk; None if it has chosen nothing yet.

    Args:
        root: the dataset, as `PoolStream` takes it.
        num: samples of each kind, at most.

    Raises:
        DataError: the dataset cannot be read.
        LedgerError: the ledger cannot be read.
    """
    table = newest_step(run_dir / LEDGER_FOLDER)
    if table is None:
        return None
    steps, kept = table["step"].to_numpy(), table["kept"].to_numpy()
    scores, keys = standardised(table["score"].to_numpy(), steps), table["key"].to_pylist()
    order = np.argsort(-scores, kind="stable")
    chosen = (order[kept[order]][:num], order[~kept[order]][::-1][:num])
    ends = [[Sample(keys[i], float(scores[i]), 0, 0) for i in part] for part in chosen]
    return Newest(int(steps[0]), *_shown(ends, root))


def _shown(
    ends: Sequence[Sequence[Sample]],
    root: Sources,
    metadata: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[list[Shown]]:
    """Samples as a reader sees them, without those that the dataset does not hold.

    `metadata` None: what is recorded of them is read with them.
    """
    found = read_samples(root, "train", [sample.key for part in ends for sample in part])
    tokenizers = _tokenizers(root)

    def shown(sample: Sample) -> Shown:
        key = sample.key
        source = key.partition("/")[0] if isinstance(root, Mapping) else ""
        made = found[key].get("json", {}) if metadata is None else metadata.get(key, {})
        return show(sample, found[key], made, tokenizers.get(source))

    return [[shown(sample) for sample in part if sample.key in found] for part in ends]


def extreme_rows(run_dir: Path, source: Sources, num: int = 16) -> list[dict[str, Any]]:
    """The samples of a run with the highest and the lowest mean score, as rows of a table.

    Raises:
        DataError: the dataset cannot be read.
        LedgerError: the ledger cannot be read.
    """
    metadata = read_metadata(source, "train", max_errors=math.inf)
    sums = [sum_samples(table) for table in read_scored(run_dir)]
    if not sums:
        return []
    ends = zip(_ENDS, extremes(rank_samples(sums), source, metadata, num), strict=True)
    return [
        {
            "end": end, "key": shown.sample.key, "score": shown.sample.score,
            "altered": shown.altered, "facts": ", ".join(shown.facts), "text": shown.text,
            "png": shown.png,
        }
        for end, samples in ends
        for shown in samples
    ]  # fmt: skip


def _tokenizers(root: Sources) -> dict[str, Tokenizer]:
    """The tokenizer of each source that has one, by name; "" where there is one source."""
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
    facts = [f"score {sample.score:+.2f} sd"]
    if sample.times:
        facts.append(f"kept {sample.kept} of {sample.times}")
    if "cls" in fields:
        facts.insert(0, f"label {fields['cls']}")
    altered = bool(made["altered"]) if "altered" in made else None
    if altered and "true_label" in made:
        facts[0] += f", really {made['true_label']}"
    known = dict.fromkeys(str(made[name]) for name in ("domain", "origin") if name in made)
    facts[:0] = known
    image = next((fields[f] for f in ("png", "jpg", "jpeg", "npy") if f in fields), None)
    if image is not None and np.ndim(image) == 3 and len(image) in (1, 3):
        picture(dict(fields), _SIDE).save(file := io.BytesIO(), "PNG")
        return Shown(sample, facts, file.getvalue(), "", altered)
    return Shown(sample, facts, None, _text(fields, tokenizer)[:_LENGTH], altered)


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
        """Look at the scores of the pool of a step, from 1, if there are some and they differ."""
        if selection.scores is None:
            return
        scores = selection.scores.double()
        spread = scores.std(correction=0)
        if not spread > 0:
            return
        scores = (scores - scores.mean()) / spread
        for end, sign in _ENDS.items():
            top = torch.sort(sign * scores, descending=True, stable=True).indices[: self._num]
            new = [self._row(end, step, float(scores[i]), selection.pool, i) for i in top.tolist()]
            rows = sorted(self._rows[end] + new, key=lambda row: -sign * row["score"])
            first: dict[str, dict[str, Any]] = {}
            for row in rows:
                first.setdefault(row["key"], row)
            self._rows[end] = list(first.values())[: self._num]

    def _row(self, end: str, step: int, score: float, pool: Batch, index: int) -> dict[str, Any]:
        key = pool["key"][index]
        origin = ", ".join(kind for kind, keys in self._kinds.items() if key in keys)
        text = one_line(self._show(pool, index)) if self._show else ""
        return {
            "end": end, "score": score, "origin": origin, "step": step, "key": key, "text": text
        }  # fmt: skip

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
        config: the run; `track.samples` is the number at each end, 0: in sinks alone, at the end.
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
        """Show the extremes by mean score over the run; in sinks also where `samples` is 0."""
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
