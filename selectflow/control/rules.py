"""The rule of the learning rate: measured losses in, a multiplier out. Plain numbers only.

An adaptive integrator lets a local error estimate decide how far to step, and takes a step back
that failed. So does `RateRule`, from what was measured by really rolling training out; `ladder` has
the rule of the horizon.

The last window of steps is trained again at twice and at half the
rate, on the batches that it was really trained on. A lower rate nearly always looks better over a
few steps, because it averages noise out before there was time to lose by being slow; so it must
earn more than the window's whole progress before it is taken. With

    P = sum of (start - end)   G = sum of (end - end at half the rate)   U = the same at twice

over the windows since the last change, each counting half of the one after it: halve if G > P and
P + G > 0, for where the loss rises at half the rate, too, the rate is not what makes it rise, as on
a stream that lacks classes of the target; double if U > G, U is a noticeable share of the loss, and
P + U > 0. Double as well where
progress goes with the rate, U ~ P and G ~ -P / 2: that is far below the best rate, however little a
window gains. Each fall doubles the number of windows that the next raise needs, so it cannot
oscillate for long; to lower takes two at most, for too high a rate can ruin a run where too low a
one only slows it. The first window is a line search, since the rate may be off by much and there is
no noise to average out yet: downwards until the loss does not rise and half is no better, upwards
only to twice.

A window in which the target loss rose by more than `rise` is a failed step: it is taken back.
Training goes on from its start, or from its replay at half the rate where that ends lower; at half
the rate, or at a quarter where it rises in the replay too. So it is with steps between two windows:
there the target loss is looked at now and then, and replayed only once it has risen. A window that
led to where nothing is finite is judged at once, before its end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selectflow.core.counts import is_count

_PATIENCE_TO_LOWER = 2  # windows before the rate is lowered
_NOTICEABLE = 0.01  # share of the target loss that twice the rate must gain
_PROPORTIONAL = 0.8  # share of the progress that twice the rate must add, and half halve
_RESOLUTION = 1e-6  # relative difference of two losses below which they are the same


@dataclass(frozen=True)
class Decision:
    """What was decided, from what, and why.

    Attributes:
        what: "horizon", "interval", "lr_multiplier" or the "share" of a source.
        before: its value so far; of a horizon "off" where nothing is selected.
        after: its value from now on.
        reason: in words.
        measures: the numbers it was made from, by name.
        step: optimizer updates made before it.
    """

    what: Literal["horizon", "interval", "lr_multiplier", "share"]
    before: float | Literal["off"]
    after: float | Literal["off"]
    reason: str
    measures: Mapping[str, float]
    step: int = 0

    @property
    def moved(self) -> bool:
        """Whether the value changed."""
        return self.before != self.after

    def __str__(self) -> str:
        before, after = (x if isinstance(x, str) else f"{x:g}" for x in (self.before, self.after))
        change = f"{before} -> {after}" if self.moved else f"stays {after}"
        return f"step {self.step}: {self.what} {change}: {self.reason}"


def state_of(rule: object) -> dict[str, Any]:
    """All that later decisions of a rule depend on, as plain values."""
    return copy.deepcopy({name: value for name, value in vars(rule).items() if name != "settings"})


def restore(rule: object, state: Mapping[str, Any]) -> None:
    """Let a rule go on from `state_of`."""
    vars(rule).update(copy.deepcopy(dict(state)))


# --- the learning rate ----------------------------------------------------------------------


@dataclass(frozen=True)
class AutoRate:
    """Settings of the learning-rate control.

    Attributes:
        lowest: smallest multiplier of the user's schedule.
        highest: largest multiplier.
        window: optimizer steps that are replayed, >= 1.
        longest_gap: most steps between two windows, >= 0; a gap doubles while nothing changes. In
            a gap the target loss is looked at every `window` steps, forward only.
        rise: relative rise of the target loss that takes the last `window` steps back.
        share: of the cost of training, in plain steps, that replays may take, in (0, 1]. Those that
            a rise asks for are made all the same, and are paid for by later ones.
        early: steps that may be replayed beyond that share, since the rate may be off by much at
            first.
    """

    lowest: float = 1 / 64
    highest: float = 64.0
    window: int = 8
    longest_gap: int = 248
    rise: float = 0.2
    share: float = 0.15
    early: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= 1 <= self.highest < math.inf:
            raise ValueError(
                "bounds of the lr multiplier must be 0 < lowest <= 1 <= highest, got "
                f"lowest={self.lowest}, highest={self.highest}; 1 is the user's own schedule"
            )
        are_counts = is_count(self.window) and is_count(self.longest_gap, 0)
        if not are_counts or not self.rise > 0:
            raise ValueError(
                "window must be >= 1, longest_gap >= 0, both integers, and rise > 0, got "
                f"{self.window}, {self.longest_gap} and {self.rise}"
            )
        if not 0 < self.share <= 1 or not is_count(self.early, 0):
            raise ValueError(
                "share must be in (0, 1], early >= 0, an integer, got "
                f"{self.share} and {self.early}"
            )
        as_integers(self, "window", "longest_gap", "early")

    def unpaid(self, replayed: float, trained: float) -> float:
        """What must be trained until another window may be replayed at two rates; 0: nothing.

        Args:
            replayed: steps so far.
            trained: cost of training so far, in plain steps.
        """
        return max(0.0, (replayed + 2 * self.window - self.early) / self.share - trained)


@dataclass
class RateRule:
    """The learning-rate multiplier, from windows of training and their replays.

    Attributes:
        settings: of the control; all else is state.
        multiplier: of the user's learning rate.
        gap: optimizer steps to the next window.
        sums: P, G and U.
        rested: fall of the target loss between windows, which counts with P against G.
        num: windows since the last change.
        patience: windows before a raise.
        direction: of the last change: 1, -1, or 0 before the first.
        is_first: whether no window was judged yet.
    """

    settings: AutoRate
    multiplier: float = 1.0
    gap: int = field(init=False)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    rested: float = 0.0
    num: int = 0
    patience: int = 1
    direction: int = 0
    is_first: bool = True

    def __post_init__(self) -> None:
        self.gap = self.settings.window

    def rest(self, start: float, end: float) -> None:
        """Note what the target loss did between two windows."""
        self.rested += self._gain(start, end)

    def decide(
        self,
        start: float,
        end: float,
        replay: Callable[[float], float],
        *,
        rising: bool = False,
        replaceable: bool = True,
    ) -> tuple[Decision, bool]:
        """What a window of training and its replays say.

        Args:
            start: target loss before the window; between two, the lowest since the first.
            end: target loss after it; infinite where training diverged.
            replay: factor on the learning rate -> target loss after the window at that rate;
                infinite where it diverges.
            rising: the user's own schedule raises the rate, as in a warm-up: faster is not tried.
            replaceable: a replay may stand for what was really trained. If not, replays are
                compared with the one at factor 1; whether the loss rose is for `end` to say.

        Returns:
            The decision, and whether training is to go on from the lowest loss of the window's
            start and, where they may stand for it, its replays.
        """
        losses = {1.0: end} if replaceable else {}
        risen = self.has_risen(start, end)

        def at(factor: float) -> float:
            if factor not in losses:
                allowed = self._allows(factor) and not (rising and factor > 1)
                losses[factor] = replay(factor) if allowed else math.inf
            return losses[factor]

        if self.is_first:
            factor, redo, reason = self._search(start, end, at)
        elif risen:
            factor, redo, reason = self._take_back(start, end, at)
        else:
            factor, redo, reason = self._weigh(start, at(1.0), at)
        was_first, self.is_first = self.is_first, False
        before, self.multiplier = self.multiplier, self.multiplier * factor
        self._note(factor, is_calm=factor < 1 and not (redo or was_first))
        named = {f"loss_at_{factor:g}": loss for factor, loss in losses.items()}
        measures = {"loss_before": start, **named} | ({} if replaceable else {"loss_after": end})
        decision = Decision("lr_multiplier", before, self.multiplier, reason, measures)
        return decision, redo and (replaceable or risen)

    def slow_down(self, reason: str) -> Decision | None:
        """Half the rate without a window, for the reason given; None at the lowest rate."""
        if not self._allows(0.5):
            return None
        before, self.multiplier = self.multiplier, self.multiplier / 2
        self._note(0.5)
        return Decision("lr_multiplier", before, self.multiplier, reason, {})

    def has_risen(self, start: float, end: float) -> bool:
        """Whether the target loss rose by so much that the steps between are taken back."""
        return end - start > self.settings.rise * abs(start)

    def _allows(self, factor: float) -> bool:
        tight = 1 + 1e-9
        return (
            self.settings.lowest / tight
            <= self.multiplier * factor
            <= self.settings.highest * tight
        )

    def _search(
        self, start: float, end: float, at: Callable[[float], float]
    ) -> tuple[float, bool, str]:
        risen = self.has_risen(start, end)
        if risen and not self._allows(0.5):
            return self._take_back(start, end, at)
        best, why = 1.0, "line search over the first window"
        if risen:
            why = f"the target loss rose from {start:.4g} to {end:.4g}: {why}"
            best = 0.5
            while self._allows(best / 2) and self.has_risen(start, at(best)):
                best /= 2
        largest = best
        while at(best / 2) < at(best):
            best /= 2
        # where the loss rises at any rate, as a stream without some classes makes it, the lowest is
        # only the one that learns least
        if (
            at(best) >= start
            and not self._allows(best / 2)
            and not self.has_risen(start, at(largest))
        ):
            best = largest
        if best == 1.0 and at(2.0) < at(1.0):
            best = 2.0
        if best == 1.0:
            return 1.0, False, f"{why}: the rate as it is was best"
        return best, True, f"{why}: x {best:g} was best"

    def _take_back(
        self, start: float, end: float, at: Callable[[float], float]
    ) -> tuple[float, bool, str]:
        risen = f"the target loss rose from {start:.4g} to {end:.4g}"
        if not self._allows(0.5):
            return 1.0, False, f"{risen}, at the lowest rate"
        factor = 0.25 if self.has_risen(start, at(0.5)) and self._allows(0.25) else 0.5
        return factor, True, f"{risen}: taken back, on at x {factor:g}"

    def _weigh(
        self, start: float, end: float, at: Callable[[float], float]
    ) -> tuple[float, bool, str]:
        slower, faster = (self._gain(end, at(factor)) for factor in (0.5, 2.0))
        gains = (self._gain(start, end), slower, faster)
        self.sums = [total / 2 + gain for total, gain in zip(self.sums, gains, strict=True)]
        self.num += 1
        progress, slower, faster = self.sums
        numbers = f"progress {progress:.3g}, at half {slower:+.3g}, at twice {faster:+.3g}"
        done = progress + self.rested
        lower = slower > max(done, -done)
        self.rested /= 2
        if self.num >= _PATIENCE_TO_LOWER and lower:
            return 0.5, False, f"{numbers}: half the rate gains more than training did"
        if self.num < self.patience:
            return 1.0, False, f"{numbers}: {self.patience - self.num} more windows to see"
        if faster > max(slower, _NOTICEABLE * abs(end)) and progress + faster > 0:
            return 2.0, False, f"{numbers}: twice the rate gains"
        if min(faster, -2 * slower) > _PROPORTIONAL * progress > 0:
            return 2.0, False, f"{numbers}: progress goes with the rate"
        bound = self.settings
        if not self._allows(2.0) or not self._allows(0.5):
            return 1.0, False, f"{numbers}; at a bound of [{bound.lowest:g}, {bound.highest:g}]"
        return 1.0, False, f"{numbers}: no reason to change"

    @staticmethod
    def _gain(before: float, after: float) -> float:
        """Fall of the loss; 0 within its resolution, or where the other side was not tried."""
        if math.isinf(after):
            return -abs(before)
        gain = before - after
        return gain if abs(gain) > _RESOLUTION * abs(before) else 0.0

    def _note(self, factor: float, *, is_calm: bool = False) -> None:
        if factor == 1.0:
            self.gap = min(max(self.settings.window, 2 * self.gap), self.settings.longest_gap)
            return
        direction = 1 if factor > 1 else -1
        if direction < self.direction:  # the last raise, or the rate at first, was too high
            self.patience = min(2 * self.patience, 16)
        self.direction, self.num, self.sums, self.rested = direction, 0, [0.0, 0.0, 0.0], 0.0
        if not is_calm:
            self.gap = 0  # the next window says whether the change was right


def as_integers(settings: object, *names: str) -> None:
    """Numpy's integers as Python's own."""
    for name in names:
        object.__setattr__(settings, name, int(getattr(settings, name)))
