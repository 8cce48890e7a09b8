"""The sensitivities that pools are scored with: of the last look-ahead, until the next is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selectflow.core.batches import Batch
from selectflow.core.lookahead import LookAhead
from selectflow.core.lookahead_state import plain, restored
from selectflow.core.params import Params
from selectflow.core.policy import Outlook, Policy
from selectflow.core.torch_optim import OptimizerReader

_RECHECK_EVERY = 100  # look-aheads between two checks that central differences still agree


class Sensitivities:
    """Keeps a look-ahead for as many optimizer steps as it serves.

    Args:
        policy: makes the look-aheads; its interval says for how long one serves.
        optimizer: whose updates and state they begin with.
        generator: chooses their nominal batches.

    Attributes:
        ahead: the last look-ahead; None: the next pool needs one.
    """

    def __init__(
        self, policy: Policy, optimizer: OptimizerReader, generator: torch.Generator
    ) -> None:
        self._policy, self._optimizer, self._generator = policy, optimizer, generator
        self.ahead: LookAhead | None = None
        self._serves = 0  # steps that it may be used for
        self._refreshed_at = 0  # optimizer step of the last look-ahead
        self._num_lookaheads = 0

    def is_due(self, step: int) -> bool:
        """Whether there is no look-ahead that serves the update after `step`.

        One of other parameters does not: some were frozen since, or trained again.
        """
        if self.ahead is None or not 0 <= self.age(step) < self._serves:
            return True
        names = self._policy.names() or self._optimizer.params()
        return self.ahead.sensitivities[0].keys() != set(names)

    def age(self, step: int) -> int:
        """Optimizer steps since the last look-ahead."""
        return step - self._refreshed_at

    def at(self, step: int) -> Params:
        """Gamma for the update after `step`; beyond the last horizon, the last one there is."""
        assert self.ahead is not None
        gammas = self.ahead.sensitivities
        return gammas[min(self.age(step), len(gammas) - 1)]

    def refresh(self, horizon: int, step: int, pools: Sequence[Batch], target: Batch) -> None:
        """Look ahead from `step`.

        Args:
            horizon: H, >= 0.
            step: optimizer steps taken so far.
            pools: the pools to come, the present one first.
            target: batch whose mean loss is the target, as it is scored.
        """
        self.ahead = None  # its memory is of use now; should this fail, the next call looks ahead
        if self._num_lookaheads % _RECHECK_EVERY == 0:
            self._policy.derivatives.recheck()
        updates, state = self._optimizer.updates(max(1, horizon)), self._optimizer.state()
        outlook = Outlook(updates, state, pools, target)
        self._take(self._policy.look_ahead(horizon, outlook, self._generator))
        self._refreshed_at = step
        self._num_lookaheads += 1

    def _take(self, ahead: LookAhead | None) -> None:
        self.ahead, self._serves = ahead, self._policy.interval
        if ahead and not any(gamma.norm() for gamma in ahead.sensitivities):
            # At a learning rate of 0, as where a warm-up begins, no example does anything. The
            # steps that follow are to have sensitivities of their own.
            self._serves = 1

    def state_dict(self) -> dict[str, Any]:
        """What the next selections depend on."""
        return {
            "refreshed_at": self._refreshed_at,
            "num_lookaheads": self._num_lookaheads,
            "ahead": self.ahead and plain(self.ahead),
        }

    def load_state_dict(self, state: dict[str, Any], params: Params) -> None:
        """Continue from `state_dict`; `params` are the parameters that scores are taken over."""
        self._take(state["ahead"] and restored(state["ahead"], params))
        self._refreshed_at = state["refreshed_at"]
        self._num_lookaheads = state["num_lookaheads"]
