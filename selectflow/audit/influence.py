"""How well influence predicts what really happens when an example is removed.

`leave_one_out` reruns a recorded training with one example taken out of one step (TSLOO), the
ground truth. `influence` predicts the same from one sweep over the recording. Both return the loss
after minus the loss before, of shape (num_pairs, num_queries): positive = the example helped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from selectflow.audit.reruns import Removal, expand, like_of, rerun, weights_without
from selectflow.core.batches import Batch, num_examples
from selectflow.core.counts import is_count
from selectflow.core.derivatives import Curvature
from selectflow.core.optim import SGD, Adjoint, Rule, State
from selectflow.core.params import Params
from selectflow.core.sweep import SweepStep
from selectflow.core.update import Update
from selectflow.offline.trajectory import Trajectory

Reduce = Literal["none", "mean"]
Response = Literal["linear", "exact"]


def leave_one_out(
    trajectory: Trajectory,
    queries: Batch,
    pairs: Iterable[tuple[int, int]],
    horizon: float = math.inf,
    *,
    reduce: Reduce = "none",
    num_parallel: int = 64,
) -> Tensor:
    """TSLOO: the change of each query's loss when one example is removed from one step.

    The run is repeated from that step on with the mean over the rest of its batch; all later
    batches, hyperparameters and the optimizer's moments follow from there.

    Args:
        trajectory: the recorded run.
        queries: Q examples whose losses are measured.
        pairs: (step, position in the batch); steps count the optimizer's updates before it.
        horizon: updates from the step to where the queries are read, >= 1; `math.inf`: to the
            end of the recording.
        reduce: "mean" for the mean over the queries as the one target.
        num_parallel: reruns side by side.

    Returns:
        Loss after minus loss before, shape (num_pairs, Q), or (num_pairs, 1) for "mean", on the
        CPU. Positive: the example helped.

    Raises:
        ValueError: a pair or the horizon reaches outside the recording; a batch of one example;
            queries whose losses are not per example; an unknown option.
        RuntimeError: the replay leaves the recording.
    """
    removals = _removals(trajectory, pairs, horizon)
    weights = _query_weights(queries, reduce)
    return _in_chunks(rerun, trajectory, queries, removals, weights, num_parallel)


def influence(
    trajectory: Trajectory,
    queries: Batch,
    pairs: Iterable[tuple[int, int]],
    method: str = "adamw",
    curvature: Curvature = "exact",
    order: int = 1,
    horizon: float = math.inf,
    *,
    own_update: Response = "linear",
    reduce: Reduce = "none",
    num_parallel: int = 64,
    memory_gib: float | None = None,
) -> Tensor:
    """The change of each query's loss that a sweep predicts for each removal.

    Removing z changes the batch gradient by dg = (g - g_z) / (B - 1), so the first order is
    gamma . dg; the second adds half the second derivative along the same path.

    Args:
        trajectory: the recorded run.
        queries: Q examples whose losses are predicted.
        pairs: (step, position in the batch), as for `leave_one_out`.
        method: the optimizer that the sweep assumes, a name in `METHODS`: "adamw" is the recorded
            one, "sgd" takes its learning rates for those of plain SGD.
        curvature: "exact", "fisher" (empirical Fisher) or "none".
        order: 1, or 2 (exact curvature of the recorded optimizer only).
        horizon: as for `leave_one_out`.
        own_update: "exact" replaces gamma . dg by adjoint . (state after the update without z,
            minus state after it with z; of exp_avg_sq the root is taken): the example's own update
            is not linearised.
        reduce: "mean" for the mean over the queries as the one target.
        num_parallel: queries that one sweep carries, or pairs side by side in the second order.
        memory_gib: limit for the states between two snapshots, in GiB; None: 1, or the least that
            is needed.

    Returns:
        Predicted loss after minus loss before, shape (num_pairs, Q), or (num_pairs, 1) for
        "mean", on the CPU. Positive: the example helps.

    Raises:
        ValueError: as `leave_one_out`; an unknown or impossible combination of options.
        RuntimeError: the replay leaves the recording.
    """
    _check_options(method, curvature, order, own_update)
    removals = _removals(trajectory, pairs, horizon)
    weights = _query_weights(queries, reduce)
    if order == 2:

        def both(*args: Any) -> Tensor:
            first, second = expand(*args)
            return first + second

        return _in_chunks(both, trajectory, queries, removals, weights, num_parallel)
    assumed = _assumed(trajectory.updates, method)
    respond = _response if own_update == "exact" else _linear
    found = torch.zeros(len(removals), len(weights), dtype=like_of(trajectory).dtype)
    for end in {removal.end for removal in removals}:
        at_end = [row for row, removal in enumerate(removals) if removal.end == end]
        first = min(removals[row].index for row in at_end)
        window = trajectory.window(first, curvature, assumed)
        for columns in torch.split(torch.arange(len(weights)), num_parallel):

            def keep(
                visit: SweepStep, at_end: list[int] = at_end, columns: Tensor = columns
            ) -> None:
                rows = [row for row in at_end if removals[row].index == visit.index]
                if rows:
                    response = respond(trajectory, visit, [removals[row] for row in rows])
                    found[torch.tensor(rows)[:, None], columns] = response.cpu().to(found.dtype)

            adjoint = _query_adjoint(trajectory, end, queries, weights[columns])
            trajectory.sweep(window, end, adjoint, keep, memory_gib)
    return found


# --- what a sweep may assume of the recorded optimizer: the truth, or a common mistake ------


METHODS: dict[str, Callable[[Any, float], Rule]] = {
    "adamw": lambda rule, _: rule,
    # theta' = theta - lr g
    "sgd": lambda rule, _: SGD(rule.names, rule.step, rule.lr, 0.0, 0.0, 0.0, False),
    "constant_lr": lambda rule, first_lr: dataclasses.replace(rule, lr=first_lr),
    "no_decay": lambda rule, _: dataclasses.replace(rule, weight_decay=0.0),
}
"""Name -> the rule that a sweep takes for a recorded one, whose first learning rate is given."""


def _assumed(updates: Sequence[Update], method: str) -> list[Update]:
    """The updates that a sweep takes for the recorded ones."""
    first_lr = {name: rule.lr for rule in updates[0].rules for name in rule.names}
    change = METHODS[method]
    return [
        dataclasses.replace(
            update, rules=tuple(change(rule, first_lr[rule.names[0]]) for rule in update.rules)
        )
        for update in updates
    ]


# --- the two responses of the example's own update ------------------------------------------


def _linear(trajectory: Trajectory, visit: SweepStep, removals: Sequence[Removal]) -> Tensor:
    """Gamma . (g - g_z) / (B - 1), shape (M, Q)."""
    batch = trajectory.batches[visit.index]
    slopes = trajectory.derivatives.directional(visit.state.params, visit.gamma, batch)[1]
    positions = [removal.position for removal in removals]
    change = (slopes.mean(1, keepdim=True) - slopes[:, positions]) / (slopes.shape[1] - 1)
    return change.T


def _response(trajectory: Trajectory, visit: SweepStep, removals: Sequence[Removal]) -> Tensor:
    """The adjoint . (state after the update without z - state after it), shape (M, Q)."""
    batch = trajectory.batches[visit.index]
    like = next(iter(visit.grad.values()))
    weights = weights_without(removals, visit.index, num_examples(batch), like)
    _, grads = trajectory.derivatives.gradients(visit.state.params, batch, weights)
    total = like.new_zeros(len(removals), len(next(iter(visit.adjoint.params.values()))))
    for row, tensors in enumerate(zip(*grads.values(), strict=True)):
        grad = Params(zip(grads, tensors, strict=True)).pick(visit.grad)  # others were skipped
        without = trajectory.updates[visit.index].advance(visit.state, grad)
        for adjoint, change in zip(visit.adjoint, _change(without, visit.after), strict=True):
            for name, by in change.items():
                total[row] += (adjoint[name] * by).flatten(1).sum(1)
    return total


def _change(state: State, reference: State) -> State:
    """`state` minus `reference`; the second moment's to first order in its root.

    The updates read v through sqrt(v), and one example can move v by its own size where it is
    small. With s = sqrt(v), d target / d s = 2 s d target / d v.
    """
    root = reference.exp_avg_sq.sqrt()
    return State(
        state.params - reference.params,
        state.exp_avg - reference.exp_avg,
        2 * root * (state.exp_avg_sq.sqrt() - root),
    )


# --- queries and pairs ----------------------------------------------------------------------


def _query_adjoint(trajectory: Trajectory, end: int, queries: Batch, weights: Tensor) -> Adjoint:
    """Derivatives of each measurement in the state where it is read: rows of queries."""
    state = trajectory.state(end)
    with trajectory.derivatives.objective.scoring():
        _, grads = trajectory.derivatives.gradients(state.params, queries, weights)
    return Adjoint(grads, *(part.zeros_like(len(weights)) for part in state[1:]))


def _query_weights(queries: Batch, reduce: Reduce) -> Tensor:
    """Weights of the queries in each measurement, one measurement a row."""
    if reduce not in ("none", "mean"):
        raise ValueError(f"reduce must be 'none' or 'mean', got {reduce!r}")
    size = num_examples(queries)
    if reduce == "none":
        return torch.eye(size, dtype=torch.float64)
    return torch.full((1, size), 1 / size, dtype=torch.float64)


def _removals(
    trajectory: Trajectory, pairs: Iterable[tuple[int, int]], horizon: float
) -> list[Removal]:
    if horizon != math.inf and not is_count(horizon):
        raise ValueError(f"horizon must be an integer >= 1 or math.inf, got {horizon!r}")
    first, num = trajectory.first_step, len(trajectory)
    removals = []
    for step, position in pairs:
        index = int(step) - first
        if not 0 <= index < num:
            raise ValueError(
                f"pairs must have steps in [{first}, {first + num - 1}], those recorded, got "
                f"({step}, {position})"
            )
        size = num_examples(trajectory.batches[index])
        if not 0 <= position < size:
            raise ValueError(
                f"pairs must have positions in [0, {size - 1}] at step {step}, got "
                f"({step}, {position})"
            )
        if size == 1:
            raise ValueError(f"a batch must keep an example, got only one at step {step}")
        end = num if horizon == math.inf else index + int(horizon)
        if end > num:
            raise ValueError(
                f"pairs must lie at least horizon = {horizon} updates before the recording's end "
                f"at step {first + num}, got ({step}, {position}); horizon=math.inf reads there"
            )
        removals.append(Removal(index, int(position), end))
    return removals


def _in_chunks(
    measure: Callable[[Trajectory, Batch, Sequence[Removal]], Tensor],
    trajectory: Trajectory,
    queries: Batch,
    removals: Sequence[Removal],
    weights: Tensor,
    size: int,
) -> Tensor:
    """`measure` of chunks of nearby removals, shape (num_pairs, rows of `weights`)."""
    order = sorted(range(len(removals)), key=lambda row: removals[row])
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    parts = [
        measure(trajectory, queries, [removals[row] for row in chunk]).cpu() for chunk in chunks
    ]
    found = torch.cat(parts)[torch.tensor(order).argsort()]
    return found @ weights.T.to(found.dtype)


def _check_options(method: str, curvature: str, order: int, own_update: str) -> None:
    known = {
        "method": (method, tuple(METHODS)),
        "curvature": (curvature, ("exact", "fisher", "none")),
        "order": (order, (1, 2)),
        "own_update": (own_update, ("linear", "exact")),
    }
    for name, (value, choices) in known.items():
        if value not in choices:
            listed = ", ".join(map(str, choices))
            raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    if order == 2 and (method, curvature, own_update) != ("adamw", "exact", "linear"):
        raise ValueError(
            "order 2 must go with method='adamw', curvature='exact' and own_update='linear', got "
            f"{method!r}, {curvature!r} and {own_update!r}"
        )
    if own_update == "exact" and method == "sgd":
        raise ValueError("own_update='exact' must go with the recorded optimizer, got 'sgd'")
