"""Weights of what is kept, and whether they are trained with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.core.batches import Batch, weighted
from selectflow.core.lookahead import Weighting
from selectflow.core.params import Params
from selectflow.core.weighted import relu_weights

_log = logging.getLogger(__name__)


@dataclass
class Weights:
    """Weights of the kept examples of one pool.

    Attributes:
        values: shape (B,), of mean 1.
        is_read: whether they were asked for, or need not be, as they are all 1.
    """

    values: Tensor
    is_read: bool = False


class Weighing:
    """Gives what is kept its weights, and sees that they are trained with.

    Args:
        weighting: by which rule.
        params: gives the trained parameters, on whose device weights are.
    """

    def __init__(self, weighting: Weighting, params: Callable[[], Params]) -> None:
        self._weighting, self._params = weighting, params
        self._last: tuple[int, Weights] | None = None  # and the step that they are for
        self._is_equal_said = False

    def weights(self, scores: Tensor, step: int) -> Weights | None:
        """Weights of examples, by their scores, shape (B,), in the update after `step`.

        Scores that are all 0 say nothing, as where nothing was selected.
        """
        if self._weighting == "none":
            return None
        scores = scores.cpu()  # few numbers, of which several things are asked
        found = relu_weights(scores)
        if not self._is_equal_said and scores.any() and not (scores > 0).any():
            self._is_equal_said = True
            _log.info("step %d: no score is positive, so that each example has weight 1", step)
        like = next(iter(self._params().values()))
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        made = Weights(found.to(like.device, dtype), is_read=bool((found == 1).all()))
        self._last = step, made
        return made

    def forget(self) -> None:
        """Begin anew, as where training goes on from a saved state."""
        self._last = None

    def check(self, step: int) -> None:
        """See, once `step` updates are made, that nobody forgot the weights.

        Raises:
            ValueError: an update was made whose weights were not asked for.
        """
        if self._last is None:
            return
        before, last = self._last
        if step > before and not last.is_read:
            raise ValueError(
                f"weights must be trained with when weighting is not 'none', got optimizer step "
                f"{before} without; take (selector.last.weights * losses).mean() as the loss"
            )


def weighed(kept: Batch, weights: Weights | None) -> Batch:
    """What was kept, weighted as it is to be trained on."""
    return weighted(kept, None if weights is None else weights.values)
