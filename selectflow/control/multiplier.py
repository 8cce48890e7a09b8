"""The learning-rate multiplier, in the optimizer's own steps.

It acts inside `optimizer.step()` alone, by the optimizer's own step hooks: between steps every
group shows the learning rate of the user's schedule, whatever schedule that is, and a rate that the
user sets by hand is multiplied like any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from selectflow.core.torch_optim import OptimizerReader


class StepMultiplier:
    """Multiplies the learning rates of an optimizer for the time of each of its steps.

    The latest one of an optimizer is the only one that does.
    """

    def __init__(self, optimizer: OptimizerReader) -> None:
        self._reader = optimizer
        self._rates: list[Any] = []
        before = _LATEST.get(optimizer.optimizer, lambda: None)()
        if before is not None:  # as of a selector left behind
            before.remove()
        # once its control is gone, the optimizer is as it was
        me = _LATEST[optimizer.optimizer] = weakref.ref(self)

        def scale(optimizer: Optimizer, *_: Any) -> None:
            if (found := me()) is not None:
                found._scale(optimizer)

        def put_back(optimizer: Optimizer, *_: Any) -> None:
            if (found := me()) is not None:
                found._restore(optimizer)

        self._hooks = (
            optimizer.optimizer.register_step_pre_hook(scale),
            optimizer.optimizer.register_step_post_hook(put_back),
        )
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)

    def remove(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _scale(self, optimizer: Optimizer) -> None:
        self._restore(optimizer)  # after a step that raised
        if self._reader.lr_multiplier != 1.0:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self._reader.lr_multiplier

    def _restore(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []


_LATEST: weakref.WeakKeyDictionary[Optimizer, Callable[[], StepMultiplier | None]]
_LATEST = weakref.WeakKeyDictionary()
