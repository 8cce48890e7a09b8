"""Training in simulation from the live state, by selection or without, as a judge sees it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from selectflow.control.ladder import OFF
from selectflow.core.batches import Batch, num_examples
from selectflow.core.clock import work_s
from selectflow.core.lookahead import Policy, Upcoming
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.torch_optim import OptimizerReader
from selectflow.distributed import Group

_Kind = TypeVar("_Kind")


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

    def losses(self, params: Params, judge: Batch) -> Tensor:
        """Losses of a batch's examples, shape (N,); all infinite where any is not finite."""
        derivatives = self.trained.policy.derivatives
        try:
            with derivatives.group.together():
                return derivatives.losses(params, judge)
        except FloatingPointError:
            return _diverged(judge)

    def judged(
        self, rung: int, pools: Sequence[Batch], target: Batch, judge: Batch, num: int
    ) -> Tensor | None:
        """Losses of the judge's examples, shape (N,), at the mean of the states of some steps.

        The mean, since the noise of steps moves each of them: what selects has less of it, by which
        it seems better than it is after few steps (Polyak and Juditsky 1992).

        Args:
            rung: the horizon of selection, or `OFF`.
            pools: that come next.
            target: batch whose mean loss is selected by.
            judge: batch that is looked at.
            num: steps, >= 1.

        Returns:
            Infinite losses where training diverged; None where the pools do not last for the steps.
        """
        policy = self.trained.policy
        if rung == OFF:
            future = self.trained.upcoming(num, pools, target)
            states: Iterator[State] = policy.train(future, self._generator)
        else:
            states = self._selected(rung, num + rung, pools, target)
        try:
            done, mean = 0, Params()
            for done, state in enumerate(islice(states, num), start=1):
                mean = mean.toward(state.params, 1 / done) if mean else state.params
        except FloatingPointError:
            return _diverged(judge)
        return self.losses(mean, judge) if done == num else None

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


def compared(losses: Mapping[_Kind, Tensor], group: Group) -> tuple[dict[_Kind, float], float]:
    """Means of two kinds of losses, as of two rungs, and the standard error of their difference.

    That is infinite of a single example.

    Args:
        losses: both of shape (N,), of the same examples; in each process of its own.
        group: of the processes.
    """
    one, other = (each.cpu().double() for each in losses.values())
    apart = one - other
    sums = torch.stack([x.sum() for x in (torch.ones_like(one), one, other, apart, apart**2)])
    num, *totals, squares = group.sum(sums).tolist()
    variance = (squares - totals[-1] ** 2 / num) / (num - 1) if num > 1 else math.inf
    means = dict(zip(losses, (total / num for total in totals[:2]), strict=True))
    return means, math.sqrt(max(0.0, variance) / num)


def _diverged(judge: Batch) -> Tensor:
    return torch.full((num_examples(judge),), math.inf, dtype=torch.float64)
