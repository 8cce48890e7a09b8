"""Learning-rate control: windows of the real training, replayed at other rates."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from selectflow.control.multiplier import StepMultiplier
from selectflow.control.rules import Decision, RateRule, restore, state_of
from selectflow.core.batches import Batch, as_one, to_device
from selectflow.core.derivatives import Derivatives
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.plain import plain, restored
from selectflow.core.storage import plain_update, restored_update
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.update import Update

_log = logging.getLogger(__name__)

# How far, relative to the way of the window, a replay may end from the real training (dropout,
# autocast or a loss of your own in the loop move it). Beyond, replays are compared with a replay.
_FAITHFUL = 0.05


@dataclass
class Window:
    """Steps that were really trained, as a replay needs them.

    A window that is due is weighed at its end. The others fill the gap between two such: they are
    all judged by one target batch, and come to nothing unless its loss has risen.

    Attributes:
        first_step: optimizer updates made before it.
        start: the state then.
        counts: updates of each parameter that the moments of `start` are of.
        buffers: of the model then.
        target: batch that it is judged by.
        start_loss: of the target, at the start.
        lowest: of the target; in a gap since it began.
        is_due: whether it is weighed at its end.
        updates: one for each step, and the one of the step to come.
        batches: what each was trained on; those of one step together.
    """

    first_step: int
    start: State
    counts: dict[str, int]
    buffers: dict[str, Tensor]
    target: Batch
    start_loss: float
    lowest: float
    is_due: bool
    updates: list[Update] = field(default_factory=list)
    batches: list[list[Batch]] = field(default_factory=list)

    def replay(self, derivatives: Derivatives, factor: float) -> State:
        """The state after the same steps at `factor` times their learning rates."""
        state = self.start
        for update, parts in zip(self.updates, self.batches, strict=True):
            grad = derivatives.step_gradient(state.params, as_one(parts))
            state = update.at_rate(factor).advance(state, grad)
        return state

    @property
    def rises(self) -> bool:
        """Whether the user's schedule raises the learning rate in this window."""
        first, last = (
            max(rule.lr for rule in update.rules) for update in (self.updates[0], self.updates[-1])
        )
        return last > first

    def plain(self) -> dict[str, Any]:
        """As numbers, texts and tensors in lists and dicts."""
        return {
            "first_step": self.first_step,
            "start": [dict(part) for part in self.start],
            "counts": self.counts,
            "buffers": self.buffers,
            "target": plain(self.target),
            "start_loss": self.start_loss,
            "lowest": self.lowest,
            "is_due": self.is_due,
            "updates": [plain_update(update) for update in self.updates],
            "batches": [[plain(part) for part in parts] for parts in self.batches],
        }

    @classmethod
    def restored(cls, saved: Mapping[str, Any], params: Params) -> Window:
        """The window that `plain` saved, on the devices of `params`."""
        start = (
            Params((name, tensor.to(params[name])) for name, tensor in part.items())
            for part in saved["start"]
        )
        device = params.device
        return cls(
            saved["first_step"],
            State(*start),
            saved["counts"],
            saved["buffers"],
            to_device(restored(saved["target"]), device),
            saved["start_loss"],
            saved["lowest"],
            saved["is_due"],
            [restored_update(update) for update in saved["updates"]],
            [[to_device(restored(b), device) for b in parts] for parts in saved["batches"]],
        )


@dataclass
class RateState:
    """What the next decisions on the rate depend on.

    Attributes:
        rule: the multiplier, and what windows said so far.
        window: the open one.
        next_step: optimizer step at which the next window that is due opens.
        last_step: that was judged.
        is_faithful: whether replays repeat the real training; None: not known yet.
        num_taken_back: steps that are no longer in the optimizer's own count.
        trained: what training has cost so far, in plain steps.
        replayed: steps of all replays.
    """

    rule: RateRule
    window: Window | None = None
    next_step: int = 0
    last_step: int = -1
    is_faithful: bool | None = None
    num_taken_back: int = 0
    trained: float = 0.0
    replayed: int = 0

    def plain(self) -> dict[str, Any]:
        """As plain values and tensors."""
        return {
            "rule": state_of(self.rule),
            "window": self.window and self.window.plain(),
            "next_step": self.next_step,
            "last_step": self.last_step,
            "is_faithful": self.is_faithful,
            "num_taken_back": self.num_taken_back,
            "trained": self.trained,
            "replayed": self.replayed,
        }

    def load(self, plain: Mapping[str, Any], params: Params) -> None:
        """Go on from `plain`, on the devices of `params`."""
        restore(self.rule, plain["rule"])
        self.window = plain["window"] and Window.restored(plain["window"], params)
        self.next_step, self.last_step = plain["next_step"], plain["last_step"]
        self.is_faithful, self.num_taken_back = plain["is_faithful"], plain["num_taken_back"]
        self.trained, self.replayed = plain.get("trained", 0.0), plain.get("replayed", 0)


