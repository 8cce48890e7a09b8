"""A recorded run: what each update was made from, and enough states to replay the others.

Between two snapshots a state is computed again by the pure update (`dynamics`), from the same
batches. A replay that does not arrive at the next snapshot is refused: nothing that is derived
from it would be about this run.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selectflow.core.batches import Batch
from selectflow.core.chunks import GIB, num_fitting
from selectflow.core.derivatives import Curvature, Derivatives
from selectflow.core.optim import Adjoint, State
from selectflow.core.params import Params
from selectflow.core.storage import read_state, write_state
from selectflow.core.sweep import SweepStep, Window, sweep, sweep_capacity
from selectflow.core.update import Update

# How far a replay may end from the recording, over the way both went since the last snapshot.
# torch.optim and `dynamics` differ by rounding, which a run in low precision amplifies.
_DRIFT = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.5}


class Snapshots:
    """Evenly spaced states of a run, and the last one, in memory or on disk.

    The spacing starts small; when the store is full every second snapshot is dropped and the
    spacing doubles. So a run of any length, known in advance or not, ends with evenly spaced ones.

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
        self._sizes: dict[int, int] = {}  # bytes
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def indices(self) -> list[int]:
        """Updates made before each snapshot, rising."""
        return sorted(self._sizes)

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
        size = max(self._sizes.values())
        capacity = num_fitting(self.limit_gib, size, 2) - 1  # one place for the last state
        if capacity < 1:
            raise ValueError(
                f"limit_gib must be at least {2 * size / GIB:.3g}, two states of this model, "
                f"got {self.limit_gib}"
            )
        while len(self._sizes) > capacity:
            self.spacing *= 2
            for kept in self.indices:
                if kept % self.spacing:
                    del self._sizes[kept]
                    self._held.pop(kept, None)
                    if self.folder is not None:
                        self.path(kept).unlink()

    def keep(self, index: int, state: State) -> None:
        """Keep a copy of `state`, wherever `index` lies."""
        if self.folder is None:
            self._held[index] = State(*(part.map(lambda x: x.detach().clone()) for part in state))
        else:
            write_state(self.path(index), state)
        self._sizes[index] = _num_bytes(state)

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
            self._sizes[index] = _num_bytes(self.state(index))


def _num_bytes(state: State) -> int:
    return sum(part.num_bytes() for part in state)


@dataclass(frozen=True)
class Trajectory:
    """A recorded run of T updates. Update i leads from state i to state i + 1.

    Attributes:
        derivatives: of the training loss.
        batches: what each update was trained on.
        updates: the rules and hyperparameters of each.
        snapshots: states that were kept, always those before the first and after the last update.
        first_step: optimizer updates made before the recording began; absolute step n is update
            n - first_step.
        losses: mean training loss of each batch before its update.
        seconds: of the training itself, snapshots included.
    """

    derivatives: Derivatives
    batches: Sequence[Batch]
    updates: Sequence[Update]
    snapshots: Snapshots
    first_step: int
    losses: Sequence[float]
    seconds: float

    def __len__(self) -> int:
        return len(self.updates)

    def window(
        self,
        first: int = 0,
        curvature: Curvature = "exact",
        assumed: Sequence[Update] | None = None,
    ) -> Window:
        """The updates as a window whose sweeps end at update `first`."""
        return Window(
            self.derivatives,
            self.updates,
            lambda index, _: self.batches[index],
            curvature,
            assumed=assumed,
            first=first,
        )

    def state(self, index: int) -> State:
        """State before update `index` (T: the end), replayed from the last snapshot before it."""
        known = self.snapshots.indices
        nearest = known[bisect.bisect_right(known, index) - 1]
        return self.replay(nearest, index, self.snapshots.state(nearest))

    def replay(self, start: int, stop: int, state: State) -> State:
        """State before update `stop`, from the one before update `start`."""
        window = self.window()
        with self.derivatives.objective.scoring():
            for index in range(start, stop):
                _, state = window.advance(index, state)
        return state

    def sweep(
        self,
        window: Window,
        stop: int,
        adjoint: Adjoint,
        emit: Callable[[SweepStep], None],
        memory_gib: float | None = None,
    ) -> None:
        """Carry an adjoint back from state `stop` to update `window.first`.

        Args:
            window: of this trajectory.
            stop: index of the state that `adjoint` belongs to.
            adjoint: derivatives of one or several target losses.
            emit: called at each update, from the last to the first.
            memory_gib: limit for the states between two snapshots, in GiB; None: 1, or the least
                that is needed.

        Raises:
            RuntimeError: the replay leaves the recording.
            ValueError: the limit is too small.
        """
        inner = [index for index in self.snapshots.indices if window.first < index < stop]
        points = [window.first, *inner, stop]
        for start, end in zip(points[-2::-1], points[:0:-1], strict=True):
            state = self.state(start)

            def arrive(
                arrived: State, start: State = state, end: int = end, known: Adjoint = adjoint
            ) -> Adjoint:
                self.check_replay(end, arrived, start)
                return known

            capacity = sweep_capacity(state, end - start, memory_gib)
            with self.derivatives.objective.scoring():
                adjoint = sweep(window, state, arrive, emit, capacity, start=start, stop=end)

    def coarsest(self, params: Params) -> torch.dtype:
        """Type of the lowest precision that was trained: recorded states are float32 at least."""
        live = dict(self.derivatives.objective.model.named_parameters())
        return max((live[name].dtype for name in params), key=lambda kind: torch.finfo(kind).eps)

    def check_replay(self, index: int, replayed: State, start: State) -> None:
        """Compare a replayed state with the snapshot at `index`, if there is one.

        Args:
            index: of the state.
            replayed: what the replay made of it.
            start: where the replay began; the way from there is the measure.

        Raises:
            RuntimeError: they differ by more than rounding explains.
        """
        if index not in self.snapshots:
            return
        recorded = self.snapshots.state(index).params
        if all(value is recorded[name] for name, value in replayed.params.items()):
            return
        apart, way = (replayed.params - recorded).norm(), (recorded - start.params).norm()
        dtype = self.coarsest(recorded)
        rounding = torch.finfo(dtype).eps * recorded.norm()
        if not apart <= _DRIFT[dtype] * way + rounding:
            raise RuntimeError(
                f"a replay must arrive at the recorded state, got one that is {apart:.2g} away "
                f"after a way of {way:.2g}, before step {self.first_step + index}; the training "
                "is not deterministic (dropout by torch.nn.functional, random augmentation in "
                "loss_fn, batches or frozen parameters changed since): fix the randomness per "
                "example, or draw it when the batches are made"
            )
