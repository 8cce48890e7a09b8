"""Changes of training along a window: what moves when alpha goes from 0 to 1.

One example is removed from the first update, all batches are exchanged for selected ones, or the
learning rate grows. Each is a `Perturbation`: a batch for each update and how the weights of its
examples, and the learning rate, change. `rollout` really makes the change, in part or whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.tangents import Shift
from selectflow.core.update import Update, after_skipping


@dataclass(frozen=True)
class Perturbation:
    """What moves with alpha along a window of updates, in M directions.

    Attributes:
        batches: what each update is made from, at any alpha.
        shifts: how the weights of its examples and its learning rate move, M rows each.
    """

    batches: Sequence[Batch]
    shifts: Sequence[Shift]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.shifts[0].weights)

    def beside(self, state: State) -> Perturbation:
        """The same in the type and on the device of a state's parameters."""
        like = next(iter(state.params.values()))

        def moved(shift: Shift) -> Shift:
            lr = None if shift.lr is None else shift.lr.to(like)
            return Shift(shift.base.to(like), shift.weights.to(like), lr)

        return Perturbation(self.batches, list(map(moved, self.shifts)))


def removals(batches: Sequence[Batch], positions: Sequence[int]) -> Perturbation:
    """M changes: each takes one example out of the first batch and leaves the mean of the rest.

    Args:
        batches: of the window, each trained on by its mean loss.
        positions: of the removed example in the first batch, M of them.

    Raises:
        ValueError: the first batch has one example only, or a position is not in it.
    """
    size = num_examples(batches[0])
    if size < 2:
        raise ValueError("a batch must keep an example, got only one in the first batch")
    if not all(0 <= position < size for position in positions):
        raise ValueError(f"positions must be in [0, {size - 1}], got {list(positions)}")
    shifts = [_still(batch, len(positions)) for batch in batches]
    without = (shifts[0].base - torch.eye(size).double()[list(positions)]) / (size - 1)
    return Perturbation(batches, [shifts[0]._replace(weights=without), *shifts[1:]])


def selection(
    pools: Sequence[Batch],
    nominal: Sequence[Tensor],
    selected: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None = None,
) -> Perturbation:
    """One change: every update is made from the selected examples of its pool, not the nominal.

    Args:
        pools: one for each update of the window, P examples.
        nominal: positions in each pool, shape (B,), int64.
        selected: positions in each pool, shape (B',), int64.
        weights: of the selected, shape (B',), in an update on their mean; None: 1 each.

    Raises:
        ValueError: a position that is not in its pool, or none at all.
    """
    batches, shifts = [], []
    weights = weights or [None] * len(selected)
    for pool, now, then, own in zip(pools, nominal, selected, weights, strict=True):
        size = num_examples(pool)
        base, goal = _means(now, size), _means(then, size, own)
        used = ((base != 0) | (goal != 0)).nonzero().flatten()  # no other example matters
        batches.append(take(pool, used))
        shifts.append(Shift(base[used], (goal - base)[None, used]))
    return Perturbation(batches, shifts)


def learning_rate(batches: Sequence[Batch], changes: Sequence[float]) -> Perturbation:
    """M changes of the learning rate: lr -> (1 + change) lr at every update.

    Args:
        batches: of the window, each trained on by its mean loss.
        changes: 1 doubles the rate, -0.5 halves it; M of them.
    """
    shares = torch.tensor(list(changes), dtype=torch.float64)
    shifts = [_still(batch, len(shares))._replace(lr=shares) for batch in batches]
    return Perturbation(batches, shifts)


def _still(batch: Batch, num: int) -> Shift:
    """The mean of a batch, which `num` directions leave as it is."""
    size = num_examples(batch)
    base = torch.full((size,), 1 / size, dtype=torch.float64)
    return Shift(base, base.new_zeros(num, size))


def _means(index: Tensor, size: int, weights: Tensor | None = None) -> Tensor:
    """Weights that make the mean over the examples at `index`, weighted or not, shape (P,)."""
    index = index.cpu()
    if not len(index) or not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"positions must be one or more in [0, {size - 1}], got {index.tolist()}")
    return torch.bincount(index, weights, minlength=size).double() / len(index)


# --- really rolling the window out ----------------------------------------------------------


def rollout(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    alphas: Sequence[float],
) -> Iterator[list[State]]:
    """States at some alphas, real updates all: those of horizon 0, then those after each update.

    Args:
        derivatives: of the training loss.
        updates: H >= 1 updates, in order.
        state: the state before the first.
        perturbation: H batches and their one shift.
        alphas: A numbers.

    Yields:
        H + 1 lists of A states.

    Raises:
        FloatingPointError: a training loss is not finite.
    """
    perturbation = perturbation.beside(state)
    batch, shift = perturbation.batches[0], perturbation.shifts[0]
    # At the common start gradients are linear in alpha: two give all.
    ends = [
        weighted_gradient(derivatives, state.params, batch, weights)
        for weights in (shift.base, shift.base + shift.weights[0])
    ]
    still, full = (Params({**state.params.zeros_like(), **grad}) for grad in ends)
    change, used = full - still, ends[0] | ends[1]
    move = updates[0].immediate(state, change)
    yield [state._replace(params=state.params.add(move, alpha)) for alpha in alphas]
    states = [state] * len(alphas)
    grads = [ends[int(a)] if a in (0, 1) else still.add(change, a).pick(used) for a in alphas]
    windows = [updates] * len(alphas)  # of each alpha: which parameters wait may differ
    for index, (batch, shift) in enumerate(
        zip(perturbation.batches, perturbation.shifts, strict=True)
    ):
        if index:
            grads = [
                weighted_gradient(
                    derivatives, at.params, batch, shift.base + alpha * shift.weights[0]
                )
                for at, alpha in zip(states, alphas, strict=True)
            ]
        windows = [
            after_skipping(window, index, grad) for window, grad in zip(windows, grads, strict=True)
        ]
        states = [
            _with_lr(window[index], shift, alpha).advance(at, grad)
            for window, at, grad, alpha in zip(windows, states, grads, alphas, strict=True)
        ]
        yield states


def weighted_gradient(
    derivatives: Derivatives, params: Params, batch: Batch, weights: Tensor
) -> Params:
    """`Derivatives.step_gradient` of the examples whose weight, shape (N,), is not 0."""
    used = weights.nonzero().flatten()
    if len(used) < len(weights):
        batch, weights = take(batch, used), weights[used]
    return derivatives.step_gradient(params, batch, weights)


def _with_lr(update: Update, shift: Shift, alpha: float) -> Update:
    return update if shift.lr is None else update.at_rate(1 + alpha * float(shift.lr[0]))
