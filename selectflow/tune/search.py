"""A sweep on this machine: cells in parallel processes, poor ones stopped early, resumable.

A cell is one setting of the parameters; its seeds are run one after the other. After its i-th
evaluation, counted over its seeds, its value is the mean of the metric at the end of the seeds
that are done and of the present one now. Cells are compared at equal i, so that what the metric
does early in a run is the same for all. Optuna keeps the record of the cells, proposes settings
(`random`, `bayes`) and decides who is stopped; this module runs them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectflow.run.directory import lock
from selectflow.tune.record import NOTE, TuneError, has_more, next_setting, open_study
from selectflow.tune.runs import RunProcess, run_server
from selectflow.tune.space import Setting
from selectflow.tune.sweep import Sweep

if TYPE_CHECKING:
    from optuna import Study, Trial

_POLL_S = 0.2
_NUM_FAILURES = 3  # that many first cells, all failed, end the sweep: the rest would fail too


def tune(sweep: Sweep, out: Path, jobs: int, tell: Callable[[str], None]) -> Study:
    """Run what is left of a sweep.

    Args:
        sweep: the sweep.
        out: its directory: the record `study.journal`, and `runs/`, a directory for each run.
        jobs: processes at once, >= 1, of one thread each.
        tell: takes a line for each cell that ends.

    Returns:
        The record. Started again after it was killed, a sweep repeats no cell that had ended, and
        goes on with the runs of the others from their newest checkpoints.

    Raises:
        TuneError: `out` holds another sweep, the first cells all failed, or optuna is missing.
        RunError: another process is at work in `out`.
    """
    with lock(out), run_server(Path(sweep.keys.program)) as context:
        study = open_study(sweep, out)
        active: list[_Cell] = []
        try:
            while True:
                while len(active) < jobs and has_more(sweep, study, len(active)):
                    active.append(_Cell(sweep, study, out, context))
                if not active:
                    return study
                connection.wait([cell.run.sentinel for cell in active], _POLL_S)
                for cell in [cell for cell in active if cell.advance()]:
                    active.remove(cell)
                    tell(cell.summary())
                    _check_failures(study)
        finally:
            for cell in active:
                cell.run.stop()
            for cell in active:
                cell.run.wait()


class _Cell:
    """A cell that is being run: the trial that stands for it, and its present run."""

    def __init__(self, sweep: Sweep, study: Study, out: Path, context: ForkServerContext) -> None:
        self._sweep, self._study, self._out, self._context = sweep, study, out, context
        self._trial: Trial = study.ask()
        self.setting: Setting = next_setting(sweep, self._trial)
        self._seeds = sweep.seeds or (None,)
        self._finals: list[float] = []  # the metric at the end of each seed that is done
        self._value: float | None = None  # of the present one, now
        self._num_evaluations = 0
        self._is_stopped = False
        self._note: str | None = None
        self.run = self._start()

    def advance(self) -> bool:
        """Read what the run has written, and go on to the next seed; whether the cell has ended."""
        is_running = self.run.is_running  # before reading, so that no last line is missed
        for row in self.run.new_rows():
            self._read(row)
        return not is_running and self._has_ended()

    def summary(self) -> str:
        """The cell and how it ended, in one line."""
        name = " ".join(f"{key}={value}" for key, value in self.setting.items())
        metric = self._sweep.keys.metric.name
        if self._note:
            return f"{name}: failed, {self._note}"
        if self._is_stopped:
            return f"{name}: stopped after {self._num_evaluations} evaluations"
        return f"{name}: {metric} {statistics.fmean(self._finals):.4g}"

    def _start(self) -> RunProcess:
        overrides = self._sweep.local_overrides(self._out, self._seeds[len(self._finals)])
        arguments = self._sweep.arguments(self.setting, overrides)
        config = self._sweep.load(self.setting, overrides)
        self._value, self._steps = None, config.steps
        return RunProcess(self._context, Path(self._sweep.keys.program), arguments, config.run_dir)

    def _read(self, row: dict[str, Any]) -> None:
        metric = self._sweep.keys.metric.name
        if metric not in row or self._is_stopped or self._note:
            return
        self._value = row[metric]
        if self._value is None:
            self._note = f"{metric} is not finite at step {row['train/step']}"
            self.run.stop()
            return
        self._num_evaluations += 1
        self._trial.report(statistics.fmean([*self._finals, self._value]), self._num_evaluations)
        is_last_seed = len(self._finals) + 1 == len(self._seeds)
        if is_last_seed and row["train/step"] >= self._steps:
            return  # there is nothing left to stop
        if self._trial.should_prune():
            self._is_stopped = True
            self.run.stop()

    def _has_ended(self) -> bool:
        from optuna.trial import TrialState  # noqa: PLC0415

        if self._is_stopped:
            self._study.tell(self._trial, state=TrialState.PRUNED)
            return True
        failure = self.run.failure()
        if self._note is None and (failure or self._value is None):
            metric = self._sweep.keys.metric.name
            self._note = failure or f"it logged no {metric}"
        if self._note:
            self._trial.set_user_attr(NOTE, self._note)
            self._study.tell(self._trial, state=TrialState.FAIL)
            return True
        assert self._value is not None
        self._finals.append(self._value)
        if len(self._finals) < len(self._seeds):
            self.run = self._start()
            return False
        self._study.tell(self._trial, statistics.fmean(self._finals))
        return True


def _check_failures(study: Study) -> None:
    ended = [trial for trial in study.trials if trial.state.is_finished()]
    notes = [trial.user_attrs.get(NOTE) for trial in ended]
    if len(notes) >= _NUM_FAILURES and all(notes):
        raise TuneError(f"a sweep's cells must run, got {len(notes)} that failed; {notes[-1]}")
