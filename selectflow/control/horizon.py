"""The horizon of each look-ahead: a constant, a schedule, or the winner of contests.

A contest rolls two policies out from the live state, over the same pools, which are peeked at and
trained on later. The live model never moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, Protocol

import torch

from selectflow.control.rules import AutoHorizon, Decision, HorizonRule, restore, state_of
from selectflow.core.batches import Batch, num_examples, num_kept
from selectflow.core.counts import as_count
from selectflow.core.lookahead import Policy, Upcoming, random_order
from selectflow.core.proxy import probe
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import selection

Points = Sequence[tuple[int, int]]


class Horizon(Protocol):
    """Decides how far a look-ahead looks; asked once for each, when it is due."""

    @property
    def largest(self) -> int:
        """The largest horizon there will be: bounds the pools that are peeked at."""
        ...

    def at(self, step: int) -> int:
        """Horizon, >= 0, of a look-ahead made after `step` optimizer updates."""
        ...


@dataclass(frozen=True)
class HorizonSchedule:
    """The horizon of every optimizer step, given at some of them.

    Args:
        points: (step, horizon) pairs, steps rising from 0, horizons >= 0. Before the first step
            of the next pair the horizon is held; after the last pair too.
        shape: "step" holds each horizon until the next; "linear" goes there in equal parts,
            rounded to the nearest integer, halves up.

    Raises:
        ValueError: no pairs, steps that do not rise from 0, a horizon that is no integer >= 0.
    """

    points: Points
    shape: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        points = tuple(
            (as_count("step of a horizon schedule", step, 0), as_count("horizon", horizon, 0))
            for step, horizon in self.points
        )
        object.__setattr__(self, "points", points)
        steps = [step for step, _ in self.points]
        if not steps or steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"steps of a horizon schedule must rise from 0, got {steps}")
        if self.shape not in ("step", "linear"):
            raise ValueError(f"shape must be 'step' or 'linear', got {self.shape!r}")

    @property
    def largest(self) -> int:
        return max(horizon for _, horizon in self.points)

    def at(self, step: int) -> int:
        """The horizon after `step` >= 0 optimizer updates."""
        before, first = max(point for point in self.points if point[0] <= step)
        later = [point for point in self.points if point[0] > step]
        if not later or self.shape == "step":
            return first
        after, last = later[0]
        span = after - before
        # whole numbers, so that no rounding error decides between two horizons
        return (2 * (first * span + (last - first) * (step - before)) + span) // (2 * span)


def as_horizon(value: int | Horizon) -> Horizon:
    """A constant as the schedule that always gives it; anything else as it is.

    Raises:
        ValueError: neither an integer >= 0 nor an object that decides horizons.
    """
    if not isinstance(value, Integral) and hasattr(value, "at") and hasattr(value, "largest"):
        return value
    return HorizonSchedule([(0, as_count("horizon", value, 0))])


# --- contests -------------------------------------------------------------------------------------


@dataclass
class HorizonState:
    """What the next contests depend on.

    Attributes:
        rule: the horizon, and what contests said so far.
        next_step: optimizer step of the next contest.
        generator: of the nominal batches of contests.
    """

    rule: HorizonRule
    next_step: int
    generator: torch.Generator

    @classmethod
    def begin(cls, settings: AutoHorizon, seed: int) -> HorizonState:
        """The state of a run that begins: moments are empty, so the first contest comes later."""
        return cls(HorizonRule(settings), settings.gap, torch.Generator().manual_seed(seed))

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rule": state_of(self.rule),
            "generator": self.generator.get_state(),
            "next_step": self.next_step,
        }

    def load(self, plain: Mapping[str, Any]) -> None:
        """Go on from `plain`."""
        restore(self.rule, plain["rule"])
        self.generator.set_state(plain["generator"])
        self.next_step = plain["next_step"]


class HorizonControl:
    """Decides the horizon of each look-ahead from contests every so many steps.

    Args:
        state: what it decides from; is written to.
        policy: how examples are chosen.
        optimizer: read for its state and the updates to come.
    """

    def __init__(self, state: HorizonState, policy: Policy, optimizer: OptimizerReader) -> None:
        self.state, self._policy, self._optimizer = state, policy, optimizer

    @property
    def largest(self) -> int:
        """Updates whose pools are peeked at, at the most."""
        longest = self.state.rule.settings.largest
        return self._num_steps(longest) + longest

    def at(self, step: int) -> int:
        """The present horizon."""
        del step
        return self.state.rule.horizon

    def is_due(self, step: int) -> bool:
        """Whether a contest is to be held now."""
        return step >= self.state.next_step and len(self.state.rule.settings.ladder) > 1

    def num_updates(self) -> int:
        """Updates whose pools the next contest needs."""
        longer = max(self.state.rule.rival(), self.state.rule.horizon)
        return self._num_steps(longer) + longer

    def contest(
        self, step: int, pools: Sequence[Batch], next_target: Callable[[], Batch]
    ) -> Decision | None:
        """Hold a contest and decide; None where the pools do not last for one.

        Args:
            step: optimizer updates made.
            pools: the next pools, the present one first.
            next_target: gives batches whose mean loss is the target, as they are scored. By the
                first both horizons select, by the second they are judged: what one gains on the
                examples that it selects by is no merit where the target set has others.
        """
        rule, num_updates = self.state.rule, self.num_updates()
        if len(pools) < num_updates * self._policy.pools_per_update:
            self.state.next_step = step + rule.gap  # near the end of the stream
            return None
        present, rival = rule.horizon, rule.rival()
        longer = max(present, rival)
        updates, state = self._optimizer.updates(num_updates), self._optimizer.state()
        upcoming, judge = Upcoming(updates, state, pools, next_target()), next_target()
        losses, seconds = {}, {}
        for horizon in sorted((present, rival)):
            num_steps = self._num_steps(longer)
            losses[horizon], seconds[horizon] = self.loss_after(horizon, upcoming, num_steps, judge)
        measures = self.trust(longer, upcoming)  # two horizons differ: the longer is above 0
        decision = rule.decide(rival, losses, seconds, measures)
        self.state.next_step = step + rule.gap
        return decision

    def _num_steps(self, longer: int) -> int:
        return max(self.state.rule.settings.contest_steps, longer)

    def loss_after(
        self, horizon: int, upcoming: Upcoming, num_steps: int, judge: Batch
    ) -> tuple[float, float]:
        """Loss of `judge` after a policy's steps, infinite if they diverge; seconds of a step."""
        generator = self.state.generator
        try:
            end, seconds = self._policy.rollout(horizon, upcoming, generator, num_steps)
            return self._policy.derivatives.mean_loss(end.params, judge), seconds
        except FloatingPointError:
            return math.inf, math.nan

    def trust(self, horizon: int, upcoming: Upcoming) -> Mapping[str, float]:
        """First and second order of the whole selection over a window of `horizon` updates.

        With several pools to an update, the window is made from the first of each.
        """
        policy, (updates, state, pools, target) = self._policy, upcoming
        generator = self.state.generator
        window = pools[: horizon * policy.pools_per_update : policy.pools_per_update]
        try:
            ahead = policy.look_ahead(horizon, upcoming, generator, num_sensitivities=horizon)
            selected = [
                policy.positions(gamma, state, pool)
                for gamma, pool in zip(ahead.sensitivities, window, strict=True)
            ]
            order = random_order(generator)
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
