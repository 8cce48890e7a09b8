"""What a strategy is given, what it returns, and what is kept by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.control.rules import Decision
from selectflow.core.batches import Batch
from selectflow.core.params import Params
from selectflow.core.passes import check_finite
from selectflow.strategies.training import Training
from selectflow.strategies.weighting import Weights


@dataclass(frozen=True)
class Candidates:
    """A pool before selection, and what a strategy may ask about it; only that is computed.

    Attributes:
        pool: the batch of P candidates.
        size: P.
        losses: call for the loss of each at the present parameters, shape (P,).
        influence: call for -gamma . grad loss_z of each, shape (P,): the predicted rise of the
            target loss if the example were removed; positive = it helps.
        slopes: call with a direction, `Params` of all or some of the parameters, for the derivative
            of each loss along it, shape (P,): two forward passes, no gradient of an example.
        generator: the selector's own random numbers, on the CPU.
        training: the model, its optimizer and target as they are, for what else there is to ask.
    """

    pool: Batch
    size: int
    losses: Callable[[], Tensor]
    influence: Callable[[], Tensor]
    slopes: Callable[[Params], Tensor]
    generator: torch.Generator
    training: Training


Strategy = Callable[[Candidates], Tensor]
"""Candidates -> scores, shape (P,); larger is kept first."""


def checked_scores(scores: Tensor, size: int, pool: Batch, *, are_finite: bool = False) -> Tensor:
    """What a strategy gave, where it is.

    Args:
        scores: what it gave.
        size: examples of the pool.
        pool: the candidates.
        are_finite: whether that is known, so that nothing is read from the device.

    Raises:
        ValueError: not one score for each of the `size` examples of the pool.
        FloatingPointError: one that is not finite; names the examples.
    """
    scores = scores.detach()
    if scores.shape != (size,):
        raise ValueError(
            f"strategy must return one score per example, shape ({size},), "
            f"got {tuple(scores.shape)}"
        )
    if not are_finite:
        check_finite("scores", scores, pool)
    # ranks, yes or no: float64, which not every device has
    return scores if scores.is_floating_point() else scores.cpu().double()


class _OnHost:
    """A tensor that may be on a device, and is copied to the CPU when it is first looked at."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, owner: object, _: type) -> Tensor | None:
        found: Tensor | None = vars(owner)[self._name]
        if found is not None and found.device.type != "cpu":
            found = vars(owner)[self._name] = found.cpu()
        return found

    def __set__(self, owner: object, value: Tensor | None) -> None:
        vars(owner)[self._name] = value


@dataclass(frozen=True)
class Selection:
    """What was kept of one pool, and why.

    Indices, scores and losses are where they were found until they are looked at: a step that looks
    at none does not wait for the device.

    Attributes:
        pool: the candidates, as given; while nothing is selected, the part of them that is handed
            out.
        indices: positions kept in the pool, best first, shape (B,), int64, on the CPU.
        scores: score of every candidate, shape (P,), on the CPU; larger is kept first. For
            `influence`: target loss per unit of example weight, positive = it helps. None where
            nothing was selected: `score_every` leaves the step out, or control found that plain
            training gains more in the same time.
        losses: loss of every candidate at the present parameters, shape (P,), on the CPU; None
            where the strategy did not need it. Of the scorer, where there is one.
        step: optimizer updates made before this batch is trained on.
        horizon: updates that the sensitivity in use looked ahead; None without a look-ahead.
        age: optimizer updates since that look-ahead.
        interval: optimizer steps that a look-ahead serves now, under `interval="auto"`; else None.
        target_loss: mean target loss at the end of its rollout, of the scorer where there is one;
            None without a look-ahead.
        lookahead_s: seconds of the look-ahead made for this pool, 0 where none was due.
        seconds: seconds of the whole selection, look-ahead and control included.
        control_s: seconds that the controller took.
        lr_multiplier: of the learning rate of the user's schedule, in the step to come.
        decisions: what the controller decided before this selection, with its reasons.
        score_error: relative error of the scores that the last check of central differences found;
            0 for exact derivatives, None where nothing was differentiated.
        is_ranked: whether the scores tell examples apart: not under `uniform`, nor where all
            sensitivities are 0.
        scorer_loss: mean loss of the scorer's last step, over what was kept; None without one.
        scorer_gain: how much lower, relative, the trained model's target loss ends a few steps on
            by the scorer's choice than by chance; None but where that was measured.
        weighing: has the weights.
    """

    pool: Batch
    indices: Tensor
    scores: Tensor | None
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
    score_error: float | None = None
    is_ranked: bool = True
    scorer_loss: float | None = None
    scorer_gain: float | None = None
    interval: int | None = None
    weighing: Weights | None = None

    @property
    def weights(self) -> Tensor | None:
        """Weights of the kept examples, in the order of `indices`, shape (B,), of mean 1.

        On the model's device, to be trained with: `(weights * losses).mean()`. All are 1 where no
        score is positive, or nothing was selected. None under `weighting="none"`.
        """
        if self.weighing is None:
            return None
        self.weighing.is_read = True
        return self.weighing.values


for _name in ("indices", "scores", "losses"):
    setattr(Selection, _name, _OnHost(_name))
