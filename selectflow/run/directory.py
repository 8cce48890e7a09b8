"""Run directories: one run each, one process at a time, resumed only as the same run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selectflow.run.checkpoint import Checkpoints
from selectflow.run.config import RunConfig, load, to_yaml
from selectflow.run.ledger import LEDGER_FOLDER
from selectflow.run.log import DECISIONS
from selectflow.run.task import RunError

# What may differ between a run and the one that resumes it.
_FREE_ON_RESUME = {
    "resume", "overwrite", "root", "num_threads", "max_wall_s", "checkpoint_every",
    "keep_checkpoints", "track", "data.num_workers", "data.memory_gib",
}  # fmt: skip


def open_run_dir(config: RunConfig) -> dict[str, Any] | None:
    """Make the run directory, or find where the run in it is to be resumed.

    Returns:
        The newest checkpoint, with metrics.jsonl cut back to it; None for a run from the start.

    Raises:
        RunError: it holds a run already, and the configuration neither replaces nor resumes it;
            or that run had another configuration.
    """
    run_dir, saved = config.run_dir, None
    if (replayed := config.select.replay) and replayed.resolve() == run_dir.resolve():
        raise RunError(
            f"select.replay must be another run than this one, got {replayed}; choose another name"
        )
    known = run_dir / "config.yaml"
    # a run whose arguments were refused has left a config.yaml alone, and may be started again
    if any((run_dir / name).exists() for name in ("metrics.jsonl", "offline.json")):
        if config.overwrite:
            _remove(run_dir)
        elif config.resume == "auto":
            _check_same(config, load(known))
            saved = Checkpoints(run_dir / "checkpoints").newest()
        else:
            raise RunError(
                f"run directory must be new, got {run_dir}, which holds another run; choose "
                "another name, go on with resume=auto, or replace it with overwrite=true"
            )
    if saved is None and not is_finished(run_dir):
        for name in ("metrics.jsonl", DECISIONS):  # of a run that died before it saved
            (run_dir / name).unlink(missing_ok=True)
        if (run_dir / LEDGER_FOLDER).exists():
            shutil.rmtree(run_dir / LEDGER_FOLDER)
    run_dir.mkdir(parents=True, exist_ok=True)
    beside = run_dir / "config.yaml.tmp"  # a half of it could not be compared on resume
    beside.write_text(to_yaml(config), encoding="utf-8")
    os.replace(beside, known)
    return None if is_finished(run_dir) else saved


def _remove(run_dir: Path) -> None:
    """Remove a run as a whole: a part of it, left by a kill, could be taken for one to resume."""
    doomed = run_dir.with_name(f".{run_dir.name}.replaced")
    shutil.rmtree(doomed, ignore_errors=True)  # left by a kill
    run_dir.rename(doomed)
    shutil.rmtree(doomed)


def is_finished(run_dir: Path) -> bool:
    """Whether the run in a directory came to its end."""
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text("utf-8"))["status"] == "finished"


def _check_same(config: RunConfig, before: RunConfig) -> None:
    ours, theirs = (_fields(each.model_dump(mode="json")) for each in (config, before))
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        listed = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in differing)
        raise RunError(
            f"a run must be resumed with its own configuration, got {listed}; choose another "
            "name, or replace the run with overwrite=true"
        )


def _fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of all sections that must not change, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = prefix + name
        if path not in _FREE_ON_RESUME:
            found |= _fields(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


_held: set[Path] = set()  # locks of this process: a record lock keeps out other processes alone


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process. For POSIX systems: it takes a record lock.

    Forked processes do not hold it: a run that was killed can be resumed at once, while its
    workers live on for some seconds.

    Raises:
        RunError: another process, or this one, holds it.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = _lock_file(run_dir)
    refusal = RunError(
        f"run directory must be used by one process, got {run_dir}, where another is at work; wait "
        "for it, or choose another name"
    )
    if path in _held:  # the file must not be opened: closing it would release the lock
        raise refusal
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise refusal from None
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def is_locked(run_dir: Path) -> bool:
    """Whether a process of this machine is at work in a run directory."""
    path = _lock_file(run_dir)
    if path in _held or not path.exists():
        return path in _held
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def wait_until_free(run_dir: Path) -> None:
    """Return when no other process is at work in a run directory."""
    path = _lock_file(run_dir)
    if path not in _held and path.exists():
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH)


def _lock_file(run_dir: Path) -> Path:
    run_dir = run_dir.resolve()
    return run_dir.parent / f".{run_dir.name}.lock"
