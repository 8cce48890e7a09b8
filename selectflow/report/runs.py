"""A run as its directory or W&B has it, and the values of its metrics over steps or seconds."""

from __future__ import annotations

import glob
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selectflow.run.directory import is_locked
from selectflow.run.metrics import (
    DIVERGED_AT,
    LEARNING_RATE,
    SAMPLES_SCORED,
    SAMPLES_SEEN,
    STEP,
    TOKENS_SEEN,
    from_json,
    kept_share,
)
from selectflow.run.wandb import download_run
from selectflow.run.yaml import read_yaml

KEPT = kept_share("")
KEPT_ALTERED = kept_share("altered")
_COUNTS = (SAMPLES_SEEN, SAMPLES_SCORED, TOKENS_SEEN)  # not logged before the first step: 0 there

# Not judged by, so their last values stay valid when a run diverges.
_NOT_JUDGED = ("perf/", "data/", "select/", STEP, LEARNING_RATE)

Status = Literal["finished", "diverged", "stopped", "failed", "running", "crashed"]
Points = list[tuple[float, float]]


class ReportError(ValueError):
    """Runs that cannot be reported on; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One run: its configuration and its metrics.

    Attributes:
        where: its directory, or its path at W&B.
        config: the resolved configuration, in plain values.
        metrics: one dict per train/step, in rising order; a value that is not finite is NaN or
            infinite, one that was not measured is not there.
        summary: written at the end of a run; empty for a run that crashed or is running.
        status: finished; diverged: ended by a loss, gradient or score that is not finite; stopped
            by a signal, to be resumed; failed with an error; running: a process holds its
            directory; crashed: it ended without writing a summary.
        offline: the cost of offline selection before the first step; empty without it.
        folder: its directory; None at W&B.
        replayed: configuration of the run whose choices it replays; empty where it is not known.
    """

    where: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    status: Status = "finished"
    offline: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    replayed: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> tuple[Any, Any]:
        """Its seed and that of its data: runs of two groups are paired by both."""
        return self.config.get("seed"), self.config.get("data", {}).get("seed")

    @property
    def last_step(self) -> int:
        """Optimizer steps at its last line of metrics."""
        return int(self.metrics[-1][STEP])


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """The directories that paths and globs name, in the order given, each once.

    Args:
        patterns: directories, or globs, which match directories that hold a metrics.jsonl.

    Raises:
        ReportError: a pattern matches no run.
    """
    found: dict[Path, Path] = {}  # a run named by two patterns is one run
    for pattern in patterns:
        paths = matching(pattern, "metrics.jsonl")
        if not paths:
            raise ReportError(f"no runs found: {pattern} matches no directory with metrics.jsonl")
        for path in paths:
            found.setdefault(path.resolve(), path)
    if not found:
        raise ReportError("no runs found: name at least one run directory")
    return list(found.values())


def matching(pattern: str, file: str) -> list[Path]:
    """The directories with a file that a glob matches; any other pattern is a path itself."""
    if not glob.has_magic(pattern) or Path(pattern).is_dir():
        return [Path(pattern)]
    return [
        path for match in sorted(glob.glob(pattern)) if ((path := Path(match)) / file).is_file()
    ]


def load_run(path: str | Path) -> Run:
    """The run in a directory with config.yaml, metrics.jsonl and, if it ended, summary.json.

    A last line of metrics still being written is left out, and lines that a resumed run did again
    replace the earlier ones.

    Raises:
        ReportError: no such directory, no metrics in it, or a line that is not JSON.
        ConfigError: config.yaml cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"no runs found: {path} is not a directory")
    if not (path / "metrics.jsonl").is_file():
        inside = sorted(path.glob("*/metrics.jsonl"))
        hint = f"; it holds runs, compare '{path}/*'" if inside else "; is it a run directory?"
        raise ReportError(f"{path} has no metrics.jsonl{hint}")
    metrics = _read_metrics(path / "metrics.jsonl")
    summary = from_json(_read_object(path / "summary.json"))
    config = read_yaml(path / "config.yaml")
    source = config.get("select", {}).get("replay")
    replayed = Path(str(source), "config.yaml")
    return Run(
        where=str(path),
        config=config,
        metrics=metrics,
        summary=summary,
        # A process holds the lock of its directory, even where an earlier stop left a summary.
        status="running" if is_locked(path) else _status(summary),
        offline=_read_object(path / "offline.json"),
        folder=path,
        replayed=read_yaml(replayed) if source and replayed.is_file() else {},
    )


def _status(summary: Mapping[str, Any], otherwise: Status = "crashed") -> Status:
    text = str(summary.get("status"))
    if DIVERGED_AT in summary and text == "failed":
        return "diverged"
    known: tuple[Status, ...] = ("finished", "stopped", "failed")
    return next((status for status in known if text.startswith(status)), otherwise)


_WANDB_PATH = re.compile(r"(wandb:)?([\w.-]+/[\w.-]+/[\w-]+)")


def wandb_path(text: str) -> str | None:
    """The path entity/project/run_id that an argument names, None for a directory or a glob.

    `wandb:entity/project/run_id` always is one; without the prefix, only where no directory of
    the first name is here.
    """
    match = _WANDB_PATH.fullmatch(text)
    if match is None or (not match[1] and Path(text).parts[0] in (".", "..")):
        return None
    return match[2] if match[1] or not Path(Path(text).parts[0]).exists() else None


def load_runs(patterns: Sequence[str]) -> list[Run]:
    """The runs that directories, globs and W&B paths name.

    Raises:
        ReportError: as `find_runs` and `load_run`.
        TrackingError: W&B cannot be asked, or knows no such run.
    """
    remote = {pattern: path for pattern in patterns if (path := wandb_path(pattern))}
    local = [pattern for pattern in patterns if pattern not in remote]
    runs = [load_run(path) for path in find_runs(local)] if local or not remote else []
    return runs + [fetch_run(path) for path in dict.fromkeys(remote.values())]


def fetch_run(path: str) -> Run:
    """The run at W&B with the path entity/project/run_id.

    Raises:
        ReportError: it has logged nothing yet.
        TrackingError: W&B cannot be asked, or knows no such run.
    """
    found = download_run(path)
    # W&B fills what a row lacks with None
    history = ({key: x for key, x in row.items() if x is not None} for row in found.history)
    rows = [from_json(row) for row in history if STEP in row]
    if not rows:
        raise ReportError(f"{path} has no train/step at W&B yet; wait for its first evaluation")
    # a run without a summary has only the state that W&B gives it
    state: Status = "running" if found.state == "running" else _status({"status": found.state})
    status = _status(found.summary, state)
    return Run(path, found.config, _merged(rows), from_json(found.summary), status)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the run is writing it now, or was killed while it did
        try:
            rows.append(from_json(json.loads(line)))
            int(rows[-1][STEP])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            message = f"{path}, line {number} must be a JSON object with train/step"
            raise ReportError(f"{message}, got {line.strip()[:80]!r}") from error
    if not rows:
        raise ReportError(f"{path} has no complete line yet; wait for the run's first evaluation")
    return _merged(rows)


def _merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per step, in rising order."""
    found: dict[int, dict[str, Any]] = {}
    last = -1
    for row in rows:
        step = int(row[STEP])
        if step < last:  # resumed from an earlier checkpoint: what came after it did not happen
            found = {done: found[done] for done in found if done < step}
        found[step] = found.get(step, {}) | row
        last = step
    return list(found.values())


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} must be a JSON object, got {value!r}")
    return value


