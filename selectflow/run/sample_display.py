"""The samples that a run scored highest and lowest, on stdout and at W&B: recent ones, and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectflow.run.config import RunConfig
from selectflow.run.sample_table import SampleTable, lines, one_line
from selectflow.run.task import Task
from selectflow.run.tracking import Tracker
from selectflow.strategies import Selection


class SampleDisplay:
    """Shows the samples of a run; nothing where its scores compare none.

    Args:
        config: the run; `track.samples` is the number at each end, 0: W&B alone, at the end.
        task: whose samples they are.
        tracker: of the run.
    """

    def __init__(self, config: RunConfig, task: Task, tracker: Tracker) -> None:
        self._num, self._run_dir = config.track.samples, config.run_dir
        self._source, self._tracker = task.source, tracker
        # else they are random, or those of another run
        self._is_scored = config.select.strategy != "uniform" and not config.select.replay
        # offline selection was before the run
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
        """Show the same by mean score over the whole run, at W&B always."""
        from selectflow.run.sample_text import extreme_rows  # noqa: PLC0415

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
