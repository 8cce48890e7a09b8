"""Reruns of a recorded stretch with other example weights, many at once; replays of sparse ones."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples
from selectflow.core.derivatives import Curvature, Derivatives, plain_attention
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.core.passes import Objective
from selectflow.core.sweep import Window
from selectflow.core.tangents import Shift, StateTangents, advance, loss_tangents
from selectflow.core.update import Update, after_skipping
from selectflow.core.weight_changes import Perturbation, weighted_gradient
from selectflow.offline.trajectory import Trajectory


@dataclass(frozen=True, order=True)
class Removal:
    """One example to take out of one update.

    Attributes:
        index: of the update.
        position: of the example in its batch.
        end: index of the state at which the queries are read.
    """

    index: int
    position: int
    end: int


def weights_without(removals: Sequence[Removal], index: int, size: int, like: Tensor) -> Tensor:
    """Example weights of update `index` in each rerun, shape (M, B): the mean of the rest."""
    weights = like.new_full((len(removals), size), 1 / size)
    for row, removal in enumerate(removals):
        if removal.index == index:
            weights[row] = 1 / (size - 1)
            weights[row, removal.position] = 0
    return weights


def rerun(trajectory: Trajectory, queries: Batch, removals: Sequence[Removal]) -> Tensor:
    """What each removal really does to each query's loss.

    A further row runs with nothing removed, in the same arithmetic as the others: rounding that
    all share does not enter the difference.

    Args:
        removals: M of them; the reruns begin at the first update of any.

    Returns:
        Loss after minus loss before, shape (M, N).

    Raises:
        RuntimeError: the row with nothing removed does not arrive where the recording did.
    """
    objective, num = trajectory.derivatives.objective, len(removals)
    start = trajectory.state(min(removal.index for removal in removals))
    state = _repeated(start, num + 1)
    changes = like_of(trajectory).new_zeros(num, num_examples(queries))
    with objective.scoring():
        for index, batch, base, weights, rows in _visits(trajectory, removals):
            rest = torch.cat([weights, base[None]])
            nominal = _rows(state, num).params
            used = trajectory.derivatives.step_gradient(nominal, batch)
            state = _step(trajectory.updates[index], objective, state, batch, rest, used)
            if rows:
                losses = _losses(objective, _rows(state, [*rows, num]).params, queries)
                changes[rows] = losses[:-1] - losses[-1]
    trajectory.check_replay(index + 1, _rows(state, num), start)
    return changes


def expand(
    trajectory: Trajectory, queries: Batch, removals: Sequence[Removal]
) -> tuple[Tensor, Tensor]:
    """First- and second-order parts, I and Q, of what each removal does to each query's loss.

    The weights move from nominal (alpha = 0) to the removal (alpha = 1); with phi(alpha) the
    query's loss, I = phi'(0) and Q = phi''(0) / 2, by forward tangents (`tangents`).

    Returns:
        I and Q, both of shape (M, N).

    Raises:
        RuntimeError: the replay leaves the recording.
    """
    objective, num = trajectory.derivatives.objective, len(removals)
    start = trajectory.state(min(removal.index for removal in removals))
    motion = StateTangents.at_rest(start, num)
    first, second = like_of(trajectory).new_zeros(2, num, num_examples(queries))
    with objective.scoring():
        for index, batch, base, weights, rows in _visits(trajectory, removals):
            shift = Shift(base, weights - base)
            used = trajectory.derivatives.step_gradient(motion.value.params, batch)
            motion = advance(trajectory.updates[index], objective, motion, batch, shift, used)
            if rows:
                tangents = (_rows(each, rows) for each in (motion.first, motion.second))
                read = StateTangents(motion.value, *tangents)
                first[rows], second[rows] = loss_tangents(objective, read, queries)
    trajectory.check_replay(index + 1, motion.value, start)
    return first, second / 2


def _visits(
    trajectory: Trajectory, removals: Sequence[Removal]
) -> Iterator[tuple[int, Batch, Tensor, Tensor, list[int]]]:
    """Updates from the first removal on: batch, its nominal weights, all weights, rows to read."""
    like = like_of(trajectory)
    for index in range(min(r.index for r in removals), max(r.end for r in removals)):
        batch = trajectory.batches[index]
        size = num_examples(batch)
        base = like.new_full((size,), 1 / size)
        weights = weights_without(removals, index, size, like)
        rows = [row for row, removal in enumerate(removals) if removal.end == index + 1]
        yield index, batch, base, weights, rows


def like_of(trajectory: Trajectory) -> Tensor:
    """A tensor of the precision and on the device of the run."""
    return next(iter(trajectory.snapshots.state(0).params.values()))


def effects(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    target: Batch,
) -> Tensor:
    """What each change of weights really does to the target loss, D_h for h = 0 .. H.

    The ground truth of `proxy.closed_form`: at h = 0 the target loss is read after the move through
    the present preconditioner, then after each update really made.

    Args:
        updates: H >= 1 updates, in order.
        state: the state before the first.
        perturbation: H batches and their M shifts, at learning rates at rest.
        target: batch whose mean loss is the target.

    Returns:
        Loss with the change minus loss without it, shape (M, H + 1).

    Raises:
        ValueError: the learning rate moves.
    """
    if any(shift.lr is not None for shift in perturbation.shifts):
        raise ValueError("perturbation must leave the learning rate alone; `rollout` takes any")
    objective, perturbation = derivatives.objective, perturbation.beside(state)
    first = perturbation.shifts[0].weights
    found = []
    with objective.scoring():
        _, change = derivatives.gradients(state.params, perturbation.batches[0], first)
        move = updates[0].immediate(state, change)
        moved = _losses(objective, state.params + move, target)
        found.append((moved - derivatives.losses(state.params, target)).mean(1))
        states = _repeated(state, len(first) + 1)  # the last row at rest, in the same arithmetic
        steps = zip(perturbation.batches, perturbation.shifts, strict=True)
        for index, (batch, shift) in enumerate(steps):
            weights = torch.cat([shift.base + shift.weights, shift.base[None]])
            used = weighted_gradient(derivatives, _rows(states, -1).params, batch, shift.base)
            updates = after_skipping(updates, index, used)
            states = _step(updates[index], objective, states, batch, weights, used)
            losses = _losses(objective, states.params, target)
            found.append((losses[:-1] - losses[-1]).mean(1))
    return torch.stack(found, 1)


def _repeated(state: State, num: int) -> State:
    return State(*(part.map(lambda x: x.expand(num, *x.shape)) for part in state))


def _rows(state: State, rows: int | list[int]) -> State:
    return State(*(part.map(lambda x: x[rows]) for part in state))


@torch.no_grad()
def _losses(objective: Objective, params: Params, batch: Batch) -> Tensor:
    with plain_attention():
        found: Tensor = torch.func.vmap(lambda at: objective.pure(at, batch))(dict(params))
    return found


def _step(
    update: Update,
    objective: Objective,
    state: State,
    batch: Batch,
    weights: Tensor,
    used: Collection[str],
) -> State:
    """`Update.advance` on rows of states; each row is clipped by its own norm.

    All rows skip the parameters that the whole batch does not use.
    """

    def loss(at: dict[str, Tensor], weight: Tensor) -> Tensor:
        return (objective.pure(at, batch) * weight).sum()

    with plain_attention():
        found = torch.func.vmap(torch.func.grad(loss))(dict(state.params), weights)
    grad = Params(found).detach().pick(name for name in found if name in used)
    if update.max_grad_norm is not None:
        squares = [tensor.flatten(1).square().sum(1) for tensor in grad.values()]
        norms = torch.stack(squares).sum(0).sqrt()
        scale = (update.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        grad = grad.map(lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)))
        update = dataclasses.replace(update, max_grad_norm=None)
    return update.advance(state, grad)


# --- states guessed between snapshots -------------------------------------------------------------


@dataclass(frozen=True)
class SparseTrajectory(Trajectory):
    """A trajectory whose states between snapshots are guessed.

    Attributes:
        hold_moments: moments are those of the last snapshot, else interpolated.
    """

    hold_moments: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory, hold_moments: bool) -> SparseTrajectory:
        """The same recording, read sparsely."""
        return cls(**vars(trajectory), hold_moments=hold_moments)

    def window(
        self,
        first: int = 0,
        curvature: Curvature = "exact",
        assumed: Sequence[Update] | None = None,
    ) -> Window:
        """As of `Trajectory`; an update then leads to the guessed state after it."""
        return _SparseWindow(**vars(super().window(first, curvature, assumed)), source=self)

    def guess(self, index: int) -> State:
        """The state before update `index`, from the snapshots around it."""
        known = self.snapshots.indices
        place = bisect.bisect_right(known, index) - 1
        before = self.snapshots.state(known[place])
        if known[place] == index:
            return before
        after = self.snapshots.state(known[place + 1])
        share = (index - known[place]) / (known[place + 1] - known[place])

        def between(start: Params, end: Params) -> Params:
            return start.add(end - start, share)

        params = between(before.params, after.params)
        if self.hold_moments:
            return before._replace(params=params)
        moments = (between(*pair) for pair in zip(before[1:], after[1:], strict=True))
        return State(params, *moments)


@dataclass(kw_only=True)
class _SparseWindow(Window):
    source: SparseTrajectory

    def advance(self, index: int, state: State) -> tuple[Params, State]:
        grad = self.derivatives.step_gradient(state.params, self.batch(index, state))
        return grad, self.source.guess(index + 1)
