"""States of a run by update index, in memory or on disk, never more than a limit allows.

The spacing starts small; when the store is full every second snapshot is dropped and the spacing
doubles. So a run of any length ends with evenly spaced snapshots, and nobody has to know its
length in advance.
"""

from __future__ import annotations

import bisect
from pathlib import Path

from torch import nn

from selectflow.core.chunks import GIB, num_fitting
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.storage import read_state, write_state


class Snapshots:
    """Evenly spaced states, and the last one.

    Args:
        limit_gib: size that all snapshots together may reach, in GiB; None: 1, or two states of
            the model.
        spacing: updates between two snapshots at the start; doubles when the limit is reached.
        folder: where they are written; None: kept in memory.
        model: whose parameters' devices they are read back to; None: left where they are.

    Raises:
        ValueError: limit or spacing out of range.
    """

    def __init__(
        self,
        limit_gib: float | None,
        spacing: int = 1,
        folder: Path | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if limit_gib is not None and not limit_gib > 0:
            raise ValueError(f"limit_gib must be > 0, got {limit_gib}")
        if spacing < 1:
            raise ValueError(f"spacing must be at least 1, got {spacing}")
        self.limit_gib, self.spacing, self.folder = limit_gib, spacing, folder
        self._model = model
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
        """The snapshot at `index`, on the devices of the model's parameters; do not write to it.

        Raises:
            OSError: its file is missing or not whole.
        """
        state = self._held[index] if self.folder is None else read_state(self.path(index))
        if self._model is None:
            return state
        live = dict(self._model.named_parameters())
        return State(
            *(Params((k, x.to(live[k].device)) for k, x in part.items()) for part in state)
        )

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
