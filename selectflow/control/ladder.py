"""The rule of the horizon: outcomes of contests in, how far to look out, or not to select at all.

The rungs of a ladder compete: no selection, then H = 0, 1, 2, 4, ... Each costs more than the one
below it, so two neighbours are compared at equal cost: each trains from the same state on the same
pools, in simulation, for as long as the other; the dearer one takes fewer steps. Each is judged at
the mean of the states it went through, on target examples that neither selected by. The last state
would mislead: what selects has less noise in its steps, a gain that comes at once and never grows.
With x_i how much lower the dearer one's loss of example i is, over n examples,

    lead = mean(x)        error = sd(x) / sqrt(n)

relative to the larger of the two losses. Over contests the mean counts, with weights 1, 1/2, 1/4,
..., the newest first, since training moves on; one that those before are far from counts alone.
The dearer one is taken at a lead of 1.5 times its error; it is left where the lead is no longer
above 0. In doubt it stays cheap.

Where the target loss jumps under plain training, selection begins without a contest (`distrust`).

A longer horizon also has to be trusted: the relative error rho of first order over the selection of
its window (`core.proxy`) must be below a tolerance to grow, below twice that to stay; and where the
trust ratio D / I is 0 or below, nothing that was simulated is believed, and the horizon is 0. Long
horizons fail because many batches remove the same residual and together overshoot; that is what
rho sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from selectflow.control.rules import Decision, as_integers
from selectflow.core.counts import is_count

OFF = -1
"""The lowest rung: nothing is selected, every pool is trained on in parts."""

_CLEAR = 1.5  # errors that a lead must exceed to be paid for
_REMEMBERED = 4  # contests of two rungs
_APART = 3.0  # errors between a lead and those before, at which the stream is taken for another


@dataclass(frozen=True)
class AutoHorizon:
    """Settings of the horizon control.

    Costs are in plain steps: the seconds of a training step on what is kept, without selection.

    Attributes:
        largest: largest horizon, >= 0.
        tolerance: relative error of first order that is accepted, in (0, 0.5).
        contest_steps: selected steps over which two rungs are compared, >= 2.
        gap: plain steps' cost between two contests, >= 1; doubles up to `longest_gap` while the
            horizon stays.
        longest_gap: the most.
        off: whether plain training competes, too.
        first: horizon that training begins with; None: plain training where it competes, since it
            teaches fastest at first and selection has to earn its seconds, else 0. A model that
            already tells good examples from bad, as in fine-tuning, begins better with 0.
        share: of the cost of training, which contests may take at the most, in (0, 1]; twice as
            much where the target loss has risen under plain training, and ever after it has jumped.
        early: cost that the first contests may take beyond that share, in plain steps; where the
            length of the run is known, the share of that, if it is more.
        early_share: of what was trained until then, that those may take at the most, > 0: a run may
            be over soon.
        late_share: of what is left to train, where that is known, that a contest may take, > 0.
        costs: plain steps that a selected step costs, by horizon; None: measured. With them the
            decisions do not depend on this machine's clock.

    Raises:
        ValueError: a setting out of its range.
    """

    largest: int = 8
    tolerance: float = 0.35
    contest_steps: int = 8
    gap: int = 100
    longest_gap: int = 3200
    off: bool = True
    first: int | None = None
    share: float = 0.05
    early: int = 150
    early_share: float = 0.25
    late_share: float = 1 / 3
    costs: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if not is_count(self.largest, 0) or not 0 < self.tolerance < 0.5:
            raise ValueError(
                "largest must be >= 0, an integer, and tolerance in (0, 0.5), got "
                f"{self.largest} and {self.tolerance}"
            )
        are_counts = all(map(is_count, (self.gap, self.longest_gap))) and is_count(self.early, 0)
        if not are_counts or self.gap > self.longest_gap or not is_count(self.contest_steps, 2):
            raise ValueError(
                "contest_steps must be >= 2, early >= 0, and 1 <= gap <= longest_gap, all "
                f"integers, got {self.contest_steps}, {self.early}, {self.gap} and "
                f"{self.longest_gap}"
            )
        if not 0 < self.share <= 1 or not min(self.early_share, self.late_share) > 0:
            raise ValueError(
                "share must be in (0, 1], early_share and late_share > 0, got "
                f"{self.share}, {self.early_share} and {self.late_share}"
            )
        as_integers(self, "largest", "contest_steps", "gap", "longest_gap", "early")
        if self.first is not None:
            if not is_count(self.first, 0) or self.first not in self.horizons:
                raise ValueError(
                    f"first must be one of the horizons {self.horizons}, or None, got "
                    f"{self.first!r}"
                )
            as_integers(self, "first")
        costs = self.costs
        if costs is not None and (sorted(costs) != self.horizons or not min(costs.values()) >= 1):
            raise ValueError(
                f"costs must have a number >= 1 for each of the horizons {self.horizons}, got "
                f"{dict(costs)}; name them all, or leave them to be measured"
            )

    @property
    def ladder(self) -> tuple[int, ...]:
        """The rungs that compete: OFF, if it may, then 0, 1, 2, 4, ... up to the largest."""
        return (*([OFF] if self.off else []), *self.horizons)

    @property
    def horizons(self) -> list[int]:
        """The rungs that select: 0, 1, 2, 4, ... up to the largest."""
        powers = (2**power for power in range(self.largest.bit_length()))
        return [0, *(step for step in powers if step <= self.largest)]


@dataclass(frozen=True)
class Outcome:
    """What a contest measured.

    Attributes:
        losses: mean of the judge's examples by rung; infinite where training diverged.
        error: standard error of their difference.
        cost: of a step of the dearer rung, in steps of the other.
        trust: the dearer rung's "relative_error" rho and "trust_ratio" D / I for the whole
            selection of a window; without them a horizon above 0 is not trusted.
    """

    losses: Mapping[int, float]
    error: float
    cost: float
    trust: Mapping[str, float] = field(default_factory=dict)

    def lead(self) -> tuple[float, float]:
        """How much lower the dearer rung's loss is, relative, in [-1, 1], and the error of that."""
        cheap, dear = (self.losses[rung] for rung in sorted(self.losses))
        if math.isinf(cheap) or math.isinf(dear):
            return float(dear < cheap) - float(cheap < dear), 0.0
        scale = max(abs(cheap), abs(dear))
        return ((cheap - dear) / scale, self.error / scale) if scale else (0.0, 0.0)


