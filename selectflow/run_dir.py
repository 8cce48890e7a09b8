"""Run directories: one run each, one process at a time, resumed only as the same run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selectflow.checkpoints import Checkpoints
from selectflow.config import RunConfig, load, to_yaml
from selectflow.ledger import LEDGER_FOLDER


class RunError(ValueError):
    """A run that cannot start: the message says why, and what to do."""


# What may differ between a run and the one that resumes it.
_FREE_ON_RESUME = {
    "resume", "overwrite", "root", "num_threads", "max_wall_s", "checkpoint_every",
    "keep_checkpoints", "track",
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
    # one whose arguments were refused leaves its config.yaml alone, and may be started again
    if any((run_dir / name).exists() for name in ("metrics.jsonl", "offline.json")):
        if config.overwrite:
            shutil.rmtree(run_dir)
        elif config.resume == "auto":
            _check_same(config, load(known))
            saved = Checkpoints(run_dir / "checkpoints").newest()
        else:
            raise RunError(
                f"run directory must be new, got {run_dir}, which holds another run; choose "
                "another name, go on with resume=auto, or replace it with overwrite=true"
            )
    if saved is None and not is_finished(run_dir):
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of a run that died before it saved
        if (run_dir / LEDGER_FOLDER).exists():
            shutil.rmtree(run_dir / LEDGER_FOLDER)
    run_dir.mkdir(parents=True, exist_ok=True)
    known.write_text(to_yaml(config), encoding="utf-8")
    return None if is_finished(run_dir) else saved


def is_finished(run_dir: Path) -> bool:
    """Whether the run in a directory came to its end."""
    path = run_dir / "summary.json"
    return path.exists() and json.loads(path.read_text("utf-8"))["status"] == "finished"


def _check_same(config: RunConfig, before: RunConfig) -> None:
    ours, theirs = config.model_dump(mode="json"), before.model_dump(mode="json")
    differing = [k for k in ours if k not in _FREE_ON_RESUME and ours[k] != theirs[k]]
    if differing:
        listed = ", ".join(f"{key}: {theirs[key]} there, {ours[key]} here" for key in differing)
        raise RunError(
            f"a run must be resumed with its own configuration, got {listed}; choose another "
            "name, or replace the run with overwrite=true"
        )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory for this process.

    Raises:
        RunError: another process holds it.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(run_dir).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run directory must be used by one process, got {run_dir}, where another is at "
                "work; wait for it, or choose another name"
            ) from None
        yield


def is_locked(run_dir: Path) -> bool:
    """Whether a process of this machine is at work in a run directory."""
    path = _lock_file(run_dir)
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lock_file(run_dir: Path) -> Path:
    run_dir = run_dir.resolve()
    return run_dir.parent / f".{run_dir.name}.lock"
