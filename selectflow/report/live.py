"""The page of a comparison while runs go on, made again when their files change."""

from __future__ import annotations

import glob
import hashlib
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import ValidationError

from selectflow.data import DataError
from selectflow.fields import ConfigError
from selectflow.report import figures
from selectflow.report.compare import summarize
from selectflow.report.figures import Panel
from selectflow.report.groups import strategy
from selectflow.report.page import Examined, examine_groups, fill, values_of
from selectflow.report.runs import ReportError, Run, end, load_run, matching, wandb_path
from selectflow.report.tables import quantity, short
from selectflow.run.directory import is_locked
from selectflow.run.ledger import LEDGER_FOLDER, LedgerError
from selectflow.run.metrics import (
    DIVERGED_AT,
    HORIZON,
    KEPT_FRACTION,
    LEARNING_RATE,
    STEP_S,
    TARGET_LOSS,
    TEST_ACCURACY,
    TEST_LOSS,
    TRAIN_LOSS,
    WALL_S,
)
from selectflow.run.samples import Newest, newest
from selectflow.run.sections import DataConfig

_FILES = ("config.yaml", "metrics.jsonl", "summary.json")
_NUM_SAMPLES = 8  # of each kind
_STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped by a signal, to be resumed",
    "failed": "ended by an error",
    "crashed": "at an end without a summary: killed, or at work on another machine",
}
_EXPECTED = (ReportError, ConfigError, DataError, LedgerError, OSError)


@dataclass(frozen=True)
class Watched:
    """A run, as the head of the page describes it.

    Attributes:
        name: its directory.
        state: what it is doing, or how it ended.
        run: its metrics; None: it has none yet, or they cannot be read.
        facts: (name, value) pairs of its latest evaluation.
        newest: the pool that it chose from last; None: it is not known.
        note: why no samples are shown; "" where they are.
    """

    name: str
    state: str
    run: Run | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    newest: Newest | None = None
    note: str = ""

    @property
    def is_random(self) -> bool:
        """Whether its scores are random numbers."""
        return self.run is not None and strategy(self.run) == "uniform"

    @property
    def step(self) -> int:
        """Optimizer steps at its last evaluation."""
        return self.run.last_step if self.run else 0

    @property
    def steps(self) -> int | None:
        """Optimizer steps that it is to take; None: not known."""
        found = self.run.config.get("steps") if self.run else None
        return found if isinstance(found, int) else None


