"""The rows of an audit: what is assumed when one recorded run's removals are predicted.

Three levels, each a source of rows compared with the same ground truth, leave-one-out retraining.
Configuration: the sweep assumes another optimizer, schedule or decay. Algorithm: it assumes the
right one and linearises. System: it linearises rightly, in another precision or from sparse
snapshots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectflow.audit.influence import influence, leave_one_out
from selectflow.audit.settings import Setting
from selectflow.core.batches import Batch
from selectflow.core.chunks import num_fitting
from selectflow.offline.sparse import SparseTrajectory
from selectflow.offline.trajectory import Trajectory

Pairs = list[tuple[int, int]]

CONFIG_ROWS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd"},
    "constant lr": {"method": "constant_lr"},
    "no decay": {"method": "no_decay"},
}
ALGORITHM_ROWS: dict[str, dict[str, Any]] = {
    "adamw/none": {"curvature": "none"},
    "adamw/fisher": {"curvature": "fisher"},
    "adamw/exact": {},
    "adamw/exact, own update": {"own_update": "exact"},
    "adamw/exact, order 2": {"order": 2},
}
_MOST_PARALLEL = 64
_STATES_EACH = 8  # what a rerun or a query holds at its peak, in sizes of (theta, m, v)


@dataclass(frozen=True)
class Recorded:
    """One recorded run of a setting.

    Attributes:
        setting: what was trained.
        lr: learning rate of the run.
        trajectory: the recording.
        queries: whose losses are measured.
    """

    setting: Setting
    lr: float
    trajectory: Trajectory
    queries: Batch

    @classmethod
    def of(cls, setting: Setting, lr: float) -> Recorded:
        """Record a run."""
        return cls(setting, lr, setting.record(lr), setting.queries())

    @property
    def limits(self) -> dict[str, Any]:
        """Options that hold `leave_one_out` to the memory limit: so many reruns side by side."""
        state = self.trajectory.snapshots.state(0)
        size = _STATES_EACH * sum(part.num_bytes() for part in state)
        fitting = num_fitting(self.setting.config.memory_gib, size, 1)
        return {"num_parallel": min(max(1, fitting), _MOST_PARALLEL)}

    def truth(self, pairs: Pairs, horizon: float) -> Tensor:
        """What each removal really does to each query's loss, shape (num_pairs, Q)."""
        return leave_one_out(self.trajectory, self.queries, pairs, horizon, **self.limits)

    def predicted(self, pairs: Pairs, horizon: float, **options: Any) -> Tensor:
        """The same by `influence` with its options."""
        options |= {"memory_gib": self.setting.config.memory_gib, **self.limits}
        return influence(self.trajectory, self.queries, pairs, horizon=horizon, **options)


class Row(NamedTuple):
    """One way to predict removals.

    Attributes:
        level: "config", "algorithm" or "system".
        name: what is assumed.
        score: prediction for the source's pairs, shape (num_pairs, Q), the sign of the truth.
    """

    level: str
    name: str
    score: Callable[[], Tensor]


RowSource = Callable[[Recorded, Pairs, float], Iterator[Row]]
"""The rows of a recorded run for given pairs and horizon; what a row alone needs is made lazily."""


def config_rows(recorded: Recorded, pairs: Pairs, horizon: float) -> Iterator[Row]:
    """The wrong optimizer, schedule or decay."""
    for name, options in CONFIG_ROWS.items():
        if name != "constant lr" or recorded.setting.config.schedule != "constant":
            yield _row("config", name, recorded, pairs, horizon, options)


def algorithm_rows(recorded: Recorded, pairs: Pairs, horizon: float) -> Iterator[Row]:
    """The right optimizer, linearised with one curvature or another, or to second order."""
    for name, options in ALGORITHM_ROWS.items():
        yield _row("algorithm", name, recorded, pairs, horizon, options)


def system_rows(recorded: Recorded, pairs: Pairs, horizon: float) -> Iterator[Row]:
    """The right optimizer and exact curvature, in low precision or from sparse snapshots.

    Each needs a recording of its own, so only the whole run has them.
    """
    if horizon != math.inf:
        return
    config = recorded.setting.config
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        if name != config.precision:
            yield _row("system", name, _again(recorded, dtype), pairs, horizon, {})
    sparse = recorded.setting.record(recorded.lr, config.spacing)
    for hold in (False, True):
        name = f"every {config.spacing}, moments {'held' if hold else 'interpolated'}"
        guessed = dataclasses.replace(recorded, trajectory=SparseTrajectory.of(sparse, hold))
        yield _row("system", name, guessed, pairs, horizon, {})


def _again(recorded: Recorded, dtype: torch.dtype) -> Recorded:
    """The same run in another precision; only its row holds it, since recordings are large."""
    return Recorded.of(dataclasses.replace(recorded.setting, dtype=dtype), recorded.lr)


ROWS: tuple[RowSource, ...] = (config_rows, algorithm_rows, system_rows)


def _row(
    level: str,
    name: str,
    recorded: Recorded,
    pairs: Pairs,
    horizon: float,
    options: dict[str, Any],
) -> Row:
    return Row(level, name, lambda: recorded.predicted(pairs, horizon, **options))
