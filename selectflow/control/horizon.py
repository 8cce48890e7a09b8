"""The horizon of each look-ahead where it is given: a constant or a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Literal, Protocol

from selectflow.core.counts import as_count

Points = Sequence[tuple[int, int]]


class Horizon(Protocol):
    """Decides how far a look-ahead looks; asked once for each, when it is due."""

    @property
    def largest(self) -> int:
        """The largest horizon there will be: bounds the pools that are peeked at."""
        ...

    def at(self, step: int) -> int:
        """Horizon, >= 0, of a look-ahead made after `step` optimizer updates."""
        ...


@dataclass(frozen=True)
class HorizonSchedule:
    """The horizon of every optimizer step, given at some of them.

    Args:
        points: (step, horizon) pairs, steps rising from 0, horizons >= 0. Before the first step
            of the next pair the horizon is held; after the last pair too.
        shape: "step" holds each horizon until the next; "linear" goes there in equal parts,
            rounded to the nearest integer, halves up.

    Raises:
        ValueError: no pairs, steps that do not rise from 0, a horizon that is no integer >= 0.
    """

    points: Points
    shape: Literal["step", "linear"] = "step"

    def __post_init__(self) -> None:
        points = tuple(
            (as_count("step of a horizon schedule", step, 0), as_count("horizon", horizon, 0))
            for step, horizon in self.points
        )
        object.__setattr__(self, "points", points)
        steps = [step for step, _ in self.points]
        if not steps or steps[0] != 0 or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"steps of a horizon schedule must rise from 0, got {steps}")
        if self.shape not in ("step", "linear"):
            raise ValueError(f"shape must be 'step' or 'linear', got {self.shape!r}")

    @property
    def largest(self) -> int:
        return max(horizon for _, horizon in self.points)

    def at(self, step: int) -> int:
        """The horizon after `step` >= 0 optimizer updates."""
        before, first = max(point for point in self.points if point[0] <= step)
        later = [point for point in self.points if point[0] > step]
        if not later or self.shape == "step":
            return first
        after, last = later[0]
        span = after - before
        # whole numbers, so that no rounding error decides between two horizons
        return (2 * (first * span + (last - first) * (step - before)) + span) // (2 * span)


def as_horizon(value: int | Horizon) -> Horizon:
    """A constant as the schedule that always gives it; anything else as it is.

    Raises:
        ValueError: neither an integer >= 0 nor an object that decides horizons.
    """
    if not isinstance(value, Integral) and hasattr(value, "at") and hasattr(value, "largest"):
        return value
    return HorizonSchedule([(0, as_count("horizon", value, 0))])
