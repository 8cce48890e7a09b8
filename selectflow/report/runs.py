"""A run as it lies in its directory, or at W&B."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selectflow.run.yaml import read_yaml

Status = Literal["finished", "stopped", "failed", "running", "crashed"]


class ReportError(ValueError):
    """Runs that cannot be reported on; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One run: what it was asked to do and what it measured.

    Attributes:
        where: its directory, or its path at W&B.
        config: the resolved configuration, in plain values.
        metrics: one dict per train/step, in rising order.
        summary: of a run that came to an end of its own, else empty.
        status: finished; stopped by a signal, to be resumed; failed with an error; running: a
            process holds it; crashed: it ended without a word.
        offline: what offline selection took before the first step; empty without it.
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
        """What pairs it with runs of other groups: its seed and that of its data."""
        return self.config.get("seed"), self.config.get("data", {}).get("seed")

    @property
    def last_step(self) -> int:
        """Optimizer steps at its last line of metrics."""
        return int(self.metrics[-1]["train/step"])


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """The run directories that paths and globs stand for.

    Args:
        patterns: directories, taken as they are, or globs, of whose matches those are taken that
            have a metrics.jsonl.

    Returns:
        The directories in the order given, each once.

    Raises:
        ReportError: a pattern stands for no run.
    """
    found: dict[Path, Path] = {}  # a run named by two patterns is one run
    for pattern in patterns:
        if glob.has_magic(pattern) and not Path(pattern).is_dir():
            matches = [Path(match) for match in sorted(glob.glob(pattern))]
            paths = [path for path in matches if (path / "metrics.jsonl").is_file()]
        else:
            paths = [Path(pattern)]
        if not paths:
            raise ReportError(f"no runs found: {pattern} matches no directory with metrics.jsonl")
        for path in paths:
            found.setdefault(path.resolve(), path)
    if not found:
        raise ReportError("no runs found: name at least one run directory")
    return list(found.values())


def load_run(path: str | Path) -> Run:
    """The run in a directory.

    Args:
        path: a run directory with config.yaml and metrics.jsonl, and summary.json if it ended.

    Returns:
        The run. A last line of metrics still being written is left out, and lines that a resumed
        run did again replace the earlier ones.

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
    summary = _read_object(path / "summary.json")
    config = read_yaml(path / "config.yaml")
    return Run(
        str(path),
        config,
        metrics,
        summary,
        _status(path, summary),
        _read_object(path / "offline.json"),
        path,
        _replayed(config),
    )


def _replayed(config: dict[str, Any]) -> dict[str, Any]:
    source = config.get("select", {}).get("replay")
    known = Path(str(source), "config.yaml")
    return read_yaml(known) if source and known.is_file() else {}


def _status(path: Path, summary: dict[str, Any]) -> Status:
    # Only a process that works in the directory holds its lock; a killed one has lost it.
    from selectflow.run.directory import is_locked  # noqa: PLC0415

    if is_locked(path):
        return "running"  # also where the summary of an earlier stop is still there
    said = str(summary.get("status", "crashed"))
    return "stopped" if said.startswith("stopped") else _ENDS.get(said, "crashed")


_ENDS: dict[str, Status] = {"finished": "finished", "failed": "failed"}
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
    """The runs that directories, globs and W&B paths stand for.

    Raises:
        ReportError: as `find_runs` and `load_run`.
        TrackingError: W&B cannot be asked, or knows no such run.
    """
    remote = {pattern: path for pattern in patterns if (path := wandb_path(pattern))}
    local = [pattern for pattern in patterns if pattern not in remote]
    runs = [load_run(path) for path in find_runs(local)] if local or not remote else []
    return runs + [fetch_run(path) for path in dict.fromkeys(remote.values())]


def fetch_run(path: str) -> Run:
    """The run at W&B.

    Args:
        path: entity/project/run_id.

    Raises:
        ReportError: it has logged nothing yet.
        TrackingError: W&B cannot be asked, or knows no such run.
    """
    from selectflow.run.tracking import download_run  # noqa: PLC0415

    found = download_run(path)
    rows = [row for row in found.history if row.get("train/step") is not None]
    if not rows:
        raise ReportError(f"{path} has no train/step at W&B yet; wait for its first evaluation")
    said = str(found.summary.get("status", ""))
    # W&B's own word is all there is of a run without a summary
    state: Status = "running" if found.state == "running" else _ENDS.get(found.state, "crashed")
    status: Status = "stopped" if said.startswith("stopped") else _ENDS.get(said, state)
    return Run(path, found.config, _merged(rows), found.summary, status)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the run is writing it now, or was killed while it did
        try:
            row = json.loads(line)
            int(row["train/step"])
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}, line {number} must be a JSON object with train/step"
            raise ReportError(f"{message}, got {line.strip()[:80]!r}") from error
        rows.append(row)
    if not rows:
        raise ReportError(f"{path} has no complete line yet; wait for the run's first evaluation")
    return _merged(rows)


def _merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per step, in rising order."""
    found: dict[int, dict[str, Any]] = {}
    last = -1
    for row in rows:
        step = int(row["train/step"])
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
