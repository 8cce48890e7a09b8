"""Horizon control: contests of two horizons from the live state, for the controller to judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from selectflow.control.rules import AutoHorizon, Decision, HorizonRule
from selectflow.core.batches import Batch, num_examples, num_kept
from selectflow.core.nominal import random_order
from selectflow.core.policy import Outlook, Policy
from selectflow.core.proxy import probe
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import selection


class HorizonControl:
    """Decides the horizon of each look-ahead from contests every so many steps.

    Both policies of a contest start from the live state and meet the same pools to come, which are
    peeked at and trained on later. The live model never moves.

    Args:
        settings: of the control.
        policy: how examples are chosen.
        optimizer: read for its state and the updates to come.
        seed: of the nominal batches of contests.
    """

    def __init__(
        self, settings: AutoHorizon, policy: Policy, optimizer: OptimizerReader, seed: int
    ) -> None:
        self._settings, self._policy, self._optimizer = settings, policy, optimizer
        self._rule = HorizonRule(settings)
        self._generator = torch.Generator().manual_seed(seed)
        self._next = settings.gap  # optimizer step of the next contest; moments are empty at first

    @property
    def largest(self) -> int:
        """Updates whose pools are peeked at, at the most."""
        longest = self._settings.largest
        return self._num_steps(longest) + longest

    def at(self, step: int) -> int:
        """The present horizon."""
        del step
        return self._rule.horizon

    def is_due(self, step: int) -> bool:
        """Whether a contest is to be held now."""
        return step >= self._next and len(self._settings.ladder) > 1

    def num_updates(self) -> int:
        """Updates whose pools the next contest needs."""
        longer = max(self._rule.rival(), self._rule.horizon)
        return self._num_steps(longer) + longer

    def contest(self, step: int, pools: Sequence[Batch], target: Batch) -> Decision | None:
        """Hold a contest and decide; None where the pools do not last for one.

        Args:
            step: optimizer updates made.
            pools: the pools to come, the present one first.
            target: batch whose mean loss is the target, as it is scored.
        """
        num_updates = self.num_updates()
        if len(pools) < num_updates * self._policy.pools_per_update:
            self._next = step + self._rule.gap  # near the end of the stream
            return None
        present, rival = self._rule.horizon, self._rule.rival()
        longer = max(present, rival)
        updates, state = self._optimizer.updates(num_updates), self._optimizer.state()
        outlook = Outlook(updates, state, pools, target)
        losses, seconds = {}, {}
        for horizon in sorted((present, rival)):
            losses[horizon], seconds[horizon] = self._loss(
                horizon, outlook, self._num_steps(longer)
            )
        measures = self._trust(longer, outlook)  # two horizons differ: the longer is above 0
        decision = self._rule.decide(rival, losses, seconds, measures)
        self._next = step + self._rule.gap
        return decision

    def _num_steps(self, longer: int) -> int:
        return max(self._settings.contest_steps, longer)

    def _loss(self, horizon: int, outlook: Outlook, num_steps: int) -> tuple[float, float]:
        """Target loss after a policy's steps, infinite where they diverge; seconds of a step."""
        try:
            end, seconds = self._policy.roll(horizon, outlook, self._generator, num_steps)
            losses = self._policy.derivatives.losses(end.params, outlook.target)
        except FloatingPointError:
            return math.inf, math.nan
        return losses.mean().item(), seconds

    def _trust(self, horizon: int, outlook: Outlook) -> Mapping[str, float]:
        """First and second order of the whole selection over a window of `horizon` updates.

        With several pools to an update, the window is made from the first of each.
        """
        policy, (updates, state, pools, target) = self._policy, outlook
        window = pools[: horizon * policy.pools_per_update : policy.pools_per_update]
        try:
            ahead = policy.look_ahead(horizon, outlook, self._generator, num_sensitivities=horizon)
            selected = [
                policy.positions(gamma, state, pool)
                for gamma, pool in zip(ahead.sensitivities, window, strict=True)
            ]
            order = random_order(self._generator)
            nominal = [
                order(index, state, pool)[: num_kept(policy.keep, num_examples(pool))]
                for index, pool in enumerate(window)
            ]
            change = selection(window, nominal, [index.cpu() for index in selected])
            found = probe(
                policy.derivatives, updates[:horizon], state, change, target, horizons={horizon}
            )
        except FloatingPointError:
            return {}
        return {
            "proxy_first_order": found.first[-1],
            "proxy_second_order": found.second[-1],
            "relative_error": found.relative_error[-1],
            "trust_ratio": found.trust_ratio[-1],
        }

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on."""
        return {
            "rule": self._rule.state_dict(),
            "generator": self._generator.get_state(),
            "next": self._next,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._rule.load_state_dict(state["rule"])
        self._generator.set_state(state["generator"])
        self._next = state["next"]
