"""Checkpoints: everything that the rest of a run depends on, as whole files; random generators."""

from __future__ import annotations

import os
import random
import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

_LARGE = 32 << 20  # bytes of tensors


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
        """Return when every saved state is on the disk.

        Raises:
            OSError: it cannot be written; earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step-{step:08d}.pt"
        beside = path.with_suffix(".tmp")
        try:
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            beside.unlink(missing_ok=True)
            raise OSError(f"checkpoint {path} cannot be written: {_cause(error)}") from error
        os.replace(beside, path)
        paths = self.paths()
        num = paths.index(path) + 1
        for other in [*paths[: max(0, num - self._keep)], *paths[num:]]:
            other.unlink()

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, None where there is none.

        A damaged one is passed over with a warning that names it.
        """
        for path in reversed(self.paths()):
            try:
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file may fail anywhere in torch's reader
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"checkpoint {path} is damaged and is passed over ({reason})", stacklevel=2
                )
            else:
                return state
        return None

    def paths(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        found = self._directory.glob("step-*.pt")
        return sorted(path for path in found if re.fullmatch(r"step-\d+\.pt", path.name))


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


def _cause(error: BaseException) -> BaseException:
    """The error of the disk behind one of torch's writer, which speaks of positions."""
    behind = error.__cause__ or error.__context__
    if isinstance(error, OSError) or behind is None:
        return error
    return _cause(behind)


def generator_states() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's random generators, in plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put the generators back to `generator_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
