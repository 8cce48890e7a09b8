"""Offline selection, horizon = infinity: sweep back over a recorded run.

It is the look-ahead whose nominal future is what really came: one adjoint of the target loss at
the end of a recorded run is carried back to its first update, and gives every example a score at
each update that it took part in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from selectflow.batches import Batch, num_examples
from selectflow.derivatives import Curvature
from selectflow.dynamics import Adjoint
from selectflow.lookahead import Visit
from selectflow.params import Params
from selectflow.sample_scores import SampleScores
from selectflow.trajectory import Trajectory


def score_samples(
    trajectory: Trajectory,
    target: Iterable[Batch],
    *,
    curvature: Curvature = "exact",
    memory_gib: float | None = None,
) -> SampleScores:
    """Scores of all samples of a recorded run, for the target loss at its end.

        score(z) = sum over the updates n that z took part in of  - gamma_n . grad loss_z / B_n

    gamma_n = d target / d (batch gradient of update n), through all later updates. Leaving z out
    takes its term grad loss_z / B_n from each batch mean and leaves the weights 1 / B_n of the
    others, so that occurrences add up to first order. In one batch TSLOO, which divides by B - 1
    after a removal, is predicted by (B score(z) - sum of the batch's scores) / (B - 1).

    Args:
        trajectory: of batches that are mappings with a list "key" of sample ids. Its derivatives
            should be exact, as `record` makes them: errors of central Hessian products compound
            over a whole run.
        target: batches; the target loss is the mean over all their examples.
        curvature: "exact", "fisher" (empirical Fisher) or "none".
        memory_gib: limit for the states between two snapshots, in GiB; None: 1, or the least that
            is needed.

    Returns:
        The scores, positive where a sample helps.

    Raises:
        ValueError: a batch without keys; an empty target; the limit is too small.
        FloatingPointError: a loss or derivative is not finite; names the examples.
        RuntimeError: the replay leaves the recording.
    """
    batches, end = trajectory.batches, len(trajectory)
    row = _rows(batches)
    score = torch.zeros(len(row), dtype=torch.float64)
    occurrences = torch.zeros(len(row), dtype=torch.int64)

    def add(visit: Visit) -> None:
        batch = batches[visit.index]
        gamma = trajectory.updates[visit.index].heard(visit.gamma, visit.after)
        _, slopes = trajectory.derivatives.along(visit.state.params, gamma, batch)
        rows = torch.tensor([row[key] for key in batch["key"]])
        score.index_add_(0, rows, -slopes.cpu().double() / len(rows))
        occurrences.index_add_(0, rows, torch.ones_like(rows))

    params = trajectory.state(end).params
    with trajectory.derivatives.objective.scoring():
        grad = _mean_gradient(trajectory, params, target)
    adjoint = Adjoint(grad, *(part.zeros_like() for part in trajectory.state(end)[1:]))
    trajectory.sweep(trajectory.window(curvature=curvature), end, adjoint, add, memory_gib)
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
