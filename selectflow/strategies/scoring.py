"""Scores of a pool: what strategies ask of the model that scores, look-aheads among it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from selectflow.control.horizon import Horizon
from selectflow.control.interval import IntervalControl
from selectflow.control.state import Ongoing, SelectorState, TargetSet
from selectflow.core.batches import Batch, num_examples
from selectflow.core.examples import ExampleGradients
from selectflow.core.lookahead import Policy, Upcoming
from selectflow.core.params import Params
from selectflow.core.torch_optim import OptimizerReader
from selectflow.strategies.baselines import gradient, influence, loss
from selectflow.strategies.candidates import Candidates, Strategy, checked_scores
from selectflow.strategies.training import Memory, Training

# Look-aheads, or steps without, between two checks that central differences still agree.
_RECHECK_EVERY = 100

_log = logging.getLogger(__name__)


class Scoring:
    """Scores pools by a strategy, through the model that scores.

    Args:
        state: what scores depend on; is written to.
        policy: of the model that scores.
        optimizer: its own.
        examples: gradients of single examples.
        target: the target set, as it is scored.
        horizon: of each look-ahead.
        intervals: says how long one serves; None: the policy's interval is fixed.
    """

    def __init__(
        self,
        state: SelectorState,
        policy: Policy,
        optimizer: OptimizerReader,
        examples: ExampleGradients,
        target: TargetSet,
        horizon: Horizon,
        intervals: IntervalControl | None = None,
    ) -> None:
        self.state, self.policy, self.optimizer, self.horizon = state, policy, optimizer, horizon
        self._derivatives, self._objective = policy.derivatives, policy.derivatives.objective
        self._examples, self._target, self._intervals = examples, target, intervals
        self.memory: dict[str, Memory] = {}  # of the strategy
        self._is_zero_said = False

    def scores(self, strategy: Strategy, ongoing: Ongoing) -> Tensor:
        """What the strategy gives each candidate, shape (P,), where it found it.

        Raises:
            ValueError: the strategy or loss_fn returned a wrong shape; the target is empty.
            FloatingPointError: a loss, derivative or score is not finite.
        """
        training = Training(
            ongoing.seen,
            self._derivatives,
            self._examples,
            self.optimizer,
            self.policy.names(),
            self._target.next,
            self._target.cycle,
            self.policy.score_view,
            self.memory,
        )
        candidates = Candidates(
            ongoing.pool,
            num_examples(ongoing.pool),
            losses=partial(self.losses, ongoing),
            influence=partial(self._influence, ongoing),
            slopes=partial(self._slopes, ongoing),
            generator=self.state.generator,
            training=training,
        )
        return checked_scores(
            strategy(candidates),
            candidates.size,
            ongoing.pool,
            are_finite=strategy in (influence, gradient, loss),  # as they were found, and checked
        )

    def losses(self, ongoing: Ongoing) -> Tensor:
        """Loss of each candidate at the present parameters."""
        if ongoing.losses is None:
            with self._objective.scoring():
                ongoing.losses = self._derivatives.losses(self.optimizer.values(), ongoing.seen)
        return ongoing.losses

    def _slopes(self, ongoing: Ongoing, direction: Params) -> Tensor:
        """Derivative of the loss of each candidate along a direction."""
        if ongoing.step % _RECHECK_EVERY == 0:
            self.state.forms.recheck()
        with self._objective.scoring():
            return self._directional(ongoing, direction)

    def _directional(self, ongoing: Ongoing, direction: Params) -> Tensor:
        params = self.optimizer.values()
        ongoing.losses, slopes = self._derivatives.directional(params, direction, ongoing.seen)
        return slopes

    def _influence(self, ongoing: Ongoing) -> Tensor:
        """-gamma . grad loss of each candidate, after a look-ahead where one is due."""
        state, step = self.state, ongoing.step
        is_due = self.is_due(step)
        num = self.horizon.at(step) * self.policy.pools_per_update if is_due else 0
        pools = ongoing.pools(num, self._derivatives.group)
        with self._objective.scoring():
            old = self._old(step) if is_due else None
            if is_due:
                self._look_ahead(step, pools, ongoing)
            assert state.ahead is not None
            ongoing.is_zero = state.ahead.is_zero(step - state.ahead_step)
            scores = -self._directional(ongoing, state.ahead.gamma(step - state.ahead_step))
            if old is not None and not ongoing.is_zero:
                self._adapt_interval(ongoing, old, scores, pools)
            return scores

    def _old(self, step: int) -> tuple[Params, int] | None:
        """The sensitivity in use and its age, where a new one is to be compared with it.

        One of other parameters is not: some were frozen since, or are trained again.
        """
        ahead, age = self.state.ahead, step - self.state.ahead_step
        if self._intervals is None or not self._intervals.is_due(step):
            return None
        if ahead is None or ahead.is_zero(age):
            return None
        gamma, names = ahead.gamma(age), self.policy.names() or self.optimizer.params()
        return (gamma, age) if gamma.keys() == set(names) else None

    def _adapt_interval(
        self, ongoing: Ongoing, old: tuple[Params, int], scores: Tensor, pools: Sequence[Batch]
    ) -> None:
        """Compare old scores with new ones, and decide how long the next look-ahead serves."""
        assert self._intervals is not None
        assert self.state.ahead is not None
        began, horizon = time.perf_counter(), self.state.ahead.horizon
        decision = self._intervals.measure(
            ongoing.step,
            old,
            (scores, horizon),
            pools,
            self._target.peek(),
            self.state.generator,
            is_other=horizon > 0 or self._target.cycle.num_batches != 1,
        )
        ongoing.note(decision, began)

    def is_due(self, step: int) -> bool:
        """Whether the next scores need a look-ahead of their own."""
        return not self.state.serves(step, self.policy.names() or self.optimizer.params())

    def _look_ahead(self, step: int, pools: Sequence[Batch], ongoing: Ongoing) -> None:
        """Find the sensitivities of the next steps."""
        began, state, horizon = time.perf_counter(), self.state, self.horizon.at(step)
        target = self._target.next()
        state.ahead = None  # its memory is of use now; should this fail, the next call looks ahead
        ongoing.is_ahead = horizon > 0
        if state.num_lookaheads % _RECHECK_EVERY == 0:
            state.forms.recheck()
        updates, now = self.optimizer.updates(max(1, horizon)), self.optimizer.state()
        ahead = self.policy.look_ahead(
            horizon, Upcoming(updates, now, pools, target), state.generator
        )
        # At a learning rate of 0, as where a warm-up begins, no example does anything. The steps
        # that follow are to have sensitivities of their own.
        is_zero = not any(ahead.norms)
        if is_zero:
            self._note_zero(max(rule.lr for update in updates for rule in update.rules))
        state.has_ranked |= not is_zero
        state.ahead, state.ahead_step, ongoing.is_ahead = ahead, step, False
        state.ahead_serves = 1 if is_zero else self.policy.interval()
        state.num_lookaheads += 1
        ongoing.lookahead_s = time.perf_counter() - began

    def _note_zero(self, lr: float) -> None:
        """Say, once, why no example is preferred, or raise where it must be a mistake."""
        if lr > 0 and not self.state.has_ranked:
            raise ValueError(
                f"the target loss must depend on the training, got sensitivities that are all 0 at "
                f"a learning rate of {lr:.3g}; check that loss_fn uses the model's trained "
                "parameters (no detach, no no_grad), that `params` leaves some that it uses, and "
                "that the target loss is not flat"
            )
        why = "the target loss is flat here" if lr > 0 else "the learning rate is 0"
        if not self._is_zero_said:
            _log.warning("%s: no example is better than another, and any are kept", why)
        self._is_zero_said = True
