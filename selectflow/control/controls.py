"""What is decided before a pool is scored: the rate, the horizon, and whether to select at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor

from selectflow.control.contests import HorizonControl, guessed_cost
from selectflow.control.horizon import Horizon, as_horizon
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rate import RateControl
from selectflow.control.rollouts import Rollouts, Simulated
from selectflow.control.state import Ongoing, SelectorState, TargetSet
from selectflow.control.worth import ScorerWorth
from selectflow.core.batches import Batch, num_examples


class Controls:
    """The controllers that a selector's state asks for.

    Args:
        state: what they decide from; is written to.
        trained: the model that is trained.
        scoring: the model that scores: the same, or its scorer.
        target: the target set.
        horizon: of look-aheads, where it is not under control.
        num_steps: optimizer steps of the run; None: not known.
        score_every: optimizer steps of which one is selected for.

    Attributes:
        horizon: of look-aheads.
    """

    def __init__(
        self,
        state: SelectorState,
        trained: Simulated,
        scoring: Simulated,
        target: TargetSet,
        horizon: int | Horizon | AutoHorizon,
        num_steps: int | None,
        score_every: int,
    ) -> None:
        self._score_every = score_every
        self._state, self._trained, self._scoring, self._target = state, trained, scoring, target
        derivatives, self._per = trained.policy.derivatives, trained.policy.pools_per_update
        self._objective, self._group = derivatives.objective, derivatives.group
        self._contests: HorizonControl | None = None
        if state.horizon is not None:
            rollouts = Rollouts(trained, scoring, state.horizon.generator)
            self._contests = HorizonControl(state.horizon, rollouts, num_steps)
        self._worth: ScorerWorth | None = None
        if state.worth is not None:
            self._worth = ScorerWorth(state.worth, Rollouts(trained, scoring, state.generator))
        self._rate: RateControl | None = None
        if state.rate is not None:
            self._rate = RateControl(
                state.rate, trained.optimizer, derivatives, target.next, self._per, self._step_cost
            )
        self.horizon: Horizon = self._contests or as_horizon(horizon)  # type: ignore[arg-type]

    @property
    def is_off(self) -> bool:
        """Whether nothing is selected now."""
        return self._contests is not None and self._contests.is_off

    @property
    def has_rate(self) -> bool:
        """Whether the learning rate is under control."""
        return self._rate is not None

    @property
    def max_peeked(self) -> int:
        """Pools of the longest look-ahead, contest or check that there will be."""
        largest = self.horizon.largest
        if self._worth is not None:
            largest = self._worth.num_updates(largest)
        return largest * self._per

    def _step_cost(self) -> float:
        """Of a present step, in plain steps."""
        if self._contests is not None:
            return self._contests.step_cost
        if not self._state.num_lookaheads:  # nothing is scored by influence
            return 1.0
        horizon = self.horizon.at(self._state.num_steps)
        guess = guessed_cost(horizon, self._scoring.policy.interval())
        return 1 + (guess - 1) / self._score_every

    def enter(self, step: int) -> None:
        """The user's loop asks for a batch."""
        if self._contests is not None:
            self._contests.enter(step)

    def leave(self, kept: Batch) -> None:
        """The user's loop goes on, with a batch to train on, weighted as it is to be."""
        if self._rate is not None:
            self._rate.trained_on(kept)
        if self._contests is not None:
            self._contests.leave()

    def adapt_rate(self, ongoing: Ongoing) -> None:
        """Let the learning-rate control judge the steps so far."""
        if self._rate is None:
            return
        began = time.perf_counter()
        decision, replaced = self._rate.before(ongoing.step)
        if replaced:
            self._state.ahead = None  # it was of the steps that were taken back
            if self._contests is not None:
                self._contests.alarm()
        ongoing.note(decision, began)

    def has_slowed(self, ongoing: Ongoing, losses: Callable[[Ongoing], Tensor]) -> bool:
        """Whether the learning-rate control has an answer to values that are not finite.

        Steps that led to them are taken back. Where the present state is in order and the next
        steps diverge in a look-ahead, they are looked at again at half the rate. Those of a scorer
        say nothing of the rate.

        Args:
            ongoing: the selection that came upon them.
            losses: of the candidates at the present parameters.
        """
        if self._rate is None or self._trained is not self._scoring:
            return False
        began, is_ahead = time.perf_counter(), ongoing.is_ahead
        ongoing.losses, ongoing.is_ahead = None, False
        with self._objective.scoring():
            decision, replaced = self._rate.diverged(ongoing.step)
        if decision is None and is_ahead:
            with self._group.together():
                losses(ongoing)  # raises where the pool itself is at fault
            decision = self._rate.slow_down(
                "the look-ahead's own updates are not finite at this rate"
            )
            replaced = decision is not None
        if replaced:
            self._state.ahead = None
        ongoing.note(decision, began)
        return replaced

    def decide_horizon(
        self, ongoing: Ongoing, size_kept: int, is_due: Callable[[int], bool]
    ) -> None:
        """Look at the target loss, and hold a contest, if one is due.

        Args:
            ongoing: the selection before its pool is scored.
            size_kept: examples kept of the pool.
            is_due: whether the selection after so many steps needs a look-ahead of its own.
        """
        control, size = self._contests, num_examples(ongoing.pool)
        # a strategy that never looks ahead has no horizon to decide
        if control is None or not (control.may_be_off or self._state.num_lookaheads):
            return
        is_look_due = control.is_look_due
        if not is_look_due and not (control.is_due() and is_due(ongoing.step)):
            return
        rejected = self._group.least(size - size_kept)  # what one process does all do
        if rejected == 0 and self._scoring.policy.weighting == "none":
            return  # all are kept either way
        if is_look_due:
            began = time.perf_counter()
            with self._objective.scoring():
                ongoing.note(control.look(self._target.next), began)
        if not control.is_due() or not is_due(ongoing.step):
            return
        num_parts = 1 + rejected // size_kept
        num = control.num_updates(num_parts) * self._per
        pools, began = ongoing.pools(num, self._group), time.perf_counter()
        target, judge = self._target.next_and_judge(self._group)
        with self._scoring_both():
            ongoing.note(control.contest(pools, num_parts, target, judge), began)

    def check_scorer(self, ongoing: Ongoing) -> None:
        """Measure what the scorer's choice is worth, if that is due."""
        worth, step = self._worth, ongoing.step
        if worth is None or not worth.is_due(step):
            return
        horizon = self.horizon.at(step)
        pools = ongoing.pools(worth.num_updates(horizon) * self._per, self._group)
        began = time.perf_counter()
        target, judge = self._target.next_and_judge(self._group)
        with self._scoring_both():
            ongoing.scorer_gain = worth.check(step, horizon, pools, target, judge)
        ongoing.note(None, began)

    @contextmanager
    def _scoring_both(self) -> Iterator[None]:
        """Passes of the trained model and of the one that scores."""
        other = self._scoring.policy.derivatives.objective
        with (
            self._objective.scoring(),
            nullcontext() if other is self._objective else other.scoring(),
        ):
            yield