class RateControl:
    """Multiplies the learning rate of the user's schedule by what replays of training favour.

    A window of steps is kept: the state before it, and the batches that were selected in it. Every
    so often the controller compares one, at its end, with replays at other rates. In between, the
    end of each costs one forward pass of a target batch, the same one until the next comparison,
    and replays only where its loss has risen. A failed window is taken back: parameters and moments
    of its start, or of a replay, are written in place; with those of the start its buffers, and the
    counts that the optimizer corrects its moments by.

    Args:
        state: what it decides from; is written to.
        optimizer: read, and written to when a window is replaced.
        derivatives: of the training loss.
        next_target: gives the batch whose mean loss a window is judged by.
        pools_per_update: batches that make one optimizer step.
        step_cost: gives the cost of a present step, with its selection, in plain steps.
    """

    def __init__(
        self,
        state: RateState,
        optimizer: OptimizerReader,
        derivatives: Derivatives,
        next_target: Callable[[], Batch],
        pools_per_update: int,
        step_cost: Callable[[], float],
    ) -> None:
        self._step_cost = step_cost
        self.state, self._optimizer, self._derivatives = state, optimizer, derivatives
        self._next_target, self._pools_per_update = next_target, pools_per_update
        self._hooks = StepMultiplier(optimizer)  # removed with this control

    def before(self, step: int) -> tuple[Decision | None, bool]:
        """Close the window that ends here, open one that begins here.

        To be called before the batch of a step is selected.

        Args:
            step: optimizer updates made.

        Returns:
            What was decided, if anything, and whether parameters and moments were replaced.
        """
        if step == self.state.last_step:  # a further batch of the same step
            return None, False
        if self.state.last_step >= 0:
            self.state.trained += (step - self.state.last_step) * self._step_cost()
        self.state.last_step, window = step, self.state.window
        decision, replaced = None, False
        if window is not None and not self._belongs(window, step):
            self.state.window = window = None
        if window is None or self._is_over(window, step):
            with self._derivatives.objective.scoring():
                if window is not None:
                    decision, replaced = self._end(window, step)
                if self.state.window is None:
                    self._open(step, self._next_target())
        self._expect()
        return decision, replaced

    def diverged(self, step: int) -> tuple[Decision | None, bool]:
        """Judge the open window before its end, since nothing was finite where it has led to.

        To be called within `Objective.scoring`, after `before`.

        Args:
            step: optimizer updates made.

        Returns:
            As `before` does. No decision where the window has no step yet, or its target loss has
            not risen: then the steps taken are not at fault.
        """
        window = self.state.window
        num = 0 if window is None else step - window.first_step
        if window is None or num == 0 or window.batches[num]:
            return None, False
        loss = self._end_loss(window)
        if not self.state.rule.has_risen(window.lowest, loss):
            return None, False
        window = replace(window, updates=window.updates[:num], batches=window.batches[:num])
        decision, replaced = self._close(window, step, loss)
        if replaced:
            if self.state.window is None:
                self._open(step, self._next_target())
            self._expect()
        return decision, replaced

    def slow_down(self, reason: str) -> Decision | None:
        """Half the rate from now on, where it may be lower still."""
        decision, window = self.state.rule.slow_down(reason), self.state.window
        self._optimizer.lr_multiplier = self.state.rule.multiplier
        if decision is not None and window is not None:
            window.updates[-1] = self._optimizer.updates(1)[0]
        return decision

    def _expect(self) -> None:
        """Note the step to come."""
        assert self.state.window is not None
        self.state.window.updates += self._optimizer.updates(1)
        self.state.window.batches.append([])

    def trained_on(self, batch: Batch) -> None:
        """Note a batch that was selected for the present step."""
        if self.state.window is not None:
            parts = self.state.window.batches[-1]
            if len(parts) == self._pools_per_update:  # not what is trained on: nothing to replay
                self.state.window = None
            else:
                parts.append(batch)

    def _belongs(self, window: Window, step: int) -> bool:
        """Whether each step since the window began was selected for, with the same parameters."""
        names = self._optimizer.params().keys()
        return step - window.first_step == len(window.updates) and (
            window.start.params.keys() == names  # none was frozen since, or trained again
        )

    def _is_over(self, window: Window, step: int) -> bool:
        is_full = len(window.updates) == self.state.rule.settings.window
        return is_full or (not window.is_due and step >= self.state.next_step)

    def _end(self, window: Window, step: int) -> tuple[Decision | None, bool]:
        """Judge a window that is due, or in which the target loss rose; else only look at it."""
        loss = self._end_loss(window)
        if window.is_due or self.state.rule.has_risen(window.lowest, loss):
            return self._close(window, step, loss)
        self.state.window = None
        self.state.rule.rest(window.start_loss, loss)
        if step < self.state.next_step:
            self._open(step, window.target, loss, min(window.lowest, loss))
        return None, False

    def _end_loss(self, window: Window) -> float:
        try:
            return self._loss(self._optimizer.state(), window.target)
        except FloatingPointError:  # diverged: risen as far as can be
            return math.inf

    def _close(self, window: Window, step: int, loss: float) -> tuple[Decision | None, bool]:
        """Judge a window, and open the next where a gap begins."""
        decision, replaced, loss = self._judge(window, loss)
        unpaid = self.state.rule.settings.unpaid(self.state.replayed, self.state.trained)
        self.state.next_step = step + max(
            self.state.rule.gap, math.ceil(unpaid / self._step_cost())
        )
        self.state.window = None
        if step < self.state.next_step:
            self._open(step, window.target, loss, loss)
        return decision, replaced

    def _open(
        self, step: int, target: Batch, loss: float | None = None, lowest: float = math.inf
    ) -> None:
        """Begin a window; the target loss is read unless it is known."""
        state = self._optimizer.state()
        start = State(*(part.map(lambda x: x.clone()) for part in state))
        loss = self._loss(state, target) if loss is None else loss
        is_due, lowest = step >= self.state.next_step, min(loss, lowest)
        counts, buffers = self._optimizer.counts(), self._buffers()
        self.state.window = Window(step, start, counts, buffers, target, loss, lowest, is_due)

    def _judge(self, window: Window, end_loss: float) -> tuple[Decision, bool, float]:
        """What the rule decides, whether the window is replaced, and the loss it now ends at."""
        best: State | None = None  # a replay that may be taken over; None: the start
        best_loss = window.start_loss

        def replay(factor: float) -> float:
            nonlocal best, best_loss
            try:
                end = self._replayed(window, factor)
                loss = self._loss(end, window.target)
            except FloatingPointError:
                return math.inf
            if loss < best_loss:
                best, best_loss = end, loss
            return loss

        # what diverged can tell nothing
        if self.state.is_faithful is None and end_loss < math.inf:
            self.state.is_faithful = self._check(window, self._optimizer.state())
        objective, now = self._derivatives.objective, self._buffers()
        if self.state.rule.has_risen(window.lowest, end_loss):
            objective.write_buffers(window.buffers)  # replays are not to run on what failed
        decision, redo = self.state.rule.decide(
            window.lowest,
            end_loss,
            replay,
            rising=window.rises,
            replaceable=bool(self.state.is_faithful),
        )
        self._optimizer.lr_multiplier = self.state.rule.multiplier
        if not redo:
            objective.write_buffers(now)
            return decision, False, end_loss
        if best is None or not self.state.is_faithful:
            self._optimizer.write(window.start, window.counts)
            best_loss = window.start_loss
        else:
            objective.write_buffers(now)
            self._optimizer.write(best)
        self.state.num_taken_back = self._optimizer.num_taken_back
        return decision, True, best_loss

    def _check(self, window: Window, end: State) -> bool:
        """Whether a replay of the first window repeats it."""
        try:
            apart = (self._replayed(window, 1.0).params - end.params).norm()
        except FloatingPointError:  # where the training itself was finite
            apart = math.inf
        way = (end.params - window.start.params).norm()
        faithful = apart <= _FAITHFUL * way
        if not faithful:
            _log.info(
                "replays end %.3g%% of the way from the real training (dropout, autocast, another "
                "loss in the loop): the lr control compares replays, and takes none over",
                100 * apart / way,
            )
        return faithful

    def _replayed(self, window: Window, factor: float) -> State:
        self.state.replayed += len(window.batches)
        return window.replay(self._derivatives, factor)

    def _buffers(self) -> dict[str, Tensor]:
        live = self._derivatives.objective.model.named_buffers()
        return {name: buffer.clone() for name, buffer in live}

    def _loss(self, state: State, target: Batch) -> float:
        return self._derivatives.mean_loss(state.params, target)
