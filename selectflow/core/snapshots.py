"""States of a run by update index, in memory or on disk, never more than a limit allows.

The spacing starts small; when the store is full every second snapshot is dropped and the spacing
doubles. So a run of any length ends with evenly spaced snapshots, and nobody has to know its
length in advance. On disk a snapshot is one safetensors file, written beside its place and moved
there when it is complete, and memory-mapped when it is read.
"""

from __future__ import annotations

import bisect
from pathlib import Path

from torch import Tensor

from selectflow.core.files import atomic_file
from selectflow.core.memory import GIB, num_fitting
from selectflow.core.optim import State
from selectflow.core.params import Params


class Snapshots:
    """Evenly spaced states, and the last one.

    Args:
        limit_gib: size that all snapshots together may reach, in GiB; None: 1, or two states of
            the model.
        spacing: updates between two snapshots at the start; doubles when the limit is reached.
        folder: where they are written; None: kept in memory.

    Raises:
        ValueError: limit or spacing out of range.
    """

    def __init__(
        self, limit_gib: float | None, spacing: int = 1, folder: Path | None = None
    ) -> None:
        if limit_gib is not None and not limit_gib > 0:
            raise ValueError(f"limit_gib must be > 0, got {limit_gib}")
        if spacing < 1:
            raise ValueError(f"spacing must be at least 1, got {spacing}")
        self.limit_gib, self.spacing, self.folder = limit_gib, spacing, folder
        self._held: dict[int, State] = {}
        self._indices: list[int] = []
        self._sizes: dict[int, int] = {}
        self._largest = 0  # bytes of the largest state
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def indices(self) -> list[int]:
        """Updates made before each snapshot, rising; do not write to it."""
        return self._indices

    def __contains__(self, index: int) -> bool:
        return index in self._sizes

    @property
    def gib(self) -> float:
        """Size of all snapshots together, in GiB."""
        return sum(self._sizes.values()) / GIB

    def offer(self, index: int, state: State) -> None:
        """Keep a copy of `state` if `index` lies on the spacing; thin out when that is full."""
        if index % self.spacing == 0:
            self.keep(index, state)
        size = self._largest
        capacity = num_fitting(self.limit_gib, size, 2) - 1  # one place for the last state
        if capacity < 1:
            raise ValueError(
                f"limit_gib must be at least {2 * size / GIB:.3g}, two states of this model, "
                f"got {self.limit_gib}"
            )
        while len(self._sizes) > capacity:
            self.spacing *= 2
            for kept in self._indices:
                if kept % self.spacing:
                    self._drop(kept)
            self._indices = [kept for kept in self._indices if kept in self]

    def keep(self, index: int, state: State) -> None:
        """Keep a copy of `state`, wherever `index` lies."""
        if self.folder is None:
            self._held[index] = State(*(part.map(lambda x: x.detach().clone()) for part in state))
        else:
            write_state(self.path(index), state)
        self._note(index, state)

    def state(self, index: int) -> State:
        """The snapshot at `index`; do not write to it.

        Raises:
            OSError: its file is missing or not whole.
        """
        return self._held[index] if self.folder is None else read_state(self.path(index))

    def path(self, index: int) -> Path:
        """The file of the snapshot at `index`."""
        assert self.folder is not None
        return self.folder / f"snapshot-{index:08d}.safetensors"

    def reopen(self, indices: list[int]) -> None:
        """Take over the files of an earlier recording.

        Raises:
            OSError: a file is missing or not whole.
        """
        for index in indices:
            self._note(index, self.state(index))

    def _note(self, index: int, state: State) -> None:
        if index not in self:
            bisect.insort(self._indices, index)
        self._sizes[index] = sum(part.num_bytes() for part in state)
        self._largest = max(self._largest, self._sizes[index])

    def _drop(self, index: int) -> None:
        del self._sizes[index]
        self._held.pop(index, None)
        if self.folder is not None:
            self.path(index).unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there complete or not at all.

    Raises:
        OSError: it could not be written (disk full, no permission); names the file.
    """
    try:
        with atomic_file(path, durable=True) as file:
            file.write(content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}) and was left out; free space there, "
            "lower limit_gib or choose another folder",
        ) from error


def write_state(path: Path, state: State) -> None:
    """Write a state as one safetensors file.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    from safetensors.torch import save  # noqa: PLC0415

    tensors: dict[str, Tensor] = {
        f"{field}/{name}": tensor.detach().contiguous()
        for field, params in state._asdict().items()
        for name, tensor in params.items()
    }
    write_whole(path, save(tensors))


def read_state(path: Path) -> State:
    """The state in a file of `write_state`, memory-mapped, on the CPU.

    Raises:
        OSError: the file is missing or not whole.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    parts: dict[str, Params] = {field: Params() for field in State._fields}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                field, name = key.split("/", 1)
                parts[field][name] = file.get_tensor(key)
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"{path} must be a whole snapshot, got: {error}; record again") from error
    order = list(parts["params"])
    return State(*(part.pick([name for name in order if name in part]) for part in parts.values()))
