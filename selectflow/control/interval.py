"""How long a sensitivity serves: rank correlations of a pool's scores in, an interval out.

Scores change as training moves on. Those by a sensitivity of age a are worth, of fresh ones,

    worth(a) = c(a) / c(0) = exp(-d a)

where c(a) is the rank correlation, over one pool, of scores by the old sensitivity with scores by a
fresh one of other target examples. Those of two fresh ones of different target batches do not agree
either, c(0) < 1, since a batch is a sample; without that share, an interval would be short only
because target batches are small. The decay d is fitted to what was measured, by least squares, the
newest with the largest weight.

Costs are counted in passes of the model over one example: a training step on k kept examples takes
3 k, scores of n candidates 2 n, and a look-ahead of H updates 3 T + 9 H k, for T target examples,
and in each update a gradient and a product with the Hessian (3 H k without curvature). Passes of a
scorer count by its size. The interval K is the one with the most worth for its cost,

    max over K of  sum of exp(-d j) for j < K  /  (K (3 k + 2 n) + 3 T + 9 H k)

among 1, 2, 4, ..., and moves by one of these at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectflow.control.rollouts import Simulated
from selectflow.control.rules import Decision, restore, state_of
from selectflow.core.batches import Batch, num_examples, num_kept
from selectflow.core.params import Params

LARGEST = 8  # beyond, a look-ahead is a small part of the cost, and selection by old ones failed
_FIRST_GAP, _LONGEST_GAP = 32, 256  # optimizer steps between two measurements
_NUM_FIRST = 3  # measurements before the first change: one is of few examples
_REMEMBERED, _FADES = 16, 0.8  # measurements, and the weight of each beside the one after it
_AGREE = 0.1  # rank correlation of fresh sensitivities below which nothing can be said
_DECAYS = (0.0, *(1e-3 * 1.15**power for power in range(60)))  # up to 3.8 a step


@dataclass(frozen=True)
class Turning:
    """How far scores of one pool have changed.

    Attributes:
        age: optimizer steps of the old sensitivity.
        old: rank correlation of its scores with fresh ones of another target batch.
        fresh: the same of two fresh ones, of different target batches.
    """

    age: int
    old: float
    fresh: float


class Costs(NamedTuple):
    """Passes of the trained model over one example.

    Attributes:
        step: of a training step and the scores of its pool.
        ahead: of a look-ahead.
    """

    step: float
    ahead: float


def decay(measured: Sequence[Turning]) -> float | None:
    """The rate d at which scores change, per step; None where fresh ones do not agree.

    Args:
        measured: one or more, the newest last.
    """
    weights = [_FADES ** (len(measured) - 1 - index) for index in range(len(measured))]
    total = sum(weights)
    agree = sum(w * one.fresh for w, one in zip(weights, measured, strict=True)) / total
    if agree < _AGREE:
        return None

    def misfit(rate: float) -> float:
        return sum(
            w * (one.old - agree * math.exp(-rate * one.age)) ** 2
            for w, one in zip(weights, measured, strict=True)
        )

    return min(_DECAYS, key=misfit)


def worth_per_cost(interval: int, rate: float, costs: Costs) -> float:
    """What an interval brings for what it costs, as the module's text says."""
    worth = sum(math.exp(-rate * age) for age in range(interval))
    return worth / (interval * costs.step + costs.ahead)


