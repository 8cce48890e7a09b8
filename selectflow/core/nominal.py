"""The nominal future: which part of each pool to come a look-ahead trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selectflow.core.batches import Batch, MicroBatches, num_examples, num_kept, take, through
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import Nominal, immediate
from selectflow.core.optim import State, Update

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
        return parts[0] if len(parts) == 1 else MicroBatches(parts)

    return batch


def random_order(generator: torch.Generator) -> Order:
    """Any part: what keeps estimates of the error truthful."""

    def order(_: int, state: State, pool: Batch) -> Tensor:
        del state
        return torch.randperm(num_examples(pool), generator=generator, device="cpu")

    return order


def policy_order(
    derivatives: Derivatives,
    updates: Sequence[Update],
    target: Batch,
    names: Sequence[str] | None,
    score_view: Callable[[Batch], Batch] | None,
) -> Order:
    """What selection at H = 0 would keep at the simulated state; arguments as of `immediate`."""

    def order(index: int, state: State, pool: Batch) -> Tensor:
        # A sensitivity of its own for each simulated step: a stale one misleads.
        present = immediate(derivatives, updates[index], state, target, names)
        seen = through(score_view, pool)
        _, slopes = derivatives.directional(state.params, present.sensitivities[0], seen)
        return slopes.argsort(stable=True)

    return order
