"""A trajectory read as those do who do not replay it: states between snapshots are guessed.

Parameters are interpolated between the two snapshots around an update; the moments are
interpolated too, or held at the earlier one. The audit measures what that costs.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from selectflow.core.derivatives import Curvature
from selectflow.core.optim import State, Update
from selectflow.core.params import Params
from selectflow.core.sweep import Window
from selectflow.offline.trajectory import Trajectory


@dataclass(frozen=True)
class SparseTrajectory(Trajectory):
    """A trajectory whose states between snapshots are guessed.

    Attributes:
        hold_moments: moments are those of the last snapshot, else interpolated.
    """

    hold_moments: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory, hold_moments: bool) -> SparseTrajectory:
        """The same recording, read sparsely."""
        fields = {
            field.name: getattr(trajectory, field.name) for field in dataclasses.fields(Trajectory)
        }
        return cls(**fields, hold_moments=hold_moments)

    def window(
        self,
        first: int = 0,
        curvature: Curvature = "exact",
        assumed: Sequence[Update] | None = None,
    ) -> Window:
        """As of `Trajectory`; an update then leads to the guessed state after it."""
        plain = super().window(first, curvature, assumed)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Window)}
        return _SparseWindow(**fields, source=self)

    def guess(self, index: int) -> State:
        """The state before update `index`, from the snapshots around it."""
        known = self.snapshots.indices
        place = bisect.bisect_right(known, index) - 1
        before = self.snapshots.state(known[place])
        if known[place] == index:
            return before
        after = self.snapshots.state(known[place + 1])
        share = (index - known[place]) / (known[place + 1] - known[place])

        def between(start: Params, end: Params) -> Params:
            return start.add(end - start, share)

        params = between(before.params, after.params)
        if self.hold_moments:
            return before._replace(params=params)
        moments = (between(*pair) for pair in zip(before[1:], after[1:], strict=True))
        return State(params, *moments)


@dataclass
class _SparseWindow(Window):
    source: SparseTrajectory | None = None

    def advance(self, index: int, state: State) -> tuple[Params, State]:
        assert self.source is not None
        _, grad = self.derivatives.gradient(state.params, self.batch(index, state))
        return grad, self.source.guess(index + 1)
