"""The adjoint sweep: roll a window of updates out, then carry a derivative back through each.

The sweep leaves for every update its sensitivity gamma = d target / d (batch gradient of that
update), by the adjoint of one update (`optim`) and one Hessian product.

It needs every state of the rollout. States beyond the memory limit are not kept: the rollout leaves
snapshots, and each stretch between two is run again when the sweep reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from selectflow.core.batches import Batch
from selectflow.core.chunks import GIB, num_fitting
from selectflow.core.derivatives import Curvature, Derivatives
from selectflow.core.optim import Adjoint, State
from selectflow.core.params import Params
from selectflow.core.storage import Fetch, Keep, in_place
from selectflow.core.update import Update, after_skipping

Nominal = Callable[[int, State], Batch]
"""The batch of update i of the window (0 is the next), given the state before it."""


Slopes = tuple[Tensor, Tensor]
"""Losses of a batch, shape (N,), and their derivatives along a sensitivity, (N,) or (Q, N)."""


@dataclass
class Window:
    """The H updates between the present and the point where the target loss is read.

    Args:
        derivatives: of the training loss.
        updates: H updates, in order.
        nominal: the batch of each; asked once, so that a rerun meets the same batch.
        curvature: the matrix that stands for the Hessian of the batch loss: "exact", "fisher"
            (empirical Fisher) or "none" (zero).
        assumed: updates that the sweep takes for the real ones; None: the real ones. Another
            optimizer here gives the influence of whoever mistakes the one for the other.
        first: the update at which sweeps end; nothing before it needs the adjoint.
        with_slopes: whether sweeps hand on the slopes of the batches' losses where the products
            with the curvature bring them along: central ones, which are along the masked
            sensitivity as scores are. Exact products go along all of it.
    """

    derivatives: Derivatives
    updates: Sequence[Update]
    nominal: Nominal
    curvature: Curvature = "exact"
    assumed: Sequence[Update] | None = None
    first: int = 0
    with_slopes: bool = False
    _batches: dict[int, Batch] = field(default_factory=dict)

    def batch(self, index: int, state: State) -> Batch:
        if index not in self._batches:
            self._batches[index] = self.nominal(index, state)
        return self._batches[index]

    def advance(self, index: int, state: State) -> tuple[Params, State]:
        """Batch gradient of update `index`, and the state after the update."""
        grad = self.derivatives.step_gradient(state.params, self.batch(index, state))
        self.updates = after_skipping(self.updates, index, grad)
        return grad, self.updates[index].advance(state, grad)

    def vjp(
        self, index: int, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint, Slopes | None]:
        """Sensitivity of update `index`, the adjoint before it, and slopes; queries may lead all.

        At the first update the adjoint is empty: nothing before it needs one.
        """
        update, is_first = (self.assumed or self.updates)[index], index == self.first
        gamma, before = update.adjoint(adjoint, state, after, grad, carry=not is_first)
        if self.curvature == "none" or is_first:
            return gamma, before, None
        along, is_exact = gamma, self.derivatives.method == "exact"
        if not is_exact:
            # Central differences step by a share of |gamma|: an entry of lr / eps, whose own part
            # of the product is 0, would leave them no step in all other entries.
            along = update.masked(gamma, after)
        bent, slopes = self.derivatives.product(
            self.curvature,
            state.params,
            along,
            self.batch(index, state),
            with_slopes=self.with_slopes and not is_exact,
        )
        return gamma, before._replace(params=before.params + bent), slopes


@dataclass(frozen=True)
class SweepStep:
    """What a sweep knows when it has passed one update.

    Attributes:
        index: of the update.
        gamma: its sensitivity, d target / d (batch gradient).
        state: before it.
        grad: the batch gradient it was made with.
        after: state after it.
        adjoint: d target / d `after`.
        slopes: losses of its batch and slopes along the masked gamma (`Update.masked`), where the
            window was to hand them on and they came without a pass.
    """

    index: int
    gamma: Params
    state: State
    grad: Params
    after: State
    adjoint: Adjoint
    slopes: Slopes | None = None


def sweep(
    window: Window,
    state: State,
    read_end: Callable[[State], Adjoint],
    emit: Callable[[SweepStep], None],
    capacity: int,
    *,
    start: int = 0,
    stop: int | None = None,
    put: Keep = in_place,
) -> Adjoint:
    """Roll the window out, then sweep back over it in bounded memory.

    Args:
        window: H >= 1 updates.
        state: the state before update `start`.
        read_end: state after the last -> adjoint there, of one target or, with a leading
            dimension, of several; called once.
        emit: called at each update, from the last to the first.
        capacity: states that may be kept at once beside `state`, as `sweep_capacity` gives it.
        start: the first update of the stretch to sweep.
        stop: the update after its last; None: the window's end.
        put: takes the states away until they are needed.

    Returns:
        The adjoint before update `start`; empty at the window's `first`.
    """
    stop = len(window.updates) if stop is None else stop
    return _Sweep(window, emit, put).run(start, stop, state, read_end, capacity)


@dataclass(frozen=True)
class _Sweep:
    window: Window
    emit: Callable[[SweepStep], None]
    put: Keep

    def run(
        self,
        start: int,
        stop: int,
        state: State,
        read_end: Callable[[State], Adjoint],
        capacity: int,
    ) -> Adjoint:
        """Updates start .. stop-1: returns the adjoint before update `start`."""
        num = stop - start
        spacing = 1 if num <= capacity else math.ceil(num / max(2, capacity // 2))
        points: list[Fetch] = []
        grads: list[Fetch] = []
        end = state
        for index in range(start, stop):
            if (index - start) % spacing == 0:
                # the first state is the caller's, who has it in any case
                points.append(self.put(end) if points else partial(_constant, state))
            grad, end = self.window.advance(index, end)
            if spacing == 1:
                # the last gradient is needed first
                is_last = index == stop - 1
                held = State(grad, Params(), Params())
                grads.append(partial(_constant, held) if is_last else self.put(held))
        adjoint = read_end(end)
        if spacing == 1:
            return self._back(stop, points, grads, end, adjoint)
        del grad, end
        while points:
            before, first = points.pop()(), start + spacing * len(points)
            last = min(first + spacing, stop)
            # The deeper run begins its way back with the adjoint known here.
            known = partial(_constant, adjoint)
            adjoint = self.run(first, last, before, known, capacity - len(points))
        return adjoint

    def _back(
        self, stop: int, points: list[Fetch], grads: list[Fetch], end: State, adjoint: Adjoint
    ) -> Adjoint:
        """The sweep itself, over updates whose states are all at hand; uses them up."""
        for index in reversed(range(stop - len(points), stop)):
            before, grad = points.pop()(), grads.pop()().params
            gamma, earlier, slopes = self.window.vjp(index, adjoint, before, end, grad)
            self.emit(SweepStep(index, gamma, before, grad, end, adjoint, slopes))
            end, adjoint = before, earlier
        return adjoint


def _constant(state: State, *_: State) -> State:
    return state


def sweep_capacity(state: State, horizon: int, memory_gib: float | None) -> int:
    """How many states, each with its gradient, fit into `memory_gib`; None: see `num_fitting`.

    Raises:
        ValueError: fewer than the repeated halving of `horizon` updates needs.
    """
    size = sum(part.num_bytes() for part in state) + state.params.num_bytes()
    needed = min(horizon, 2 + math.ceil(math.log2(max(horizon, 1))))
    capacity = num_fitting(memory_gib, size, needed)
    if capacity < needed:
        raise ValueError(
            f"memory_gib must be at least {needed * size / GIB:.3g} for a horizon of {horizon} "
            f"on this model ({needed} states of {size / GIB:.3g} GiB), got {memory_gib}; raise it "
            "or shorten the horizon"
        )
    return capacity
