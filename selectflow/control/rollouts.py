"""Training in simulation from the live state, by selection or without, as a judge sees it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from selectflow.control.ladder import OFF
from selectflow.core.batches import Batch
from selectflow.core.clock import work_s
from selectflow.core.lookahead import Policy, Upcoming
from selectflow.core.optim import State
from selectflow.core.torch_optim import OptimizerReader


class Simulated(NamedTuple):
    """A model that is rolled out.

    Attributes:
        policy: how examples are chosen with it.
        optimizer: read for its state and the updates to come.
    """

    policy: Policy
    optimizer: OptimizerReader

    def upcoming(self, num: int, pools: Sequence[Batch], target: Batch) -> Upcoming:
        """Its live state, and the next `num` updates on these pools."""
        return Upcoming(self.optimizer.updates(num), self.optimizer.state(), pools, target)


class Rollouts:
    """Rolls a model out from its live state, on what it or its scorer would choose.

    To be used within `Objective.scoring` of both. The live models never move.

    Args:
        trained: the model that is trained, and judged.
        scoring: the model that chooses: the same, or its scorer.
        generator: of nominal batches, and of the order of parts.

    Attributes:
        times: seconds of selecting and of training in each step of the last rollout that selected.
    """

    def __init__(self, trained: Simulated, scoring: Simulated, generator: torch.Generator) -> None:
        self.trained, self.scoring, self._generator = trained, scoring, generator
        self.times: list[tuple[float, float]] = []

    def loss(self, state: State, judge: Batch) -> float:
        """Mean loss of a batch at a state of the trained model.

        Raises:
            FloatingPointError: it is not finite.
        """
        return self.trained.policy.derivatives.mean_loss(state.params, judge)

    def losses(
        self,
        rung: int,
        pools: Sequence[Batch],
        target: Batch,
        judge: Batch,
        rounds: int,
        steps: float,
    ) -> list[float]:
        """Losses of the judge after each round of so many steps, infinite once it diverged.

        Args:
            rung: the horizon of selection, or `OFF`.
            pools: that come next; where they do not last for a round, it is left out.
            target: batch whose mean loss is selected by.
            judge: batch that is looked at.
            rounds: readings.
            steps: between two readings; rounded, so that their sum is right.
        """
        num = math.ceil(rounds * steps) + max(0, rung)
        if rung == OFF:
            states = self._plain(self.trained.upcoming(num, pools, target))
        else:
            states = self._selected(rung, num, pools, target)
        losses: list[float] = []
        done = 0
        try:
            for number in range(1, rounds + 1):
                todo = round(number * steps) - done
                last = deque(islice(states, todo), maxlen=1)
                if not last:  # the pools do not last for this round
                    break
                done += todo
                losses.append(self.loss(last[0], judge))
            states.close()
        except FloatingPointError:
            losses += [math.inf] * (rounds - len(losses))
        return losses

    def _plain(self, future: Upcoming) -> Generator[State]:
        yield from self.trained.policy.train(future, self._generator)

    def _selected(
        self, horizon: int, num: int, pools: Sequence[Batch], target: Batch
    ) -> Generator[State]:
        """The states of the trained model; its scorer, if it has one, is trained beside it."""
        trained, scoring = self.trained, self.scoring
        choosing = scoring.upcoming(num, pools, target)
        future = choosing if trained is scoring else trained.upcoming(num, pools, target)
        device, self.times = choosing.state.params.device, []
        began = work_s(device)
        steps = scoring.policy.select_and_train(horizon, choosing, self._generator)
        for state, kept, seconds in steps:
            if trained is scoring:
                after, select_s = state, seconds
            else:  # all of what the scorer does is a part of selecting
                select_s = work_s(device) - began
                future = trained.policy.trained(future, kept)
                after = future.state
            self.times.append((select_s, work_s(device) - began - select_s))
            yield after
            began = work_s(device)
