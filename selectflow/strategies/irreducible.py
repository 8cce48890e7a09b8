"""Reducible holdout loss: what an example still has to teach, by a model of the target set.

Of a noisy label no training on clean examples lowers the loss, of what is learnt already there is
none left. Both have a small difference of the loss now and the irreducible loss, that of a model
which was trained on the target set alone. The difference is the score.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.counts import is_count
from selectflow.core.optim import AdamW, State
from selectflow.core.params import Params
from selectflow.core.update import Update
from selectflow.strategies.training import Memory, Training

if TYPE_CHECKING:
    from selectflow.strategies.candidates import Candidates

_log = logging.getLogger(__name__)

_NAME = "irreducible"  # in the memory of strategies


@dataclass(frozen=True)
class ReducibleLoss:
    """RHO-LOSS (Mindermann et al. 2022, arXiv 2206.07137, equation 3):

        score(z) = loss_z(theta) - loss_z(theta_il)

    theta_il, the irreducible-loss model, is trained at the first selection, and kept: the same
    architecture from the present parameters (of a fine-tuning: the pretrained ones), by AdamW on
    the target set. It trains as scoring sees the model, deterministic and with batch norm on its
    running statistics of that moment. An epoch after which the loss of the held-out part is not
    lower is taken back, and the next ones have a quarter of the learning rate: so the model is
    stopped early, and no rate is too large.

    Args:
        held_out: share of each target batch that is not trained on, in (0, 1).
        lr: learning rate of the first epoch.
        max_epochs: over the target set.
        patience: epochs that are taken back until it ends.
    """

    held_out: float = 0.2
    lr: float = 1e-3
    max_epochs: int = 100
    patience: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be in (0, 1), got {self.held_out!r}; try 0.2")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be > 0 and finite, got {self.lr!r}; try 1e-3")
        for name in ("max_epochs", "patience"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}")

    def __call__(self, candidates: Candidates) -> Tensor:
        training = candidates.training
        if _NAME not in training.memory:
            training.memory[_NAME] = self._fitted(training, candidates.generator)
        kept = training.memory[_NAME]
        return candidates.losses() - training.losses_at(kept["params"], kept["buffers"])

    def _fitted(self, training: Training, generator: torch.Generator) -> Memory:
        """The irreducible-loss model: its parameters, and the buffers that it was trained with."""
        parts = [self._split(batch, generator) for batch in training.target_set()]
        trained, held_out = zip(*parts, strict=True)
        params = training.optimizer.values().map(Tensor.clone)
        best = State(params, params.zeros_like(), params.zeros_like())
        lowest = training.mean_loss(params, held_out)
        lr, num_steps, num_taken_back = self.lr, 0, 0
        for _ in range(self.max_epochs):
            numbers = range(num_steps + 1, num_steps + len(trained) + 1)
            updates = [Update((_adamw(params, number, lr),)) for number in numbers]
            try:
                state = training.trained_on(trained, updates, best)
                loss = training.mean_loss(state.params, held_out)
            except FloatingPointError:  # the rate is far too large
                loss = math.inf
            if loss < lowest:
                best, lowest, num_steps = state, loss, num_steps + len(trained)
                continue
            lr, num_taken_back = lr / 4, num_taken_back + 1
            if num_taken_back == self.patience:
                break
        if not num_steps:
            _log.warning(
                "no epoch on the target set lowered the loss of its held-out part: the "
                "irreducible-loss model is the model as it is now"
            )
        return {"params": best.params, "buffers": training.buffers()}

    def _split(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, Batch]:
        """The part of a target batch that is trained on, and the held-out one, at random."""
        size = num_examples(batch)
        if size < 2:
            raise ValueError(
                f"target batches must hold at least 2 examples for 'rho', got {size}; one part of "
                "each is held out"
            )
        num = min(max(1, round(self.held_out * size)), size - 1)
        order = torch.randperm(size, generator=generator, device="cpu")
        return take(batch, order[num:]), take(batch, order[:num])


def _adamw(params: Params, step: int, lr: float) -> AdamW:
    return AdamW(tuple(params), step, lr, 0.9, 0.999, 1e-8, weight_decay=0.0)
