"""A run as it lies in its directory."""

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selectflow.yaml_io import read_yaml


class ReportError(ValueError):
    """Runs that cannot be reported on; the message says which and why."""


@dataclass(frozen=True)
class Run:
    """One run: what it was asked to do and what it measured."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # one dict per train/step, in rising order
    summary: dict[str, Any]  # empty if the run has not finished
    status: Literal["finished", "unfinished"]


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
        path: a run directory with config.yaml and metrics.jsonl, and summary.json if it finished.

    Returns:
        The run; finished if its summary says so. A last line of metrics still being written is
        left out, and lines that a resumed run did again replace the earlier ones.

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
    summary = _read_summary(path / "summary.json")
    status: Literal["finished", "unfinished"] = (
        "finished" if summary.get("status") == "finished" else "unfinished"
    )
    return Run(path, read_yaml(path / "config.yaml"), metrics, summary, status)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    last = -1
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break  # the run is writing it now, or was killed while it did
        try:
            row = json.loads(line)
            step = int(row["train/step"])
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}, line {number} must be a JSON object with train/step"
            raise ReportError(f"{message}, got {line.strip()[:80]!r}") from error
        if step < last:  # resumed from an earlier checkpoint: what came after it did not happen
            rows = {done: rows[done] for done in rows if done < step}
        rows[step] = rows.get(step, {}) | row
        last = step
    if not rows:
        raise ReportError(f"{path} has no complete line yet; wait for the run's first evaluation")
    return list(rows.values())


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} must be JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ReportError(f"{path} must be a JSON object, got {summary!r}")
    return summary