class LivePage:
    """The page of runs that go on; may be asked by several threads.

    Args:
        patterns: run directories, folders of them, and globs; what they match may come later.

    Raises:
        ReportError: a run at W&B is named.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            if pattern.startswith("wandb:") and wandb_path(pattern):
                raise ReportError(
                    f"runs to watch must be directories, got {pattern}; W&B shows its own runs live"
                )
        self._patterns, self._lock = list(patterns), Lock()
        self._made: tuple[str, str] = ("", "")  # version and page
        self._read: dict[Path, tuple[Any, Watched]] = {}  # stamp of the files, and what they say
        self._examined: dict[Any, list[Examined]] = {}
        self._svgs: dict[tuple[str, bytes], str] = {}

    def version(self) -> str:
        """A text that changes when a file of a run changes, or a run begins or ends."""
        return _digest(self._stamps())

    def page(self) -> str:
        """The page. What has not changed since the last call is not read or drawn again."""
        with self._lock:  # matplotlib's settings are those of the process
            stamps = self._stamps()  # before the files are read: what changes meanwhile is newer
            version = _digest(stamps)
            if version != self._made[0]:
                self._made = version, self._render(version, stamps)
            return self._made[1]

    def paths(self) -> list[Path]:
        """The runs that there are now, each once, and paths at which there is none yet."""
        found: dict[Path, Path] = {}
        for pattern in self._patterns:
            for path in _runs_of(pattern):
                found.setdefault(path.resolve(), path)
        return list(found.values())

    def _stamps(self) -> dict[Path, Any]:
        return {path: _stamp(path) for path in self.paths()}

    def _render(self, version: str, stamps: dict[Path, Any]) -> str:
        self._read = {
            path: before
            if (before := self._read.get(path)) and before[0] == stamp
            else (stamp, _watch(path))
            for path, stamp in stamps.items()
        }
        watched = [found for _, found in self._read.values()]
        runs = [found.run for found in watched if found.run]
        values: dict[str, Any] = {"title": "Runs", "problem": "", "compared": False}
        used: dict[tuple[str, bytes], str] = {}
        if runs:
            try:
                values |= self._compared(runs, used) | {"compared": True}
            except _EXPECTED as error:
                values["problem"] = str(error)
        self._svgs = used
        values |= {"watched": watched, "version": version, "patterns": ", ".join(self._patterns)}
        return fill("live.html", values)

    def _compared(self, runs: list[Run], used: dict[tuple[str, bytes], str]) -> dict[str, Any]:
        def to_svg(panel: Panel, name: str) -> str:
            key = name, pickle.dumps(panel)
            used[key] = self._svgs.get(key) or figures.to_svg(panel, name)
            return used[key]

        comparison = summarize(runs, partial=True)
        # the ledger of a run that goes on would be read as a whole each time
        ended = {
            label: over
            for label, members in comparison.runs.items()
            if (over := [run for run in members if run.status != "running"])
        }
        key = [
            (label, run.where, self._read[Path(run.where)][0]) for label, (run, *_) in ended.items()
        ]
        known = self._examined.get(str(key))
        self._examined = {str(key): examine_groups(ended) if known is None else known}
        return values_of(comparison, self._examined[str(key)], to_svg)


def _runs_of(pattern: str) -> list[Path]:
    """The runs that a pattern names now; a folder that holds runs stands for them."""
    path = Path(pattern)
    inside = sorted(path.glob("*/config.yaml"))
    if inside and not (path / "config.yaml").is_file():
        return [found.parent for found in inside]
    return matching(pattern, "config.yaml") if glob.has_magic(pattern) else [path]


def _stamp(path: Path) -> tuple[Any, ...]:
    """A value that changes when a file of the run changes, or the run begins or ends."""
    ledger = sorted((path / LEDGER_FOLDER).glob("*.parquet"), key=lambda part: part.name)
    files = [*(path / name for name in _FILES), *ledger[-64:]]  # the newest, of each process
    return (path.is_dir() and is_locked(path), *filter(None, map(_file_stamp, files)))


def _file_stamp(path: Path) -> tuple[str, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return path.name, found.st_mtime_ns, found.st_size


def _digest(stamps: dict[Path, Any]) -> str:
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]


def _watch(path: Path) -> Watched:
    """What is known of a run now, or the error in its files."""
    name = str(path)
    if not path.is_dir():
        return Watched(name, "waited for: no such directory yet")
    if not _has_line(path / "metrics.jsonl"):
        begun = (path / "config.yaml").is_file()
        return Watched(name, f"{'begun' if begun else 'not begun'}: no metrics yet")
    try:
        run = load_run(path)
        facts = list(_facts(run))
    except _EXPECTED as error:
        return Watched(name, f"not readable: {error}")
    state = _STATES.get(run.status, "")
    if run.status == "diverged":
        state = f"diverged at step {run.summary[DIVERGED_AT]}"
    found, note = _newest_of(run)
    return Watched(name, state, run, facts, found, note)


def _has_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline().endswith(b"\n")
    except OSError:
        return False


def _newest_of(run: Run) -> tuple[Newest | None, str]:
    """The samples that a run chose from last, or why they are not shown."""
    assert run.folder is not None
    try:
        root = DataConfig.model_validate(run.config.get("data", {})).directory
        found = newest(run.folder, root, _NUM_SAMPLES)
    except ValidationError:  # of a program of its own
        return None, "samples are not shown: the configuration names no data that can be read here"
    except _EXPECTED as error:
        return None, f"samples are not shown: {error}"
    if found and not (found.kept or found.rejected):
        return None, f"samples are not shown: {root} holds other ones"
    return found, ""


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Losses, accuracy, kept share, horizon, learning rate, pace and what is left."""
    for metric in (TRAIN_LOSS, TARGET_LOSS, TEST_LOSS, TEST_ACCURACY, KEPT_FRACTION):
        shown = quantity(metric)
        if (value := end(run, metric)) is not None:
            title = "kept of each pool" if metric == KEPT_FRACTION else shown.title
            yield title, f"{100 * value:.1f} %" if shown.scale == 100 else short(value)
    if (horizon := end(run, HORIZON)) is not None:
        yield "horizon", short(horizon)
    if lr := end(run, LEARNING_RATE):
        yield "learning rate", f"{lr:.2g}"
    step_s = end(run, STEP_S)
    if step_s and math.isfinite(step_s):
        yield "pace", f"{short(1 / step_s)} steps/s"
        if run.status == "running":
            yield "training left", _duration(_seconds_left(run, step_s))


def _seconds_left(run: Run, step_s: float) -> float:
    """To the last step at the present pace, or to `max_wall_s` where that comes first."""
    left = (int(run.config.get("steps", 0)) - run.last_step) * step_s
    limit, wall_s = run.config.get("max_wall_s"), end(run, WALL_S)
    return max(0.0, left if limit is None or wall_s is None else min(left, limit - wall_s))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
