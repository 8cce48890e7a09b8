"""Checkpoints: everything that the rest of a run depends on, as whole files."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from selectflow.core.batches import Batch, to_device

_LARGE = 32 << 20  # bytes of tensors


class Checkpoints:
    """The newest few checkpoints of a run, `step-<n>.pt` in one directory.

    A large state is copied, and written by a thread while the training goes on, which waits for the
    copy alone. A small one is written at once.

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

        The file appears under its name only when it is whole and on the disk. Later ones are those
        that a resumed run could not read: they would be taken for newer than what it writes.

        Raises:
            OSError: it, or the one before it, cannot be written; others are untouched.
        """
        self.wait()
        if _num_bytes(state) < _LARGE:
            self._write(step, state)
        else:
            self._writing = self._writer.submit(self._write, step, _copy(state))

    def wait(self) -> None:
        """Return when all that was saved is on the disk.

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
    """The state as it is now, in main memory: on an accelerator there may be no room for it."""
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


class PoolSource:
    """The run's pools on its device, with the position from which pools can be drawn again.

    A selector peeks at pools that it hands out later. They need not be stored: the stream is
    resumed at the first of them.

    Args:
        pools: any iterable of batches; can be resumed if it has `state_dict`.
        device: where the pools go.
        peeks: the most pools that are peeked at.
    """

    def __init__(self, pools: Iterable[Batch], device: torch.device, peeks: int) -> None:
        self._pools, self._device = pools, device
        self._has_state = hasattr(pools, "state_dict")
        self._before: deque[Any] = deque(maxlen=max(1, peeks))  # positions before the last draws
        self.seconds = 0.0  # waited for pools
        self._iterator: Iterator[Batch] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._pools)
        if self._has_state:
            self._before.append(self._position())
        began = time.perf_counter()
        pool = next(self._iterator)
        self.seconds += time.perf_counter() - began
        return to_device(pool, self._device)

    @property
    def errors(self) -> dict[str, int]:
        """Samples that could not be read so far, by shard, as the pools count them."""
        return dict(getattr(self._pools, "errors", {}))

    def state_dict(self, num_peeked: int) -> Any:
        """The position before the last `num_peeked` pools; None where the pools have none."""
        if not self._has_state:
            return None
        return self._before[-num_peeked] if num_peeked else self._position()

    def load_state_dict(self, state: Any) -> None:
        """Draw again from a position that `state_dict` returned.

        Raises:
            ValueError: the pools cannot be resumed.
        """
        if state is None or not hasattr(self._pools, "load_state_dict"):
            raise ValueError(
                "pools must have state_dict and load_state_dict to be resumed, got "
                f"{type(self._pools).__name__}; use selectflow.data.PoolStream"
            )
        self._pools.load_state_dict(state)

    def _position(self) -> Any:
        return self._pools.state_dict()  # type: ignore[attr-defined]


def identity_of(pools: Iterable[Batch]) -> dict[str, Any]:
    """What pools depend on, as `PoolStream.identity`; empty where they do not say."""
    return dict(getattr(pools, "identity", {}))


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


class StopRequest:
    """Whether the process was asked to stop, by SIGTERM or Ctrl-C."""

    def __init__(self) -> None:
        self.name: str | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Let the running step end on SIGTERM or the first Ctrl-C; a second signal ends at once."""
    request, signals = StopRequest(), (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        request.name = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
