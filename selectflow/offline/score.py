"""Offline selection, horizon = infinity: sweep back over a recorded run.

It is the look-ahead whose nominal future is what really came: one adjoint of the target loss at
the end of a recorded run is carried back to its first update, and gives every example a score at
each update that it took part in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples
from selectflow.core.derivatives import Curvature
from selectflow.core.forms import Method
from selectflow.core.optim import Adjoint
from selectflow.core.params import Params
from selectflow.core.sweep import SweepStep
from selectflow.offline.recorded import RecordedWindow
from selectflow.offline.trajectory import Trajectory

_CHECK_EVERY = 100  # updates between two checks of central differences


@dataclass(frozen=True)
class SampleScores:
    """What each sample of a run did for the target.

    Attributes:
        keys: of the N samples, in the order in which the run met them first.
        score: shape (N,), float64, larger = it helps more. Offline: predicted rise of the final
            target loss if the sample had been left out of the run. Of a ledger: mean over the
            pools that held it.
        occurrences: how often the run trained on each (offline), or had it in a pool (ledger);
            shape (N,), int64.
    """

    keys: list[str]
    score: Tensor
    occurrences: Tensor

    def ranking(self) -> list[int]:
        """Positions of the samples, best first; of equal scores the one met first."""
        return self.score.argsort(descending=True, stable=True).tolist()

    def top(self, share: float) -> list[str]:
        """Keys of the best round(share * N) samples, at least one, best first.

        Raises:
            ValueError: share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(
                f"share must be in (0, 1], got {share}; 0.5 keeps the better half of the samples"
            )
        num = max(1, round(share * len(self.keys)))
        return [self.keys[row] for row in self.ranking()[:num]]


def score_samples(
    trajectory: Trajectory,
    target: Iterable[Batch],
    *,
    curvature: Curvature = "exact",
    derivative: Method | None = None,
    memory_gib: float | None = None,
) -> SampleScores:
    """Scores of all samples of a recorded run, for the target loss at its end.

        score(z) = sum over the updates n that z took part in of  - gamma_n . grad loss_z / B_n

    gamma_n = d target / d (batch gradient of update n), through all later updates. Leaving z out
    takes its term grad loss_z / B_n from each batch mean and leaves the weights 1 / B_n of the
    others, so that occurrences add up to first order. In one batch TSLOO, which divides by B - 1
    after a removal, is predicted by (B score(z) - sum of the batch's scores) / (B - 1).

    Args:
        trajectory: of batches that are mappings with a list "key" of sample ids.
        target: batches; the target loss is the mean over all their examples.
        curvature: "exact", "fisher" (empirical Fisher) or "none".
        derivative: "exact", "central" or "auto"; None: as the trajectory's. Central differences are
            checked at the start and every 100 updates. With exact curvature their scores
            were within 2% of the exact ones (tests/benchmarks/sweep_agreement.py, sweep_cost.py).
        memory_gib: limit for the states between two snapshots, in GiB; None: 1, or the least that
            is needed.

    Returns:
        The scores, positive where a sample helps.

    Raises:
        ValueError: a batch without keys; an empty target; the limit is too small.
        FloatingPointError: a loss or derivative is not finite; names the examples.
        RuntimeError: the replay leaves the recording.
    """
    own = trajectory.derivatives
    trajectory = replace(trajectory, derivatives=own.anew(derivative or own.method))
    window = RecordedWindow.of(trajectory, trajectory.window(curvature=curvature))
    derivatives, batches, end = trajectory.derivatives, trajectory.batches, len(trajectory)
    row, state = _rows(batches), trajectory.state(end)
    with derivatives.objective.scoring():
        grad = _mean_gradient(trajectory, state.params, target)
    adjoint = Adjoint(grad, *(part.zeros_like() for part in state[1:]))
    del state  # its memory is of use now
    score = torch.zeros(len(row), dtype=torch.float64)
    occurrences = torch.zeros(len(row), dtype=torch.int64)

    def add(visit: SweepStep) -> None:
        batch = batches[visit.index]
        if visit.slopes is None:
            gamma = trajectory.updates[visit.index].masked(visit.gamma, visit.after)
            losses, slopes = derivatives.directional(visit.state.params, gamma, batch)
        else:
            losses, slopes = visit.slopes
        window.check(visit.index, visit.state, losses)
        rows = torch.tensor([row[key] for key in batch["key"]])
        score.index_add_(0, rows, -slopes.cpu().double() / len(rows))
        occurrences.index_add_(0, rows, torch.ones_like(rows))
        if (end - visit.index) % _CHECK_EVERY == 0:
            derivatives.forms.recheck()

    trajectory.sweep(window, end, adjoint, add, memory_gib)
    return SampleScores(list(row), score, occurrences)


def _rows(batches: Sequence[Batch]) -> dict[str, int]:
    """Sample keys, numbered through in the order of their first occurrence."""
    rows: dict[str, int] = {}
    for index, batch in enumerate(batches):
        keys = batch.get("key") if isinstance(batch, Mapping) else None
        if not isinstance(keys, list) or len(keys) != num_examples(batch):
            raise ValueError(
                f"batches must be mappings with a list 'key' of one sample id per example, got "
                f"{type(batch).__name__ if keys is None else type(keys).__name__} at update "
                f"{index}; selectflow.data.PoolStream yields such batches"
            )
        for key in keys:
            rows.setdefault(key, len(rows))
    return rows


def _mean_gradient(trajectory: Trajectory, params: Params, target: Iterable[Batch]) -> Params:
    total, size = params.zeros_like(), 0
    for batch in target:
        num = num_examples(batch)
        total = total.add(trajectory.derivatives.gradient(params, batch)[1], num)
        size += num
    if size == 0:
        raise ValueError("target must yield at least one batch, got none; pass a list of batches")
    return total / size
