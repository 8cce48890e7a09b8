"""What a selection decided, as data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from selectflow.batches import Batch
from selectflow.controller import Decision


def num_kept(keep: int | float, size: int) -> int:
    """How many examples of a pool are kept.

    Args:
        keep: a count, or a float in (0, 1]: a fraction of the pool, at least one example.
        size: examples in the pool.

    Raises:
        ValueError: the pool is smaller than the count.
    """
    num = max(1, round(keep * size)) if isinstance(keep, float) else keep
    if size < num:
        raise ValueError(
            f"a pool must hold at least keep = {num} examples, got {size}; "
            "lower keep, give it as a fraction, or drop the last partial pool"
        )
    return num


@dataclass(frozen=True)
class Selection:
    """What was kept of one pool, and why.

    Attributes:
        pool: the candidates, as given.
        indices: positions kept in the pool, best first, shape (B,), int64, on the CPU.
        scores: score of every candidate, shape (P,), on the CPU; larger is kept first. For
            `influence`: target loss per unit of example weight, positive = it helps.
        losses: loss of every candidate at the present parameters, shape (P,), on the CPU; None
            where the strategy did not need it.
        step: optimizer updates made before this batch is trained on.
        horizon: updates that the sensitivity in use looked ahead; None without a look-ahead.
        age: optimizer updates since that look-ahead.
        target_loss: mean target loss at the end of its rollout; None without one.
        lookahead_s: seconds of the look-ahead made for this pool, 0 where none was due.
        seconds: seconds of the whole selection, look-ahead and control included.
        control_s: seconds that the controller took.
        lr_multiplier: of the learning rate of the user's schedule, in the step to come.
        decisions: what the controller decided before this selection, with its reasons.
    """

    pool: Batch
    indices: Tensor
    scores: Tensor
    losses: Tensor | None
    step: int
    horizon: int | None
    age: int
    target_loss: float | None
    lookahead_s: float
    seconds: float
    control_s: float = 0.0
    lr_multiplier: float = 1.0
    decisions: tuple[Decision, ...] = ()
