"""Sweeps that take from a dense recording what it holds: states, and gradients between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.recovered import gradient_between
from selectflow.core.sweep import Window
from selectflow.offline.trajectory import Trajectory

# How far the mean loss of a batch may be from the recorded one, relative, before the update is made
# again to see whether it arrives. Central differences read it at two points beside the state, up
# to 1e-4 apart from it in float32 (tests/benchmarks/sweep_cost.py prints it).
_LOSS_GAP = {torch.float64: 1e-6, torch.float32: 5e-4}


@dataclass(kw_only=True)
class RecordedWindow(Window):
    """A window whose updates between two recorded states are not made again.

    What makes no pass is not checked by arriving: whoever sweeps it must `check` the losses.
    """

    source: Trajectory

    @classmethod
    def of(cls, trajectory: Trajectory, window: Window) -> RecordedWindow:
        """The same window, handing on slopes."""
        return cls(**{**vars(window), "with_slopes": True}, source=trajectory)

    def advance(self, index: int, state: State) -> tuple[Params, State]:
        grad = self._recorded(index, state)
        if grad is None:
            return super().advance(index, state)
        return grad, self.source.snapshots.state(index + 1)

    def _recorded(self, index: int, state: State) -> Params | None:
        source = self.source
        if index + 1 >= len(source) or not {index, index + 1} <= set(source.snapshots.indices):
            return None
        after = source.snapshots.state(index + 1)
        resolution = torch.finfo(source.coarsest(after.params)).eps
        return gradient_between(
            source.updates[index], source.updates[index + 1], state, after, resolution
        )

    def check(self, index: int, state: State, losses: Tensor) -> None:
        """See that the batch of an update has the losses it had when it was recorded.

        Raises:
            RuntimeError: the update, made again, does not arrive at the recorded state.
        """
        recorded = self.source.losses[index]
        most = _LOSS_GAP.get(self.source.coarsest(state.params), 0.0)
        if not abs(losses.mean().item() - recorded) <= most * abs(recorded):
            _, arrived = super().advance(index, state)
            self.source.check_replay(index + 1, arrived, state)
