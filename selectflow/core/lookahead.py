"""The look-ahead: a nominal rollout of H optimizer updates, then the adjoint sweep back.

The rollout simulates updates t .. t+H-1 on nominal batches, parts of the pools to come. States are
passed through pure functions, so the live model and optimizer never move. The target loss is read
at its end; the sweep (`sweep`) carries its derivative back and leaves, for each update, the
sensitivity gamma = d target / d (batch gradient of that update). What an example z would do to the
target, if it entered the batch of that update, is then gamma . grad loss_z. Deng et al. 2026,
arXiv 2605.18814, K-step look-ahead.

`Policy` chooses examples by it: look ahead, score a pool, keep the best; also in simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selectflow.core.batches import (
    Batch,
    as_one,
    in_parts,
    num_examples,
    num_kept,
    take,
    through,
    weighted,
)
from selectflow.core.clock import work_s
from selectflow.core.derivatives import Curvature, Derivatives
from selectflow.core.optim import Adjoint, State
from selectflow.core.params import Params, measured
from selectflow.core.storage import Offload, keeping
from selectflow.core.sweep import Nominal, SweepStep, Window, sweep, sweep_capacity
from selectflow.core.update import Update, after_skipping
from selectflow.core.weighted import relu_weights

NominalChoice = Literal["random", "policy"]
Weighting = Literal["none", "relu"]


@dataclass(frozen=True)
class LookAhead:
    """What one look-ahead found.

    Attributes:
        horizon: H, updates simulated.
        target_loss: mean loss of the target batch after them.
        sensitivities: gamma of updates 0, 1, ... of the window, as many as were asked for, for
            scoring new examples (`Update.masked`). Units: target loss per unit of gradient.
    """

    horizon: int
    target_loss: float
    sensitivities: list[Params]

    @cached_property
    def norms(self) -> list[float]:
        """Euclidean norm of each sensitivity, read from the device once."""
        return [size.norm for size in measured(*self.sensitivities)]

    def is_zero(self, update: int) -> bool:
        """Whether `gamma(update)` is 0, so that no example is better than another."""
        return not self.norms[min(update, len(self.norms) - 1)]

    def gamma(self, update: int) -> Params:
        """Sensitivity of an update of the window; beyond the last one there is, that one."""
        return self.sensitivities[min(update, len(self.sensitivities) - 1)]


def look_ahead(
    window: Window,
    state: State,
    target: Batch,
    *,
    num_sensitivities: int = 1,
    memory_gib: float | None = None,
    names: Sequence[str] | None = None,
    offload: Offload = "none",
) -> LookAhead:
    """Sensitivities of the target loss to the batch gradients of the window's first updates.

    Args:
        window: H >= 1 updates.
        state: the state before the first; is not changed.
        target: batch whose mean loss is the target.
        num_sensitivities: how many gammas to return, from the window's start.
        memory_gib: limit for the states that the sweep keeps, in GiB, wherever they are; None: 1,
            or the least that the horizon needs.
        names: parameters to restrict the gammas to when they are returned; None: all. Rollout
            and sweep always go through all: gamma . grad loss_z is then exactly the part of the
            influence that example z has through its gradient at these parameters.
        offload: where the sweep keeps them, see `storage.keeping`.

    Returns:
        The target loss after H updates and min(H, num_sensitivities) gammas.

    Raises:
        ValueError: the limit is too small for any schedule of snapshots.
        FloatingPointError: a loss or a sensitivity is not finite.
    """
    target_loss = math.nan
    gammas: dict[int, Params] = {}

    def read_target(end: State) -> Adjoint:
        nonlocal target_loss
        target_loss, grad = window.derivatives.gradient(end.params, target)
        return Adjoint(grad, end.exp_avg.zeros_like(), end.exp_avg_sq.zeros_like())

    def keep(step: SweepStep) -> None:
        if step.index < num_sensitivities:
            gamma = window.updates[step.index].masked(step.gamma, step.after)
            gammas[step.index] = gamma if names is None else gamma.pick(names)

    horizon = len(window.updates)
    capacity = sweep_capacity(state, horizon, memory_gib)
    with keeping(offload) as put:
        sweep(window, state, read_target, keep, capacity, put=put)
    return _checked(LookAhead(horizon, target_loss, [gammas[index] for index in sorted(gammas)]))


def immediate(
    derivatives: Derivatives,
    update: Update,
    state: State,
    target: Batch,
    names: Sequence[str] | None = None,
) -> LookAhead:
    """The look-ahead at H = 0: the target gradient through the present preconditioner.

    Nothing is simulated: a is the gradient of the target loss at the present parameters, and
    gamma what the next update makes of it with the second moments as they are.

    Args:
        derivatives: of the training loss.
        update: the next update.
        state: the state before it.
        target: batch whose mean loss is the target.
        names: parameters to restrict gamma to; None: all. Only their gradient is computed.

    Returns:
        The present target loss and one gamma.

    Raises:
        FloatingPointError: a loss or the sensitivity is not finite.
    """
    target_loss, grad = derivatives.gradient(state.params, target, names=names)
    return _checked(LookAhead(0, target_loss, [update.immediate(state, grad)]))


def _checked(ahead: LookAhead) -> LookAhead:
    """The look-ahead, if its sensitivities are finite."""
    for index, (gamma, norm) in enumerate(zip(ahead.sensitivities, ahead.norms, strict=True)):
        if not math.isfinite(norm):
            bad = [name for name, tensor in gamma.items() if not tensor.isfinite().all()]
            raise FloatingPointError(
                f"sensitivities must be finite, got a non-finite value at update {index} of the "
                f"look-ahead in {', '.join(bad) or 'their norm'}; lower the learning rate or the "
                "horizon"
            )
    return ahead


# --- the nominal future ---------------------------------------------------------------------------

Order = Callable[[int, State, Batch], Tensor]
"""Positions in a pool of update i, given the state before it; the first are trained on."""


def nominal_batches(
    pools: Sequence[Batch], pools_per_update: int, keep: int | float, order: Order
) -> Nominal:
    """The batch of each simulated update: the first of each of its pools, in the order given.

    Args:
        pools: of all updates; the last may have fewer than the others.
        pools_per_update: pools that make one update.
        keep: examples kept of each pool, a count or a fraction.
        order: of the examples of a pool.
    """

    def batch(index: int, state: State) -> Batch:
        parts = []
        for pool in pools[index * pools_per_update : (index + 1) * pools_per_update]:
            positions = order(index, state, pool)
            parts.append(take(pool, positions[: num_kept(keep, len(positions))]))
        return as_one(parts)

    return batch


def random_order(generator: torch.Generator) -> Order:
    """Any part: what keeps estimates of the error truthful."""

    def order(_: int, state: State, pool: Batch) -> Tensor:
        del state
        return torch.randperm(num_examples(pool), generator=generator, device="cpu")

    return order


# --- the policy: look ahead, score, keep ----------------------------------------------------------


class Upcoming(NamedTuple):
    """Where training is, and the updates and data that come next.

    Attributes:
        updates: the next optimizer updates, in order.
        state: before the first of them.
        pools: the next pools, the present one first.
        target: batch whose mean loss is the target, as it is scored.
    """

    updates: Sequence[Update]
    state: State
    pools: Sequence[Batch]
    target: Batch

    def after_pools(self, num: int) -> Upcoming:
        """The same once the first `num` pools are used."""
        return self._replace(pools=self.pools[num:])


@dataclass(frozen=True)
class Policy:
    """How examples are chosen; the options of `Selector` of the same names say more.

    Attributes:
        derivatives: of the training loss.
        names: gives the parameters that scores are taken over; None: all.
        keep: examples kept of each pool.
        interval: gives the optimizer steps between two look-aheads.
        curvature: Hessian of the look-ahead.
        nominal: which part of each pool the look-ahead simulates.
        pools_per_update: pools that make one optimizer step.
        score_view: makes of a batch what is scored; None: the batch itself.
        memory_gib: limit for the states of a look-ahead; None: 1 GiB, or the least that is needed.
        offload: where those states are kept.
        is_frozen: whether the model stays as it is: it only scores.
        weighting: how what is kept is weighted in an update.
    """

    derivatives: Derivatives
    names: Callable[[], tuple[str, ...] | None]
    keep: int | float
    interval: Callable[[], int]
    curvature: Curvature
    nominal: NominalChoice
    pools_per_update: int
    score_view: Callable[[Batch], Batch] | None
    memory_gib: float | None
    offload: Offload = "none"
    is_frozen: bool = False
    weighting: Weighting = "none"

    def look_ahead(
        self,
        horizon: int,
        upcoming: Upcoming,
        generator: torch.Generator,
        num_sensitivities: int | None = None,
    ) -> LookAhead:
        """Sensitivities of the next updates, over as many of H as the pools last for.

        Args:
            horizon: H, >= 0.
            upcoming: max(1, H) updates or more.
            generator: chooses the nominal batches.
            num_sensitivities: how many at most; None: those until the next look-ahead.
        """
        updates, state, pools, target = upcoming
        names = self.names()
        if horizon == 0:
            with self.derivatives.objective.summing():
                return immediate(self.derivatives, updates[0], state, target, names)
        num_updates = min(horizon, math.ceil(len(pools) / self.pools_per_update))
        order = random_order(generator)
        if self.nominal == "policy":
            order = self._immediate_order(updates, target, names)
        nominal = nominal_batches(pools, self.pools_per_update, self.keep, order)
        window = Window(self.derivatives, updates[:num_updates], nominal, self.curvature)
        with self.derivatives.objective.summing():
            return look_ahead(
                window,
                state,
                target,
                num_sensitivities=num_sensitivities or self.interval(),
                memory_gib=self.memory_gib,
                names=names,
                offload=self.offload,
            )

    def scores(self, gamma: Params, state: State, pool: Batch) -> Tensor:
        """-gamma . grad loss of each example of a pool, shape (P,)."""
        seen = through(self.score_view, pool)
        with self.derivatives.group.together(), self.derivatives.objective.summing():
            _, slopes = self.derivatives.directional(state.params, gamma, seen)
        return -slopes

    def choice(self, gamma: Params, state: State, pool: Batch) -> tuple[Tensor, Tensor | None]:
        """Positions that are kept of a pool, the best first, and their weights; None: 1 each."""
        scores = self.scores(gamma, state, pool)
        positions = _best_first(scores)[: num_kept(self.keep, len(scores))]
        return positions, relu_weights(scores[positions]) if self.weighting == "relu" else None

    def kept(self, gamma: Params, state: State, pool: Batch) -> Batch:
        """What is kept of a pool, weighted as it is trained on."""
        positions, weights = self.choice(gamma, state, pool)
        return weighted(take(pool, positions), weights)

    def _immediate_order(
        self, updates: Sequence[Update], target: Batch, names: Sequence[str] | None
    ) -> Order:
        """What selection at H = 0 would keep at the simulated state."""

        def order(index: int, state: State, pool: Batch) -> Tensor:
            # A sensitivity of its own for each simulated step: a stale one misleads.
            present = immediate(self.derivatives, updates[index], state, target, names)
            return _best_first(self.scores(present.gamma(0), state, pool))

        return order

    def select_and_train(
        self, horizon: int, upcoming: Upcoming, generator: torch.Generator
    ) -> Iterator[tuple[State, Batch, float]]:
        """Select and train in simulation, one step after another.

        Args:
            horizon: H of its look-aheads.
            upcoming: updates and pools, until which the steps last.
            generator: chooses the nominal batches.

        Yields:
            The state after each step, the batch that was kept for it, and the seconds that
            selecting took.
        """
        per, device = self.pools_per_update, upcoming.state.params.device
        interval = self.interval()
        for step in range(min(len(upcoming.updates), len(upcoming.pools) // per)):
            began = work_s(device)
            if step % interval == 0:
                ahead = self.look_ahead(horizon, upcoming, generator)
            state, gamma = upcoming.state, ahead.gamma(step % interval)
            pools = upcoming.pools[:per]
            kept = as_one([self.kept(gamma, state, pool) for pool in pools])
            seconds = work_s(device) - began
            upcoming = self.trained(upcoming, kept).after_pools(per)
            yield upcoming.state, kept, seconds

    def train(self, upcoming: Upcoming, generator: torch.Generator) -> Iterator[State]:
        """Train on all of the pools in simulation, in parts of as many examples as are kept.

        Args:
            upcoming: updates and pools, until which the steps last.
            generator: of the order of each pool.

        Yields:
            The state after each step.
        """
        parts: list[Batch] = []
        for pool in upcoming.pools:
            size = num_examples(pool)
            num = self.derivatives.group.least(size // num_kept(self.keep, size))
            parts += in_parts(pool, num, generator)
            while len(parts) >= self.pools_per_update and upcoming.updates:
                batch = as_one(parts[: self.pools_per_update])
                del parts[: self.pools_per_update]
                upcoming = self.trained(upcoming, batch)
                yield upcoming.state

    def trained(self, upcoming: Upcoming, batch: Batch) -> Upcoming:
        """The state and the updates to come after one update on a batch."""
        if self.is_frozen:
            return upcoming._replace(updates=upcoming.updates[1:])
        grad = self.derivatives.step_gradient(upcoming.state.params, batch)
        update, *later = after_skipping(upcoming.updates, 0, grad)
        with self.derivatives.objective.summing():
            return upcoming._replace(updates=later, state=update.advance(upcoming.state, grad))


def _best_first(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)
