"""What the next selections depend on, as it is saved; and what one of them has found so far."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from selectflow.control.contest_state import HorizonState
from selectflow.control.interval import IntervalState
from selectflow.control.rate import RateState
from selectflow.control.rules import Decision
from selectflow.control.worth import WorthState
from selectflow.core.batches import Batch, as_one, num_examples, take, through, to_device
from selectflow.core.forms import Forms
from selectflow.core.lookahead import LookAhead
from selectflow.core.params import Params
from selectflow.core.plain import plain, restored
from selectflow.core.target import Cycle
from selectflow.distributed import Group

_log = logging.getLogger(__name__)

_JUDGED = 64  # examples; their passes are few beside those of the steps that they judge


@dataclass
class SelectorState:
    """All that the next selections depend on besides the model, its optimizer and scheduler.

    Attributes:
        generator: of the selector's own random numbers.
        forms: which form the derivatives have.
        horizon: of the horizon control; None: not under control.
        rate: of the learning-rate control; None: not under control.
        interval: of the interval control; None: not under control.
        worth: of the checks of a scorer; None: the model scores itself, it does not choose by
            influence, or the horizon's contests measure what choosing is worth.
        num_steps: optimizer steps taken.
        target_position: batches of the target handed out in its present round.
        ahead: the look-ahead in use; None: the next pool needs one.
        ahead_step: optimizer step at which it was made.
        ahead_serves: optimizer steps that it may be used for.
        num_lookaheads: made so far.
        has_ranked: whether one of them preferred an example to another.
        peeked: pools drawn from the stream and not handed out yet, in order.
        rest: parts of the last pool that are still to be trained on, where none was selected.
    """

    generator: torch.Generator
    forms: Forms
    horizon: HorizonState | None
    rate: RateState | None
    interval: IntervalState | None = None
    worth: WorthState | None = None
    num_steps: int = 0
    target_position: int = 0
    ahead: LookAhead | None = None
    ahead_step: int = 0
    ahead_serves: int = 0
    num_lookaheads: int = 0
    has_ranked: bool = False
    peeked: deque[Batch] = field(default_factory=deque)
    rest: deque[Batch] = field(default_factory=deque)

    def serves(self, step: int, names: Iterable[str]) -> bool:
        """Whether the look-ahead in use serves the update after `step`.

        One of other parameters does not: some were frozen since, or trained again.
        """
        in_time = 0 <= step - self.ahead_step < self.ahead_serves
        return self.ahead is not None and in_time and self.ahead.gamma(0).keys() == set(names)

    def plain(self, *, with_peeked: bool = True) -> dict[str, Any]:
        """As numbers, texts and tensors in lists and dicts."""
        ahead = self.ahead and {
            "horizon": self.ahead.horizon,
            "target_loss": self.ahead.target_loss,
            "sensitivities": [dict(gamma) for gamma in self.ahead.sensitivities],
        }
        return {
            "generator": self.generator.get_state(),
            "forms": self.forms.plain(),
            "horizon": self.horizon and self.horizon.plain(),
            "rate": self.rate and self.rate.plain(),
            "interval": self.interval and self.interval.plain(),
            "worth": self.worth and self.worth.plain(),
            "num_steps": self.num_steps,
            "target_position": self.target_position,
            "ahead": ahead,
            "ahead_step": self.ahead_step,
            "ahead_serves": self.ahead_serves,
            "num_lookaheads": self.num_lookaheads,
            "has_ranked": self.has_ranked,
            "peeked": [plain(pool) for pool in self.peeked] if with_peeked else [],
            "rest": [plain(part) for part in self.rest],
        }

    def load(self, saved: Mapping[str, Any], params: Params, scored: Params) -> None:
        """Go on from what `plain` returned.

        Args:
            saved: what `plain` returned.
            params: the trained parameters, for the devices of what is restored.
            scored: those that scores are taken over, of the model that scores.

        Raises:
            ValueError: the look-ahead is of other parameters.
        """
        ahead = saved["ahead"]
        self.ahead = ahead and LookAhead(
            ahead["horizon"],
            ahead["target_loss"],
            [_fitting(gamma, scored) for gamma in ahead["sensitivities"]],
        )
        self.generator.set_state(saved["generator"])
        self.forms.load(saved["forms"])
        device = params.device
        if self.horizon is not None:
            self.horizon.load(saved["horizon"], device)
        if self.rate is not None:
            self.rate.load(saved["rate"], params)
        if self.interval is not None:
            self.interval.load(saved["interval"])
        if self.worth is not None:
            self.worth.load(saved["worth"])
        for name in ("num_steps", "target_position", "ahead_step", "ahead_serves"):
            setattr(self, name, saved[name])
        self.num_lookaheads, self.has_ranked = saved["num_lookaheads"], saved["has_ranked"]
        self.peeked.clear()
        self.peeked.extend(map(restored, saved["peeked"]))
        self.rest.clear()
        self.rest.extend(to_device(restored(part), device) for part in saved["rest"])


class TargetSet:
    """The target set as it is scored: its batches, one after the other, round after round.

    Args:
        cycle: the batches.
        view: what makes of a batch what is scored; None: the batch itself.
        state: has the position, and is written to.
    """

    def __init__(
        self, cycle: Cycle, view: Callable[[Batch], Batch] | None, state: SelectorState
    ) -> None:
        self.cycle, self._view, self._state = cycle, view, state
        self._peeked: tuple[int, tuple[Batch, int]] | None = None

    def next(self) -> Batch:
        """The next batch."""
        return self._take(*self._draw())

    def peek(self) -> Batch:
        """What `next` is going to return."""
        self._peeked = self._state.target_position, self._draw()
        return through(self._view, self._peeked[1][0])

    def _take(self, batch: Batch, after: int) -> Batch:
        self._state.target_position, self._peeked = after, None
        return through(self._view, batch)

    def _draw(self) -> tuple[Batch, int]:
        position = self._state.target_position
        if self._peeked is not None and self._peeked[0] == position:
            return self._peeked[1]  # a loader would have to begin its round again
        return self.cycle.draw(position)

    def next_and_judge(self, group: Group) -> tuple[Batch, Batch]:
        """A batch to select by, and others to judge by, of some `_JUDGED` examples if there are.

        What is gained on those that one selects by is no merit where the target has others.

        Args:
            group: of the processes, which judge by as many batches each.
        """
        target = self.next()
        places, judges, size = {self._state.target_position}, [], 0
        while size < _JUDGED:
            batch, after = self._draw()
            if after in places or batch is target:  # round again
                self._peeked = self._state.target_position, (batch, after)
                break
            places.add(after)
            judges.append(self._take(batch, after))
            size += num_examples(judges[-1])
        num = group.least(len(judges))
        return (target, as_one(judges[:num])) if num else halves(target)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Every other example of a batch, and the rest; a single one twice."""
    size = num_examples(batch)
    if size < 2:
        return batch, batch
    return take(batch, torch.arange(0, size, 2)), take(batch, torch.arange(1, size, 2))