# --- values of a metric --------------------------------------------------------------------


def series(run: Run, metric: str, over: str = STEP) -> Points:
    """A metric of a run over another one: (x, value) for each line that has both.

    A value that is not finite is NaN. A run that diverged has one more, NaN, after its last step,
    of what it is judged by. On the x axis, counts are 0 before the first step, and samples that
    offline selection scored before it count.

    Raises:
        ReportError: a value is not a number.
    """
    upfront = run.offline.get("samples_scored", 0) if over == SAMPLES_SCORED else 0
    found, last = [], -math.inf
    for line in run.metrics:
        x = _value(run, line, over)
        if x is None and over in _COUNTS and line.get(STEP) == 0:
            x = 0.0
        if x is None or math.isnan(x):
            continue
        last = x + upfront
        if (y := _value(run, line, metric)) is not None:
            found.append((last, y))
    if found and run.status == "diverged" and not metric.startswith(_NOT_JUDGED):
        after = run.summary[DIVERGED_AT] if over == STEP else math.nextafter(last, math.inf)
        found.append((float(after), math.nan))
    return found


def _value(run: Run, line: Mapping[str, Any], metric: str) -> float | None:
    """A value, NaN if it is not finite, None if it is not there."""
    if metric not in line:
        return None
    try:
        value = math.nan if line[metric] is None else float(line[metric])
    except (TypeError, ValueError) as error:
        raise ReportError(
            f"{metric} must be a number, got {line[metric]!r} at step {line.get(STEP)} of "
            f"{run.where}"
        ) from error
    return value if math.isfinite(value) else math.nan


def end(run: Run, metric: str) -> float | None:
    """The last value of a metric: NaN if it is not finite, None if it was never logged."""
    points = series(run, metric)
    return points[-1][1] if points else None


def broken_at(run: Run, metric: str) -> float | None:
    """The first step from which on a metric is not finite; None: it ends with a number."""
    found = None
    for step, value in reversed(series(run, metric)):
        if math.isfinite(value):
            break
        found = step
    return found


def total(run: Run, axis: str) -> float | None:
    """The end of a run on an axis; the cost of offline selection is included."""
    points = series(run, axis, axis)
    return points[-1][0] if points else None


def value_at(run: Run, metric: str, at: float | None, over: str = STEP) -> float | None:
    """The last value of a metric where `over` is at most `at`: as `end`; None if there is none."""
    known = [] if at is None else [y for x, y in series(run, metric, over) if x <= at]
    return known[-1] if known else None


def first_reach(run: Run, metric: str, at_most: float, over: str = STEP) -> float | None:
    """The step or second of the first evaluation with a metric at or below a value; None: never."""
    return next((x for x, y in series(run, metric, over) if y <= at_most), None)


def common_end(runs: Sequence[Run], axis: str) -> float | None:
    """The largest step or second that all runs have reached; None where one does not log it.

    Runs that diverged do not count: from there on they have no values. Nor do runs that stay at 0,
    as those that score nothing on the axis of samples scored.
    """
    going = [run for run in runs if run.status != "diverged"]
    ends = [total(run, axis) for run in going or runs]
    if any(found is None for found in ends):
        return None
    return min((found for found in ends if found), default=None)
