"""Run directories: one run each, one process at a time, resumed only as the same run.

Checkpoints are whole files that hold everything that the rest of a run depends on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import random
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from selectflow.core.files import atomic_file
from selectflow.distributed import num_processes
from selectflow.run.config import RunConfig, load, to_yaml
from selectflow.run.ledger import LEDGER_FOLDER
from selectflow.run.log import DECISIONS
from selectflow.run.shared_checkpoints import num_processes_of, write_state
from selectflow.run.task import RunError
from selectflow.run.yaml import flat

_LARGE = 32 << 20  # bytes of tensors
# What may differ between a run and the one that resumes it.
_FREE_ON_RESUME = {
    "resume", "overwrite", "root", "num_threads", "max_wall_s", "checkpoint_every",
    "keep_checkpoints", "track", "data.num_workers", "data.memory_gib", "parallel", "timeout_s",
}  # fmt: skip


def open_run_dir(config: RunConfig) -> tuple[Path, dict[str, Any]] | None:
    """Make the run directory, or find where the run in it is to be resumed.

    Returns:
        The newest checkpoint, its file and its state; None for a run from the start.

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
            saved = Checkpoints(run_dir / "checkpoints").read_newest()
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
    with atomic_file(known) as file:  # a half of it could not be compared on resume
        file.write(to_yaml(config).encode())
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
    ours, theirs = (dict(flat(each.model_dump(mode="json"))) for each in (config, before))
    fixed = (key for key in ours if not {key, key.partition(".")[0]} & _FREE_ON_RESUME)
    differing = [key for key in fixed if ours[key] != theirs.get(key)]
    if differing:
        listed = ", ".join(f"{key}: {theirs.get(key)} there, {ours[key]} here" for key in differing)
        raise RunError(
            f"a run must be resumed with its own configuration, got {listed}; choose another "
            "name, or replace the run with overwrite=true"
        )


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
        if not _try_lock(file, fcntl.LOCK_EX):
            time.sleep(0.1)  # `is_locked` of another process may be looking just now
            if not _try_lock(file, fcntl.LOCK_EX):
                raise refusal
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
        return not _try_lock(file, fcntl.LOCK_SH)


def _try_lock(file: IO[Any], kind: int) -> bool:
    """Take a record lock of a file, without waiting; whether it was free."""
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def wait_until_free(run_dir: Path) -> None:
    """Return when no other process is at work in a run directory."""
    path = _lock_file(run_dir)
    if path not in _held and path.exists():
        with path.open("rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH)


def _lock_file(run_dir: Path) -> Path:
    run_dir = run_dir.resolve()
    return run_dir.parent / f".{run_dir.name}.lock"


# --- checkpoints ----------------------------------------------------------------------------------


class Checkpoints:
    """The newest few checkpoints of a run, `step-<n>.pt` in one directory.

    A large state is copied, and a thread writes the copy while the training goes on. A small one is
    written at once.

    Args:
        directory: where they are; made with the first.
        keep: how many are kept, >= 1. More than one, so that damage to the newest is no loss.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory, self._keep = directory, keep
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` optimizer steps; then drop the oldest, and any later ones.

        The file appears under its name only when it is whole and on the disk. Later checkpoints are
        those that a resumed run could not read; left there, they would pass for newer ones.

        Raises:
            OSError: it, or the one before it, cannot be written; others are untouched.
        """
        self.wait()
        if _num_bytes(state) < _LARGE:
            self._write(step, state)
        else:
            self._writing = self._writer.submit(self._write, step, _copy(state))

    def wait(self) -> None:
        """Return when every saved state is on the disk; an OSError says that it cannot be."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step-{step:08d}.pt"
        write_state(path, state)
        self.drop_others(path)

    def folder(self, step: int) -> Path:
        """Where the processes of a run write theirs after `step` optimizer steps."""
        return self._directory / f"step-{step:08d}"

    def drop_others(self, path: Path) -> None:
        """Remove those that are too old beside a new one, later ones, and halves left by a kill."""
        for half in self._directory.glob(".step-*.tmp"):
            half.unlink()
        for half in self._directory.glob("step-*.tmp/"):
            shutil.rmtree(half)
        paths = self.paths()
        num = paths.index(path) + 1
        for other in [*paths[: max(0, num - self._keep)], *paths[num:]]:
            if other.is_dir():
                _remove(other)
            else:
                other.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None where there is none; as `read_newest`."""
        found = self.read_newest()
        return found and found[1]

    def read_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, and where it is; None where there is none.

        A damaged one is passed over with a warning that names it.
        """
        for path in reversed(self.paths()):
            try:
                state = read_checkpoint(path)
            except Exception as error:  # a damaged file may fail anywhere in torch's reader
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"checkpoint {path} is damaged and is passed over ({reason})", stacklevel=2
                )
            else:
                return path, state
        return None

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first: files of one process, folders of several."""
        found = self._directory.glob("step-*")
        return sorted(path for path in found if re.fullmatch(r"step-\d+(\.pt)?", path.name))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint; of one of several processes, how many they are.

    Raises:
        Exception: the file is damaged, it may fail anywhere in torch's reader.
        ValueError: a file of the folder is missing, or of another length.
    """
    if path.is_dir():
        return {"processes": num_processes_of(path)}
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _num_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict | list | tuple):
        return sum(map(_num_bytes, state.values() if isinstance(state, dict) else state))
    return 0


def _copy(state: Any) -> Any:
    """A copy of the state in main memory: an accelerator may have no room for it."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy(state)  # with the attributes that a module's state has
        copied.update({name: _copy(value) for name, value in state.items()})
        return copied
    if type(state) in (list, tuple):
        return type(state)(map(_copy, state))
    return deepcopy(state)


def generator_states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's random generators, in plain values.

    Of several processes each has the generator of its own device alone.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _cuda_devices()],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put the generators back to `generator_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in zip(_cuda_devices(), states["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)


def _cuda_devices() -> list[int]:
    if not torch.cuda.is_available():
        return []
    is_alone = num_processes() == 1
    return list(range(torch.cuda.device_count())) if is_alone else [torch.cuda.current_device()]
