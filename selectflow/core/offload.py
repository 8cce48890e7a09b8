"""Where the states of a rollout wait for the sweep back: where they are, on the CPU, or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Literal

from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.snapshots import read_state, write_state

Offload = Literal["none", "cpu", "disk"]
Fetch = Callable[[], State]
Keep = Callable[[State], Fetch]
"""Takes a state away; what it returns brings it back, once, bit for bit and where it was."""


@contextmanager
def keeping(offload: Offload) -> Iterator[Keep]:
    """How states are kept; what is left of them is gone afterwards, also after an exception.

    Args:
        offload: "none" leaves them on their device; "cpu" moves them to main memory, which is no
            change where the training runs there; "disk" writes them to files in a folder of its own
            where the system has temporary ones (set TMPDIR where that is memory, too).
    """
    if offload == "disk":
        with tempfile.TemporaryDirectory(
            prefix="selectflow-", ignore_cleanup_errors=True
        ) as folder:
            yield _OnDisk(Path(folder))
    else:
        yield in_place if offload == "none" else _on_cpu


def in_place(state: State) -> Fetch:
    """Leave a state where it is."""
    return lambda: state


def _on_cpu(state: State) -> Fetch:
    devices = _devices(state)
    moved = State(*(part.map(lambda tensor: tensor.cpu()) for part in state))
    return lambda: _placed(moved, devices)


class _OnDisk:
    """Writes each part of a state to a file, so that no more than one part is copied at once."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / f"{number:08d}.safetensors" for number in count())

    def __call__(self, state: State) -> Fetch:
        devices = _devices(state)
        paths = []
        for part in state:
            path = next(self._paths)
            write_state(path, State(part, Params(), Params()))
            paths.append(path)

        def fetch() -> State:
            parts = [read_state(path).params for path in paths]
            for path in paths:
                with suppress(PermissionError):  # still mapped, on Windows
                    path.unlink()
            return _placed(State(*parts), devices)

        return fetch


def _devices(state: State) -> list[dict[str, str]]:
    return [{name: str(tensor.device) for name, tensor in part.items()} for part in state]


def _placed(state: State, devices: list[dict[str, str]]) -> State:
    parts = (
        Params((name, part[name].to(device)) for name, device in where.items())
        for part, where in zip(state, devices, strict=True)
    )
    return State(*parts)
