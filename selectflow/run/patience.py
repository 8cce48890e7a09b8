"""Early stopping: when a run ends as its target loss falls no more, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selectflow.core.wrappers import unwrap


class Patience:
    """The weights with the lowest target loss so far.

    Args:
        limit: evaluations in a row without a lower loss after which the run is over.

    Attributes:
        step: where the loss was lowest; None before the first finite one.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._lowest, self._since = limit, math.inf, 0
        self.step: int | None = None
        self._weights: dict[str, Tensor] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self._since >= self._limit

    def add(self, step: int, loss: float, model: nn.Module) -> None:
        """Take an evaluation into account; a loss that is not a number is not lower."""
        if loss < self._lowest:
            self.step, self._lowest, self._since = step, loss, 0
            state = unwrap(model).state_dict()
            self._weights = {name: value.detach().clone() for name, value in state.items()}
        else:
            self._since += 1

    def put_back(self, model: nn.Module) -> None:
        """Give the model the weights, and buffers, that it had where the loss was lowest."""
        if self._weights:
            unwrap(model).load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on."""
        names = ("step", "_lowest", "_since", "_weights")
        return {name.lstrip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`."""
        self.step, self._lowest, self._since = state["step"], state["lowest"], state["since"]
        self._weights = dict(state["weights"])
