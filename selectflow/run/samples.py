"""The samples that a run scored highest and lowest, on stdout and at W&B.

A table of the recent ones is shown with each evaluation, one of the whole run at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from selectflow.core.batches import Batch
from selectflow.run.config import RunConfig
from selectflow.run.sample_text import extreme_rows
from selectflow.run.task import Task
from selectflow.run.tracker import Tracker
from selectflow.strategies import Selection

_ENDS = {"highest": 1, "lowest": -1}
_WIDTH = 100  # characters of a line


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

    def add(self, step: int, selection: Selection) -> None:
        """Look at one pool of the optimizer step `step`, from 1."""
        if self._is_live:
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