@dataclass
class HorizonRule:
    """The horizon, from contests between neighbours on the ladder.

    Attributes:
        settings: of the control; all else is state.
        horizon: H, or `OFF`.
        gap: cost of training to the next contest, in plain steps.
        upward: whether the next contest is with the rung above.
        leads: of the dearer rung and their errors in contests, by "cheaper-dearer".
    """

    settings: AutoHorizon
    horizon: int = field(init=False)
    gap: int = field(init=False)
    upward: bool = False
    leads: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.settings.first
        self.horizon = self.settings.ladder[0] if first is None else first
        self.gap = self.settings.gap

    def rival(self) -> int:
        """The rung that competes with the present one next."""
        ladder = self.settings.ladder
        place = ladder.index(self.horizon)
        upward = self.upward
        if place == 0 or place == len(ladder) - 1:
            upward = place == 0
        return ladder[min(place + 1, len(ladder) - 1)] if upward else ladder[place - 1]

    def decide(self, rival: int, outcome: Outcome) -> Decision:
        """What a contest of the present rung with its rival says."""
        before = self.horizon
        cheap, dear = sorted((before, rival))
        leads = self.leads.setdefault(f"{cheap}-{dear}", [])
        if leads and are_apart(recent(leads), outcome.lead()):
            leads.clear()
        leads.append(outcome.lead())
        del leads[:-_REMEMBERED]
        lead, error = recent(leads)
        self.horizon, why = self._winner(cheap, dear, lead, error, outcome)
        is_open = self.horizon != (dear if lead > 0 else cheap)
        is_unclear = is_open and self.horizon == dear  # the next contest is to say
        self.upward = not self.upward and not is_unclear
        if self.horizon != before or is_unclear or (is_open and abs(lead) > error):
            self.gap = self.settings.gap
        else:
            self.gap = min(2 * self.gap, self.settings.longest_gap)
        reason = (
            f"{named(dear)} is {abs(lead):.1%} +- {error:.1%} {'below' if lead > 0 else 'above'}"
            f" {named(cheap)} in the same time ({outcome.cost:.2g} of its steps to one): {why}"
        )
        measures = {f"loss_at_{_value(rung)}": loss for rung, loss in outcome.losses.items()}
        measures |= {"lead": lead, "lead_error": error, "cost": outcome.cost} | dict(outcome.trust)
        return Decision("horizon", _value(before), _value(self.horizon), reason, measures)

    def distrust(self, before: float, loss: float) -> Decision:
        """Select from now on, since the target loss has jumped under plain training."""
        was, self.horizon, self.gap = self.horizon, 0, self.settings.gap
        self.leads.clear()  # of a stream that is no more
        self.upward = False
        reason = (
            f"the target loss jumped from {before:.3g} to {loss:.3g} under plain training: what "
            "the stream has now does harm"
        )
        return Decision(
            "horizon", _value(was), 0, reason, {"loss_before": before, "loss_now": loss}
        )

    def _winner(
        self, cheap: int, dear: int, lead: float, error: float, outcome: Outcome
    ) -> tuple[int, str]:
        """The rung to be on, and why."""
        is_dear = self.horizon == dear
        if math.isinf(outcome.losses[dear]) and not math.isinf(outcome.losses[cheap]):
            return cheap, "it diverged"
        if dear > 0:
            ratio = outcome.trust.get("trust_ratio", math.nan)
            off = outcome.trust.get("relative_error", math.inf)
            # hysteresis: to stay takes less trust than to grow
            accepted = self.settings.tolerance * (2 if is_dear else 1)
            if ratio <= 0 and is_dear:
                return 0, f"its prediction has the wrong sign, trust ratio {ratio:.2f}"
            if off > accepted:
                return cheap, f"first order is off by {off:.0%}, more than {accepted:.0%}"
        if lead > (0.0 if is_dear else _CLEAR * error):
            return dear, "worth its cost"
        if is_dear and lead > -error and len(self.leads[f"{cheap}-{dear}"]) == 1:
            return dear, "not clear yet"
        return cheap, "not clearly worth its cost" if lead > 0 else "not worth its cost"


def recent(leads: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of leads, each weighing half of the one after it, and its error."""
    weights = [0.5**age for age in range(len(leads))][::-1]
    total = sum(weights)
    mean = sum(w * lead for w, (lead, _) in zip(weights, leads, strict=True)) / total
    error = math.sqrt(sum((w * e) ** 2 for w, (_, e) in zip(weights, leads, strict=True))) / total
    return mean, error


def are_apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two leads are apart by more than their errors explain; not where one diverged."""
    (lead, error), (other_lead, other_error) = one, other
    distance, errors = abs(lead - other_lead), math.hypot(error, other_error)
    return min(error, other_error) > 0 and distance > _APART * errors


def _value(rung: int) -> float | Literal["off"]:
    return "off" if rung == OFF else rung


def named(rung: int) -> str:
    return "plain training" if rung == OFF else f"H = {rung}"
