"""What contests are decided from: the rule, what was trained and spent, and measured costs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selectflow.control.ladder import AutoHorizon, HorizonRule
from selectflow.control.rules import restore, state_of
from selectflow.core.batches import Batch, to_device
from selectflow.core.plain import plain, restored

HELD = 1.25  # factor by which a measured cost must differ from the one in use to replace it
NUM_TIMES = 16  # steps of the user's loop whose median counts


@dataclass
class HorizonState:
    """What the next contests depend on.

    Attributes:
        rule: the horizon, and what contests said so far.
        generator: of the nominal batches of contests, and of the order of parts.
        training: what training has cost so far, in plain steps.
        spent: what contests have cost.
        next_at: cost of training at which the next contest is due.
        is_urgent: whether training has lost ground since the last one.
        has_jumped: whether the target loss has ever jumped: the stream is not to be trusted.
        costs: plain steps that a selected step costs, by horizon.
        overhead: what a contest costs, over the steps that it compares.
        times: seconds of the user's last steps.
        last_step: optimizer step that was counted last.
        judge: batch of the target that is looked at while nothing is selected; None: not yet.
        seen: loss on it at the last look; infinite before the first.
        best: losses of its examples at the look with the lowest, or under selection at the first;
            None before that.
        next_look: cost of training at the next look.
    """

    rule: HorizonRule
    generator: torch.Generator
    training: float = 0.0
    spent: float = 0.0
    next_at: float = 0.0
    is_urgent: bool = False
    has_jumped: bool = False
    costs: dict[int, float] = field(default_factory=dict)
    overhead: float = HELD
    times: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMES))
    last_step: int = -1
    judge: Batch | None = None
    seen: float = math.inf
    best: Tensor | None = None
    next_look: float = 0.0

    @classmethod
    def begin(cls, settings: AutoHorizon, seed: int) -> HorizonState:
        """The state of a run that begins: moments are empty, so the first contest comes later."""
        costs = dict(settings.costs or {})
        generator = torch.Generator().manual_seed(seed)
        return cls(HorizonRule(settings), generator, next_at=settings.gap, costs=costs)

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self) | {
            "rule": state_of(self.rule),
            "generator": self.generator.get_state(),
            "costs": list(self.costs.items()),
            "times": list(self.times),
            "judge": None if self.judge is None else plain(self.judge),
        }

    def load(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Go on from `plain`, with the batch that is looked at on `device`."""
        restore(self.rule, saved["rule"])
        self.generator.set_state(saved["generator"])
        self.costs = dict(saved["costs"])
        self.times = deque(saved["times"], NUM_TIMES)
        judge = saved["judge"]
        self.judge = None if judge is None else to_device(restored(judge), device)
        best = saved.get("best")
        self.best = None if best is None else best.to(device)
        others = {"rule", "generator", "costs", "times", "judge", "best"}
        for name in saved.keys() & vars(self).keys() - others:  # an older state has fewer
            setattr(self, name, saved[name])
