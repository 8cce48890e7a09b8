"""What a scorer's choice is worth to the model that is trained, measured now and then.

How alike two models rank a pool says little about it; what counts is the target loss. So, from the
live state and in simulation, the trained model takes some steps on what its scorer keeps, and as
many on any examples of the same pools. Both are judged as contests are, on target examples that
were not selected by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selectflow.control.ladder import OFF, Outcome, recent
from selectflow.control.rollouts import Rollouts, compared
from selectflow.control.rules import restore, state_of
from selectflow.core.batches import Batch

_NUM_STEPS = 16  # over 8 the sign is often wrong, over 16 it was that of the whole run
_FIRST_AT = 256  # optimizer steps; each gap after it is twice the one before
_LONGEST_GAP = 4096
_REMEMBERED = 4

_log = logging.getLogger(__name__)


@dataclass
class WorthState:
    """What the next checks depend on.

    Attributes:
        next_at: optimizer step of the next one.
        gap: steps from that to the one after it.
        gains: relative gains in target loss, and their errors, the newest last.
    """

    next_at: int = _FIRST_AT
    gap: int = _FIRST_AT
    gains: list[tuple[float, float]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return state_of(self)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from `plain`."""
        restore(self, saved)


class ScorerWorth:
    """Measures what choosing gains over chance, and warns where it gains nothing.

    Args:
        state: of the checks; is written to.
        rollouts: of the trained model, by what its scorer keeps.
    """

    def __init__(self, state: WorthState, rollouts: Rollouts) -> None:
        self.state, self._rollouts = state, rollouts

    def is_due(self, step: int) -> bool:
        """Whether a check is to be made before the update after `step`."""
        return step >= self.state.next_at

    @staticmethod
    def num_updates(horizon: int) -> int:
        """Updates whose pools a check needs."""
        return _NUM_STEPS + horizon

    def check(
        self, step: int, horizon: int, pools: Sequence[Batch], target: Batch, judge: Batch
    ) -> float | None:
        """How much lower the target loss is by the scorer's choice, relative, in [-1, 1].

        To be called within `Objective.scoring` of both models.

        Args:
            step: optimizer updates made.
            horizon: H of the scorer's look-aheads.
            pools: the next ones, the present one first.
            target: batch whose mean loss the scorer selects by.
            judge: other examples, which both are judged by.

        Returns:
            None where the pools do not last for two steps, or neither loss is finite.
        """
        state, rollouts = self.state, self._rollouts
        state.next_at, state.gap = step + state.gap, min(2 * state.gap, _LONGEST_GAP)
        num = min(_NUM_STEPS, len(pools) // rollouts.scoring.policy.pools_per_update - horizon)
        if num < 2:
            return None
        chance = rollouts.judged(OFF, pools, target, judge, num)
        chosen = rollouts.judged(horizon, pools, target, judge, num)
        if chance is None or chosen is None:
            return None
        group = rollouts.trained.policy.derivatives.group
        means, error = compared({OFF: chance, horizon: chosen}, group)
        if not math.isfinite(min(means.values())):
            return None
        state.gains.append(Outcome(means, error, 1.0).lead())
        del state.gains[:-_REMEMBERED]
        gain, error = recent(state.gains)
        told = f"{gain:+.1%} +- {error:.1%} of the target loss in {num} steps"
        if len(state.gains) > 1 and gain <= error < math.inf:  # of one example nothing is known
            _log.warning(
                "step %d: the scorer's choice is worth no more to the model than chance (%s); "
                "train the scorer on data that are nearer to these, take a larger one, or leave it "
                "out",
                step,
                told,
            )
        else:
            _log.info("step %d: the scorer's choice gains %s over chance", step, told)
        return state.gains[-1][0]
