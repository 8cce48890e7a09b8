"""The selection policy: look ahead, score a pool, keep the best; and the same in simulation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selectflow.core.batches import Batch, MicroBatches, num_examples, num_kept, take, through
from selectflow.core.derivatives import Curvature, Derivatives
from selectflow.core.lookahead import LookAhead, Window, immediate, look_ahead
from selectflow.core.nominal import nominal_batches, policy_order, random_order
from selectflow.core.offload import Offload
from selectflow.core.optim import State, Update
from selectflow.core.params import Params

NominalChoice = Literal["random", "policy"]


class Outlook(NamedTuple):
    """Where training stands, and what it is about to meet.

    Attributes:
        updates: the next optimizer updates, in order.
        state: before the first of them.
        pools: the pools to come, the present one first.
        target: batch whose mean loss is the target, as it is scored.
    """

    updates: Sequence[Update]
    state: State
    pools: Sequence[Batch]
    target: Batch

    def after(self, num_updates: int, num_pools: int, state: State) -> Outlook:
        """The outlook at a later state."""
        return Outlook(self.updates[num_updates:], state, self.pools[num_pools:], self.target)


@dataclass(frozen=True)
class Policy:
    """How examples are chosen; the arguments of `Selector` of the same names say more.

    Attributes:
        derivatives: of the training loss.
        keep: examples kept of each pool.
        interval: optimizer steps between two look-aheads.
        curvature: Hessian of the look-ahead.
        nominal: which part of each pool the look-ahead simulates.
        pools_per_update: pools that make one optimizer step.
        score_view: what is scored in a batch's stead.
        memory_gib: limit for the states of a look-ahead; None: 1 GiB, or the least that is needed.
        names: gives the parameters that scores are taken over; None: all.
        offload: where those states are kept.
    """

    derivatives: Derivatives
    keep: int | float
    interval: int
    curvature: Curvature
    nominal: NominalChoice
    pools_per_update: int
    score_view: Callable[[Batch], Batch] | None
    memory_gib: float | None
    names: Callable[[], tuple[str, ...] | None]
    offload: Offload = "none"

    def look_ahead(
        self,
        horizon: int,
        outlook: Outlook,
        generator: torch.Generator,
        num_sensitivities: int | None = None,
    ) -> LookAhead:
        """Sensitivities of the next updates, over as many of H as the pools last for.

        Args:
            horizon: H, >= 0.
            outlook: max(1, H) updates or more.
            generator: chooses the nominal batches.
            num_sensitivities: how many at most; None: those until the next look-ahead.
        """
        updates, state, pools, target = outlook
        names = self.names()
        if horizon == 0:
            return immediate(self.derivatives, updates[0], state, target, names)
        num_updates = min(horizon, math.ceil(len(pools) / self.pools_per_update))
        order = random_order(generator)
        if self.nominal == "policy":
            order = policy_order(self.derivatives, updates, target, names, self.score_view)
        nominal = nominal_batches(pools, self.pools_per_update, self.keep, order)
        return look_ahead(
            Window(self.derivatives, updates[:num_updates], nominal, self.curvature),
            state,
            target,
            num_sensitivities=num_sensitivities or self.interval,
            memory_gib=self.memory_gib,
            names=names,
            offload=self.offload,
        )

    def positions(self, gamma: Params, state: State, pool: Batch) -> Tensor:
        """Positions that are kept of a pool, best first."""
        _, slopes = self.derivatives.directional(
            state.params, gamma, through(self.score_view, pool)
        )
        return slopes.argsort(stable=True)[: num_kept(self.keep, num_examples(pool))]

    def roll(
        self,
        horizon: int,
        outlook: Outlook,
        generator: torch.Generator,
        num_steps: int,
    ) -> tuple[State, float]:
        """Select and train for `num_steps` steps in simulation.

        Args:
            horizon: H of its look-aheads.
            outlook: num_steps + H updates and their pools; is not changed.
            generator: chooses the nominal batches.
            num_steps: >= 1.

        Returns:
            The state after the steps, and the mean seconds of one.
        """
        began, per = time.perf_counter(), self.pools_per_update
        for step in range(num_steps):
            if step % self.interval == 0:
                ahead = self.look_ahead(horizon, outlook, generator)
            state, gammas = outlook.state, ahead.sensitivities
            gamma = gammas[min(step % self.interval, len(gammas) - 1)]
            kept = [take(pool, self.positions(gamma, state, pool)) for pool in outlook.pools[:per]]
            batch = kept[0] if len(kept) == 1 else MicroBatches(kept)
            _, grad = self.derivatives.gradient(state.params, batch)
            outlook = outlook.after(1, per, outlook.updates[0].advance(state, grad))
        return outlook.state, (time.perf_counter() - began) / num_steps
