"""Contests: the horizon, or whether to select at all, by what training would gain in equal time.

A contest rolls two neighbours of the ladder out from the live state, over the same pools, which are
peeked at and trained on later. The live model never moves. Time is counted in plain steps: what a
selected step costs in those is measured here and in the user's loop, and held until it is another
by a quarter, so that a busy machine does not decide. What contests have cost is kept below a share
of what training has, but for the first ones, and twice that share where training has lost ground;
none is held for which too little training is left.

While nothing is selected, the target loss is looked at now and then, on one batch. As long as it
falls fast, plain training teaches, and a contest can wait; where it has risen, one is due. Where it
has jumped, selection begins at once: a contest from the bad state would say little. From then on it
is looked at under selection, too, and a contest with plain training is due where it has fallen far.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from selectflow.control.contest_state import HELD, NUM_TIMES, HorizonState
from selectflow.control.ladder import OFF, Outcome, named
from selectflow.control.rollouts import Rollouts, compared
from selectflow.control.rules import Decision
from selectflow.core.batches import Batch, num_examples, num_kept
from selectflow.core.clock import work_s
from selectflow.core.lookahead import Upcoming, random_order
from selectflow.core.proxy import probe
from selectflow.core.weight_changes import selection

NextTarget = Callable[[], Batch]
_log = logging.getLogger(__name__)

_LOOK_EVERY = 64  # plain steps between two looks at the target loss
_RISE = 0.2  # relative, of the target loss, that makes a contest due
_SURE = 2.0  # standard errors that it must have risen by
_JUMP, _CERTAIN = 0.5, 4.0  # the same, of a rise at which selection begins without a contest
_MANY = 32  # examples by which a jump is told: of fewer, errors are not known well enough
_DROP = 0.6  # relative, of the loss under selection after that: the stream may be good again
_FALL = 0.05  # relative, between two looks, for which it waits
_GUESS = 3.0  # plain steps that a gradient of the target and two passes of the pool may cost


class HorizonControl:
    """Decides the horizon of each look-ahead, or that there is none, from contests.

    Args:
        state: what it decides from; is written to.
        rollouts: of the model that is trained, by what scores.
        num_steps: optimizer steps of the run; None: not known.
    """

    def __init__(self, state: HorizonState, rollouts: Rollouts, num_steps: int | None) -> None:
        self.state, self._rollouts, self._policy = state, rollouts, rollouts.scoring.policy
        self._num_steps = math.inf if num_steps is None else num_steps
        self._settings = state.rule.settings
        self._left_at: float | None = None  # when the user's loop went on
        self._device = rollouts.trained.optimizer.values().device
        self._is_first = True  # whether this is the first batch of its optimizer step
        self._busy_s = 0.0  # of the present step of the user's loop, so far
        self._step_s = math.nan  # of a step of the user's loop, once it was measured
        self._is_told = False  # that no contest fits into the pools

    @property
    def largest(self) -> int:
        """Updates whose pools are peeked at, at the most."""
        return 2 * self._num_rounds(self._settings.largest) + self._settings.largest

    @property
    def may_be_off(self) -> bool:
        """Whether plain training competes."""
        return self._settings.off

    @property
    def is_off(self) -> bool:
        """Whether nothing is selected now."""
        return self.state.rule.horizon == OFF

    def at(self, step: int) -> int:
        """The present horizon."""
        del step
        return self.state.rule.horizon

    # --- what training costs --------------------------------------------------------------

    def enter(self, step: int) -> None:
        """Count the steps since the last call; the user's loop has just asked for a batch."""
        state = self.state
        num = step - state.last_step if state.last_step >= 0 else 0
        self._is_first, state.last_step = step != state.last_step, step
        state.training += num * self.step_cost
        if self._left_at is not None and self._is_timed():
            self._busy_s += work_s(self._device) - self._left_at  # micro-batches add up
            if num == 1:
                state.times.append(self._busy_s)
        if num:
            self._busy_s = 0.0

    def leave(self) -> None:
        """The user's loop goes on."""
        self._left_at = work_s(self._device) if self._is_timed() else None

    def _is_timed(self) -> bool:
        """Whether a contest is near: to wait for the device at every step would cost time."""
        near = 2 * NUM_TIMES * self.step_cost
        return self._settings.costs is None and self.state.training + near >= self._due_at()

    @property
    def step_cost(self) -> float:
        """Of a present step, in plain steps."""
        return self._cost(self.state.rule.horizon)

    def _cost(self, rung: int) -> float:
        """Of a step, in plain steps; a guess where it was not measured."""
        guess = guessed_cost(rung, self._policy.interval())
        return 1.0 if rung == OFF else self.state.costs.get(rung, guess)

    def _price(self, rival: int) -> float:
        """What a contest is expected to cost, in plain steps."""
        dear = max(self.state.rule.horizon, rival)
        return 2 * self._num_rounds(dear) * self._cost(dear) * self.state.overhead

    def _num_rounds(self, dear: int) -> int:
        return max(self._settings.contest_steps, dear)

    # --- contests -------------------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether a contest is to be held now, and may cost what it does."""
        return self._is_first and self.state.training >= self._due_at()

    def _due_at(self) -> float:
        """Cost of training at which the next contest is due and paid for; infinite: at none."""
        state, settings = self.state, self._settings
        if len(settings.ladder) == 1:
            return math.inf
        price = self._price(state.rule.rival())
        left = (self._num_steps - max(0, state.last_step)) * self.step_cost
        if price > settings.late_share * left:
            return math.inf
        return max(state.next_at, self._paid_at(price, state.is_urgent or state.has_jumped))

    def _paid_at(self, price: float, is_urgent: bool) -> float:
        """Cost of training at which a contest of this price is paid for."""
        settings, total = self._settings, (self.state.spent + price) / (2 if is_urgent else 1)
        known = 0.0 if math.isinf(self._num_steps) else settings.share * self._num_steps
        is_early = total <= max(settings.early, known)
        return total / (max(settings.share, settings.early_share) if is_early else settings.share)

    def alarm(self) -> None:
        """Training has lost ground: a contest is due, and contests may cost twice their share."""
        if self.state.training >= self._settings.gap:  # before, moments are hardly there
            self.state.is_urgent = True
            self.state.next_at = min(self.state.next_at, self.state.training)
            self.state.rule.gap = self._settings.gap

    @property
    def is_look_due(self) -> bool:
        """Whether the target loss is to be looked at.

        Now and then, while nothing is selected, or after it has jumped.
        """
        is_watched = self.is_off or self.state.has_jumped
        return is_watched and self.state.training >= self.state.next_look

    def look(self, next_target: NextTarget) -> Decision | None:
        """See how the target loss has changed; to be called within `Objective.scoring`.

        Returns:
            The decision to select, where the loss has jumped: what plain training does in the time
            of a contest is known then.
        """
        state = self.state
        state.next_look = state.training + _LOOK_EVERY
        if state.judge is None:
            state.judge, state.seen, state.best = next_target(), math.inf, None
        losses = self._now(state.judge)
        best = losses if state.best is None else state.best
        means, error = compared({"now": losses, "best": best}, self._policy.derivatives.group)
        loss, lowest = means["now"], means["best"]
        if not self.is_off:
            if lowest - loss > max(_DROP * abs(lowest), _CERTAIN * error):
                state.next_at, state.rule.upward, state.judge = state.training, False, None
            state.best = best  # of the first look since a contest
            return None
        # at a low loss a few examples make it rise and fall
        has_jumped = loss - lowest > max(_JUMP * abs(lowest), _CERTAIN * error)
        next_at = state.training + self._settings.gap
        if (
            has_jumped
            and math.isfinite(loss)
            and self._policy.derivatives.group.sum(torch.tensor(float(len(losses)))) >= _MANY
            and self._paid_at(self._price(0), True) <= next_at
        ):
            state.has_jumped, state.judge, state.next_at = True, None, next_at
            return state.rule.distrust(lowest, loss)  # a contest may soon end it
        if math.isinf(loss) or loss - lowest > max(_RISE * abs(lowest), _SURE * error):
            self.alarm()
        elif loss < state.seen - _FALL * abs(loss) and math.isfinite(state.seen):
            state.next_at = max(state.next_at, state.next_look)
        state.seen, state.best = loss, losses if loss <= lowest else best
        return None

    def num_updates(self, num_parts: int) -> int:
        """Updates whose pools the next contest needs.

        Args:
            num_parts: batches that plain training makes of a pool.
        """
        cheap, dear = sorted((self.state.rule.horizon, self.state.rule.rival()))
        rounds = self._num_rounds(dear)
        room = HELD if dear in self.state.costs else 2.0  # the guess may be too low
        steps = room * rounds * self._ratio(dear, cheap)
        others = steps / num_parts if cheap == OFF else steps + cheap
        return min(self.largest, max(rounds + dear, math.ceil(others)))

    def contest(
        self, pools: Sequence[Batch], num_parts: int, target: Batch, judge: Batch
    ) -> Decision | None:
        """Hold a contest and decide; None where the pools do not last for one.

        To be called within `Objective.scoring`.

        Args:
            pools: the next pools, the present one first.
            num_parts: batches that plain training makes of a pool.
            target: batch whose mean loss both select by.
            judge: other examples, which both are judged by: what one gains on those that it selects
                by is no merit where the target set has others.
        """
        began, state, rule = work_s(self._device), self.state, self.state.rule
        cheap, dear = sorted((rule.horizon, rule.rival()))
        is_known = dear in state.costs
        state.next_at, state.judge = state.training + rule.gap, None
        state.is_urgent = False
        num = len(pools) // self._policy.pools_per_update
        others = (num * num_parts if cheap == OFF else num - cheap) / self._ratio(dear, cheap)
        rounds = min(self._num_rounds(dear), num - dear, int(others))
        if rounds < 2:  # near the end of the stream, or never
            if num >= self.largest and not self._is_told:
                _log.warning(self._why_none(cheap, dear, num_parts))
                self._is_told = True
            return None
        if math.isinf(self._now(judge)[0]):
            return None  # there is nothing to compare with
        judged = partial(self._rollouts.judged, pools=pools, target=target, judge=judge)
        losses = {dear: judged(dear, num=rounds)}  # this first: it measures what the other is given
        if self._settings.costs is None and self._rollouts.times:
            self._measure(dear, self._rollouts.times)
        ratio = self._ratio(dear, cheap)
        losses[cheap] = judged(cheap, num=round(rounds * ratio))
        if cheap != OFF and self._settings.costs is None and self._rollouts.times:
            self._measure(cheap, self._rollouts.times)
        decision = None
        found = {rung: each for rung, each in losses.items() if each is not None}
        if len(found) == 2:  # else the pools did not last for the cheaper one
            means, error = compared(found, self._policy.derivatives.group)
            if math.isfinite(min(means.values())):
                trust: Mapping[str, float] = {}
                if dear > 0:
                    trust = self.trust(dear, self._rollouts.scoring.upcoming(dear, pools, target))
                decision = rule.decide(rule.rival(), Outcome(means, error, ratio, trust))
        seconds = work_s(self._device) - began
        self._pay(2 * rounds * self._cost(dear), seconds if is_known else None)
        state.next_at, state.next_look = state.training + rule.gap, state.training
        return decision

    def _why_none(self, cheap: int, dear: int, num_parts: int) -> str:
        steps = num_parts if cheap == OFF else 1
        return (
            f"{named(dear)} and {named(cheap)} cannot be compared: one step of the former takes as "
            f"long as {self._ratio(dear, cheap):.1f} of the latter, which makes {steps} of a pool, "
            f"and at most {self.largest} pools are peeked at. horizon='auto' goes on with "
            f"{named(self.state.rule.horizon)}; keep less of each pool, or name a horizon"
        )

    def _measure(self, horizon: int, times: Sequence[tuple[float, float]]) -> None:
        """Hold what a selected step costs, in plain steps of the user's own loop."""
        interval, state = self._policy.interval(), self.state
        with_ahead = [select_s for select_s, _ in times[::interval]]
        without = [s for index, (s, _) in enumerate(times) if index % interval]
        select_s = statistics.median(with_ahead)
        if without:
            others = statistics.median(without)
            select_s = others + (select_s - others) / interval
        known = state.times if len(state.times) >= NUM_TIMES // 4 else [s for _, s in times]
        found = torch.tensor([select_s, statistics.median(known)], dtype=torch.float64)
        select_s, step_s = self._policy.derivatives.group.mean(found).tolist()
        self._step_s = step_s
        state.costs[horizon] = _held(state.costs.get(horizon), 1 + select_s / step_s)

    def _pay(self, expected: float, seconds: float | None) -> None:
        """Count what a contest has cost, in plain steps.

        Args:
            expected: what its steps cost.
            seconds: that it took; None: it was the first, in which derivatives are checked, too.
        """
        state = self.state
        if seconds is not None and self._settings.costs is None and self._step_s > 0:
            found = torch.tensor(seconds / self._step_s / expected, dtype=torch.float64)
            found = self._policy.derivatives.group.mean(found)
            state.overhead = _held(state.overhead, found.item())
        state.spent += expected * state.overhead

    def _ratio(self, dear: int, cheap: int) -> float:
        return max(1.0, self._cost(dear) / self._cost(cheap))

    def _now(self, judge: Batch) -> Tensor:
        """Losses of a batch's examples at the live state; all infinite where any is not finite."""
        return self._rollouts.losses(self._rollouts.trained.optimizer.state().params, judge)

    def trust(self, horizon: int, upcoming: Upcoming) -> Mapping[str, float]:
        """First and second order of the whole selection over a window of `horizon` updates.

        With several pools to an update, the window is made from the first of each.
        """
        policy, (updates, state, pools, target) = self._policy, upcoming
        generator = self.state.generator
        window = pools[: horizon * policy.pools_per_update : policy.pools_per_update]
        try:
            ahead = policy.look_ahead(horizon, upcoming, generator, num_sensitivities=horizon)
            choices = [
                policy.choice(gamma, state, pool)
                for gamma, pool in zip(ahead.sensitivities, window, strict=True)
            ]
            selected, weights = zip(*choices, strict=True)
            order = random_order(generator)
            nominal = [
                order(index, state, pool)[: num_kept(policy.keep, num_examples(pool))]
                for index, pool in enumerate(window)
            ]
            change = selection(window, nominal, [index.cpu() for index in selected], weights)
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


def guessed_cost(horizon: int, interval: int) -> float:
    """Of a step with selection, in plain steps."""
    return 1 + _GUESS * (1 + max(0, horizon) / interval)


def _held(known: float | None, found: float) -> float:
    """A measured cost: the one that is known, unless what was found is clearly another."""
    if known is not None and 1 / HELD <= found / known <= HELD:
        return known
    return found