@dataclass
class Ongoing:
    """The selection of one pool, as far as it has come.

    Attributes:
        pool: the candidates, or a part of them that is handed out as it is.
        following: the pools after it; drawn from when a look-ahead needs them.
        step: optimizer updates made.
        view: makes of the candidates what is scored; None: themselves.
        began: when, by the clock.
        upcoming: pools after the present one that were drawn, in order.
        losses: of the candidates, where the strategy needed them.
        is_ahead: whether a look-ahead is under way.
        is_zero: whether the sensitivity is 0, so that no example is better than another.
        lookahead_s: seconds of the look-ahead.
        control_s: seconds of the controller.
        decisions: of the controller.
        scorer_gain: what the scorer's choice was found to be worth.
    """

    pool: Batch
    following: Iterator[Batch] = field(default_factory=lambda: iter(()))
    view: Callable[[Batch], Batch] | None = None
    step: int = 0
    began: float = 0.0
    upcoming: list[Batch] = field(default_factory=list)
    losses: Tensor | None = None
    is_ahead: bool = False
    is_zero: bool = False
    lookahead_s: float = 0.0
    control_s: float = 0.0
    decisions: list[Decision] = field(default_factory=list)
    scorer_gain: float | None = None

    @cached_property
    def seen(self) -> Batch:
        """What is scored of the candidates, made where they are."""
        return through(self.view, self.pool)

    def note(self, decision: Decision | None, began: float) -> None:
        """Keep a decision, where one was made, and the time since `began` as its cost."""
        self.control_s += time.perf_counter() - began
        if decision is not None:
            self.decisions.append(replace(decision, step=self.step))
            level = logging.INFO if decision.moved else logging.DEBUG
            _log.log(level, "%s", self.decisions[-1])

    def pools(self, num: int, group: Group) -> list[Batch]:
        """The present pool and those after it, `num` in all, or as many as the stream has left."""
        # The user's stream is drawn from outside of `scoring`, which would undo its randomness.
        others = max(0, num - 1)
        self.upcoming += islice(self.following, max(0, others - len(self.upcoming)))
        if others:  # all look ahead as far as the shortest stream lasts
            others = group.least(min(others, len(self.upcoming)))
        return [self.pool, *self.upcoming[:others]]


def _fitting(gamma: Mapping[str, Tensor], params: Params) -> Params:
    """A saved sensitivity on the devices of `params`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in gamma.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if shapes != expected:
        names = shapes | expected
        differing = sorted(name for name in names if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"saved sensitivities must fit the trained parameters, got a difference in "
            f"{', '.join(differing[:5])}; load the state of the same model"
        )
    return Params((name, gamma[name].to(params[name])) for name in params)