@dataclass
class IntervalState:
    """What the next measurements depend on.

    Attributes:
        interval: K, optimizer steps between two look-aheads.
        next_at: optimizer step of the next measurement.
        gap: steps from that to the one after it; doubles while the interval stays.
        measured: the newest last.
    """

    interval: int = 1
    next_at: int = _FIRST_GAP
    gap: int = _FIRST_GAP
    measured: list[tuple[int, float, float]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return state_of(self)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from `plain`."""
        restore(self, saved)

    def decide(self, step: int, found: Turning, costs: Costs) -> Decision:
        """Choose the interval, from what was measured so far.

        Args:
            step: optimizer updates made.
            found: the newest measurement.
            costs: with the present pool and horizon.
        """
        self.measured.append((found.age, found.old, found.fresh))
        del self.measured[:-_REMEMBERED]
        before, rate = self.interval, decay([Turning(*each) for each in self.measured])
        measures = {"rank_of_old": found.old, "rank_of_fresh": found.fresh, "age": float(found.age)}
        if rate is None:
            reason = (
                f"fresh scores by two target batches do not agree (rank correlation "
                f"{found.fresh:.2f}); larger target batches would help"
            )
        else:
            if len(self.measured) >= _NUM_FIRST:
                near = sorted({max(1, before // 2), before, min(LARGEST, 2 * before)})
                self.interval = max(near, key=lambda k: worth_per_cost(k, rate, costs))
            measures["decay"] = rate
            reason = (
                f"scores by a sensitivity {found.age} steps old rank the pool as fresh ones do at "
                f"{found.old:.2f}, where two fresh ones agree at {found.fresh:.2f}"
            )
        is_settled = self.interval == before and len(self.measured) >= _NUM_FIRST
        self.gap = min(2 * self.gap, _LONGEST_GAP) if is_settled else _FIRST_GAP
        self.next_at = step + self.gap
        return Decision("interval", before, self.interval, reason, measures)


class IntervalControl:
    """Measures now and then how scores change, and says how long a look-ahead serves.

    Args:
        state: what it decides from; is written to.
        trained: the model that is trained.
        scoring: the model that scores: the same, or its scorer.
    """

    def __init__(self, state: IntervalState, trained: Simulated, scoring: Simulated) -> None:
        self.state, self._trained, self._scoring = state, trained, scoring
        self._group = trained.policy.derivatives.group

    def is_due(self, step: int) -> bool:
        """Whether the look-ahead before the update after `step` is one to measure at."""
        return step >= self.state.next_at

    def measure(
        self,
        step: int,
        old: tuple[Params, int],
        fresh: tuple[Tensor, int],
        pools: Sequence[Batch],
        target: Batch,
        generator: torch.Generator,
        *,
        is_other: bool,
    ) -> Decision | None:
        """Measure how scores have changed, and decide.

        To be called within `Objective.scoring` of the model that scores.

        Args:
            step: optimizer updates made.
            old: the sensitivity that served until now, and its age in updates.
            fresh: scores of the present pool, shape (P,), by a new look-ahead, and its horizon H.
            pools: the present pool and those after it, of H updates.
            target: a batch of the target.
            generator: chooses the nominal batches.
            is_other: whether it is another batch than the new look-ahead's; else two fresh
                sensitivities are taken to agree.

        Returns:
            None where scores are all the same, or not finite.
        """
        state, policy = self.state, self._scoring.policy
        state.next_at, found = step + state.gap, None
        (gamma, age), (scores, horizon) = old, fresh
        with suppress(FloatingPointError), self._group.together():
            upcoming = self._scoring.upcoming(max(1, horizon), pools, target)
            agree = 1.0
            if is_other:
                other = policy.look_ahead(horizon, upcoming, generator).gamma(0)
                agree = rank_correlation(policy.scores(other, upcoming.state, pools[0]), scores)
            found = rank_correlation(policy.scores(gamma, upcoming.state, pools[0]), scores), agree
        if found is None:
            return None
        cost = self._costs(pools[0], target, horizon)
        means = self._group.mean(torch.tensor([*found, *cost], dtype=torch.float64)).tolist()
        if not all(map(math.isfinite, means)):
            return None
        return state.decide(step, Turning(age, *means[:2]), Costs(*means[2:]))

    def _costs(self, pool: Batch, target: Batch, horizon: int) -> Costs:
        policy, size = self._scoring.policy, num_examples(pool)
        per, kept = policy.pools_per_update, num_kept(policy.keep, size)
        scorer, model = (
            sum(param.numel() for param in each.optimizer.params().values())
            for each in (self._scoring, self._trained)
        )
        updates = (3 if policy.curvature == "none" else 9) * horizon * per * kept
        relative = scorer / model
        step = per * (3 * kept + relative * 2 * size)
        return Costs(step, relative * (3 * num_examples(target) + updates))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of scores of one pool, each of shape (P,); NaN where one says nothing."""
    from scipy.stats import spearmanr  # noqa: PLC0415  half a second to import

    if not all(bool((scores != scores[0]).any()) for scores in (a, b)):
        return math.nan
    return float(spearmanr(a.cpu(), b.cpu()).statistic)
