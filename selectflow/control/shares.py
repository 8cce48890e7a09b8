"""The shares of the sources of a stream: scheduled, or following a selection. Plain numbers only.

Of the candidates of source i that were scored lately, n_i, selection kept k_i; both counts lose
1 / memory of themselves with each pool. With r = sum k / sum n, the kept rate of all, and m
candidates at that rate added to each source, its relative kept rate is

    a_i = (k_i + m r) / ((n_i + m) r)        1: as all; 2: kept twice as often; without unit

A source of few candidates stays near 1: its own rate would be noise. (The standard error of log a_i
is largest for a source of n_i = m, about sqrt((1 - r) / (r m)) / 3.) Of all shares p the live ones
make the mean log a the largest at a price for the drift from the starting shares q,

    max_p  sum_i p_i log a_i - KL(p || q) / s        =>        p_i ~ q_i a_i^s

which is where exponentiated-gradient steps p_i <- p_i a_i^eta with a pull of eta / s towards q come
to rest. Taken in one go nothing adds up from pool to pool but the counts: sources that do not
differ stay at q, within the noise of their rates, and one that changed is seen after some `memory`
pools.

The drift KL(p || q) in nats rises with s, since its derivative is s Var_p(log a). Where it would
exceed its bound, the exponent is the smaller one that meets it: so the stream does not collapse on
one source that the target set happens to resemble. At last each source gets `floor` of its starting
share, p <- (1 - floor) p + floor q, so that it is seen when it changes.

Exponentiated updates on domain losses (as online data mixing and DoReMi) are the same with log a_i
= the mean loss of a source less that of all: more of what is learnt least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from selectflow.control.rules import Decision
from selectflow.core.counts import is_count

Floats = npt.NDArray[np.float64]

_STRENGTH = {"kept": 16.0, "loss": 1.0}
_HALVINGS = 30  # of the interval of the exponent: to a billionth of it


@dataclass(frozen=True)
class AutoShares:
    """Settings of live shares.

    Attributes:
        follow: "kept": the kept rate of each source; "loss": its mean loss, a baseline.
        start: starting share of each source, on any positive scale; None: in proportion to size.
        strength: s, the exponent of the relative kept rate, > 0; per unit of loss where these are
            followed. None: 16, and 1 per unit of loss.
        memory: pools after which a count has lost about two thirds, >= 1.
        prior: m, candidates of the mean rate that are added to each source, > 0.
        floor: share of its starting share that a source keeps in any case, in (0, 1].
        drift: most nats between starting and live shares, before the floor, > 0.
        delay: pools between a selection and the first pool that may follow it, >= 0. Those that a
            look-ahead peeks at and that workers read ahead have to be fewer.
    """

    follow: Literal["kept", "loss"] = "kept"
    start: Mapping[str, float] | None = None
    strength: float | None = None
    memory: float = 100.0
    prior: float = 512.0
    floor: float = 0.1
    drift: float = 1.0
    delay: int = 24

    def __post_init__(self) -> None:
        if self.follow not in ("kept", "loss"):
            raise ValueError(f"follow must be 'kept' or 'loss', got {self.follow!r}")
        if not is_count(self.delay, 0):
            raise ValueError(f"delay must be an integer >= 0, got {self.delay!r}; it is of pools")
        rules = {
            "strength": 0 < self.exponent < math.inf,
            "memory": 1 <= self.memory < math.inf,
            "prior": 0 < self.prior < math.inf,
            "floor": 0 < self.floor <= 1,
            "drift": self.drift > 0,
        }
        if wrong := [name for name, holds in rules.items() if not holds]:
            raise ValueError(
                "live shares must have finite strength > 0, memory >= 1, prior > 0, floor in "
                f"(0, 1] and drift > 0, got {wrong[0]}={getattr(self, wrong[0])}"
            )

    @property
    def exponent(self) -> float:
        """The strength that holds."""
        return _STRENGTH[self.follow] if self.strength is None else self.strength


def log_rates(num: Floats, kept: Floats, prior: float) -> Floats:
    """Log of the relative kept rate of each source, log a_i above; 0 where nothing was kept.

    Args:
        num: candidates of each source that were scored, shape (S,), >= 0.
        kept: those of them that were kept, or the sum of their weights, shape (S,), >= 0.
        prior: m, > 0.
    """
    if not kept.sum() > 0:
        return np.zeros_like(num)
    rate = kept.sum() / num.sum()
    return np.asarray(np.log((kept + prior * rate) / ((num + prior) * rate)))


def loss_gains(num: Floats, losses: Floats, prior: float) -> Floats:
    """Mean loss of each source less that of all, in the loss's unit; 0 where there was none.

    Args:
        num: candidates of each source with a loss, shape (S,), >= 0.
        losses: sum of their losses, shape (S,).
        prior: candidates of the mean loss that are added to each source, > 0.
    """
    if not num.sum() > 0:
        return np.zeros_like(num)
    mean = losses.sum() / num.sum()
    return np.asarray((losses + prior * mean) / (num + prior) - mean)


def live_shares(start: Floats, gains: Floats, settings: AutoShares) -> Floats:
    """The shares for these gains, in sum 1.

    Args:
        start: q, shape (S,), > 0, in sum 1.
        gains: log a_i, shape (S,).
        settings: strength, drift and floor of them.
    """
    found = _tilted(start, gains, settings.exponent)
    if drift(found, start) > settings.drift:
        low, high = 0.0, settings.exponent
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = drift(_tilted(start, gains, middle), start) <= settings.drift
            low, high = (middle, high) if fits else (low, middle)
        found = _tilted(start, gains, low)
    return (1 - settings.floor) * found + settings.floor * start


def drift(shares: Floats, start: Floats) -> float:
    """KL(shares || start), in nats, >= 0."""
    held = shares > 0
    return float((shares[held] * np.log(shares[held] / start[held])).sum())


def _tilted(start: Floats, gains: Floats, strength: float) -> Floats:
    """Shares in proportion to start exp(strength gains)."""
    logs = strength * gains
    found = start * np.exp(logs - logs.max())
    return np.asarray(found / found.sum())


def moved_most(
    before: Mapping[str, float],
    after: Mapping[str, float],
    kept: Mapping[str, float | None],
    step: int,
) -> Decision | None:
    """What live shares did over some steps, told of the source whose share rose most.

    Args:
        before: shares by source; {} where they are not known.
        after: shares `step` optimizer updates after the start.
        kept: of each source the part of its candidates that was kept meanwhile; None: it had none.
        step: optimizer updates made.

    Returns:
        None where no share changed, or the source had no candidates.
    """
    name = max(before, key=lambda name: after[name] - before[name], default="")
    part = kept.get(name)
    if part is None or after[name] == before[name]:
        return None
    reason = f"of all sources, {name} rose most: {part:.1%} of its candidates were kept"
    return Decision("share", before[name], after[name], reason, {"kept": part}, step)


@dataclass(frozen=True)
class ShareSchedule:
    """The shares of the sources pool by pool, given at some of them.

    Args:
        points: (pool, shares by source) pairs; pools rise from 0, the first of the stream; shares
            are >= 0, on any positive scale.
        shape: "linear" goes from one to the next in equal parts; "step" holds each until the next.

    Raises:
        ValueError: no pairs, pools that do not rise from 0, sources that differ, a share below 0.
    """

    points: Sequence[tuple[int, Mapping[str, float]]]
    shape: Literal["linear", "step"] = "linear"

    def __post_init__(self) -> None:
        pools = [pool for pool, _ in self.points]
        if not pools or pools[0] != 0 or any(a >= b for a, b in pairwise(pools)):
            raise ValueError(f"pools of a share schedule must rise from 0, got {pools}")
        if self.shape not in ("linear", "step"):
            raise ValueError(f"shape must be 'linear' or 'step', got {self.shape!r}")
        for _, shares in self.points:
            are_fine = all(0 <= share < math.inf for share in shares.values())
            if set(shares) != set(self.points[0][1]) or not are_fine or not any(shares.values()):
                raise ValueError(
                    "shares of a schedule must be numbers >= 0, not all 0, of the same sources at "
                    f"each point, got {dict(shares)}"
                )

    def at(self, pool: int, names: Sequence[str]) -> Floats:
        """The shares of the sources `names` in a pool >= 0, in sum 1."""
        place = max(i for i, (first, _) in enumerate(self.points) if first <= pool)
        first, shares = self.points[place]
        now = _normed(shares, names)
        if self.shape == "step" or place + 1 == len(self.points):
            return now
        last, shares = self.points[place + 1]
        part = (pool - first) / (last - first)
        return (1 - part) * now + part * _normed(shares, names)


def _normed(shares: Mapping[str, float], names: Sequence[str]) -> Floats:
    found = np.array([shares[name] for name in names], dtype=np.float64)
    return np.asarray(found / found.sum())
