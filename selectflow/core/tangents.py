"""First and second tangents of a run, as what its updates are made from moves.

Let alpha move the example weights and the learning rate of every update,

    w(alpha) = w0 + alpha dw        g(alpha) = sum_i w_i(alpha) grad loss_i(theta(alpha))
    lr(alpha) = (1 + alpha s) lr

Every quantity x of the run is then a curve x(alpha) with value x, first tangent x1 = dx / dalpha
and second tangent x2 = d2x / dalpha2 at 0. Differentiating AdamW's lines (`dynamics`) twice gives,
for k = 0, 1, 2,

    m_k'     = beta1 m_k + (1 - beta1) g_k
    v1'      = beta2 v1 + 2 (1 - beta2) g g1
    v2'      = beta2 v2 + 2 (1 - beta2) (g1^2 + g g2)
    r        = sqrt(v'),  r1 = v1' / 2r,  r2 = (v2' / 2 - r1^2) / r
    u        = m' / q,  u1 = (m1' - u q1) / q,  u2 = (m2' - 2 u1 q1 - u q2) / q
    theta_k' = (1 - lr wd) theta_k - (lr / c1) u_k

with q = r / sqrt(c2) + eps, q_k = r_k / sqrt(c2). u1 = u2 = 0 where v' is negligible
(`Update.masked`): the formula holds there for changes far below eps alone. SGD is linear in its
gradient, so its tangents are updated as its values are. theta' = theta - lr d is linear in lr, and
the decay is part of d, so that a moving rate adds

    theta1' += s (theta' - theta)
    theta2' += 2 s (theta1' - theta1)        with the theta1' of a rate at rest

Clipping scales g by f = min(1, limit / (|g| + 1e-6)), which moves too. The tangents of g come from
the model, by two nested forward-mode derivatives of its gradient.
Values have no leading dimension, tangents have one: a row for every direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from selectflow.core.batches import Batch
from selectflow.core.derivatives import plain_attention
from selectflow.core.optim import SGD, AdamW, Rule, State, join, part_of
from selectflow.core.params import Params
from selectflow.core.passes import Objective
from selectflow.core.update import Update

_Point = TypeVar("_Point")
_Found = TypeVar("_Found")


class StateTangents(NamedTuple):
    """A state and its tangents in alpha."""

    value: State
    first: State
    second: State

    @classmethod
    def at_rest(cls, state: State, num: int) -> StateTangents:
        """`state`, which `num` directions have not moved yet."""
        still = State(*(part.zeros_like(num) for part in state))
        return cls(state, still, still)

    @property
    def params(self) -> tuple[Params, Params, Params]:
        """Parameters and their tangents."""
        return self.value.params, self.first.params, self.second.params


Grads = tuple[Params, Params, Params]
"""A batch gradient and its tangents."""


class Shift(NamedTuple):
    """How what one update is made from moves with alpha, in M directions.

    Attributes:
        base: w0, example weights at alpha = 0, shape (N,).
        weights: dw, shape (M, N); zeros where a direction leaves this update alone.
        lr: s, the share by which the learning rate grows, shape (M,); None: not at all.
    """

    base: Tensor
    weights: Tensor
    lr: Tensor | None = None


def advance(
    update: Update,
    objective: Objective,
    motion: StateTangents,
    batch: Batch,
    shift: Shift,
    used: Collection[str],
) -> StateTangents:
    """The motion after one update.

    Args:
        update: the update.
        objective: the training loss.
        motion: before it, M rows of tangents.
        batch: N examples.
        shift: how their weights and the learning rate move.
        used: parameters that have a gradient; the update skips the others.

    Returns:
        The motion after it.
    """
    moving = [name for name in motion.value.params if name in used]
    grads = _gradient_tangents(objective, motion, batch, shift)
    grads = _clipped(update, _picked(grads, moving))
    split = list(update.parts(grads[1]))
    typical = update.typical(
        join(
            rule.advance(part_of(motion.value, names), grads[0].pick(names))
            for rule, names in split
        )
    )
    parts = [
        _advance_rule(rule, _part_of(motion, names), _picked(grads, names), typical)
        for rule, names in split
    ]
    skipped = [name for name in motion.value.params if name not in used]
    after = StateTangents(*map(join, zip(*parts, _part_of(motion, skipped), strict=True)))
    return after if shift.lr is None else _with_moving_lr(motion, after, shift.lr)


def loss_tangents(
    objective: Objective, motion: StateTangents, batch: Batch
) -> tuple[Tensor, Tensor]:
    """First and second derivatives in alpha of each example's loss, both of shape (M, N)."""
    value, first, second = map(dict, motion.params)

    def losses(at: dict[str, Tensor]) -> Tensor:
        return objective.pure(at, batch)

    def along(first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _taylor(losses, value, first, second)[1:]

    with plain_attention(), _PlainLayerNorm():
        found: tuple[Tensor, Tensor] = torch.func.vmap(along)(first, second)
    return found


def _gradient_tangents(
    objective: Objective, motion: StateTangents, batch: Batch, shift: Shift
) -> Grads:
    value, first, second = map(dict, motion.params)

    def gradient(at: tuple[dict[str, Tensor], Tensor]) -> dict[str, Tensor]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return (objective.pure(params, batch) * at[1]).sum()

        found: dict[str, Tensor] = torch.func.grad(loss)(at[0])
        return found

    def along(
        first: dict[str, Tensor], second: dict[str, Tensor], weights: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        start, straight = (value, shift.base), torch.zeros_like(weights)
        return _taylor(gradient, start, (first, weights), (second, straight))

    with plain_attention(), _PlainLayerNorm():
        rows = torch.func.vmap(along)(first, second, shift.weights)
    grads, first, second = (Params(row).detach() for row in rows)
    return grads.map(lambda x: x[0]), first, second


def _taylor(
    function: Callable[[_Point], _Found], start: _Point, first: _Point, second: _Point
) -> tuple[_Found, _Found, _Found]:
    """Value, first and second derivative of a function along a curve with these derivatives.

    d/dalpha f(x) = f'(x) x1, a function of x and x1 both, which move along x1 and x2. To compute x
    from alpha inside of the derivatives would take several times as long as they do.
    """

    def slope(at: _Point, velocity: _Point) -> tuple[_Found, _Found]:
        value, first = torch.func.jvp(function, (at,), (velocity,))[:2]
        return first, value

    (found, value), (bend, _) = torch.func.jvp(slope, (start, first), (first, second))[:2]
    return value, found, bend


class _PlainLayerNorm(TorchFunctionMode):
    """Layer norm by its formula: torch's own second forward derivative is wrong (issue 196700)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.layer_norm:
            func = _layer_norm
        return func(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = [-1 - axis for axis in range(len(normalized_shape))]
    centred = input - input.mean(dims, keepdim=True)
    found = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def _part_of(motion: StateTangents, names: Sequence[str]) -> StateTangents:
    return StateTangents(*(part_of(state, names) for state in motion))


def _picked(grads: Grads, names: Sequence[str]) -> Grads:
    value, first, second = (grad.pick(names) for grad in grads)
    return value, first, second


def _clipped(update: Update, grads: Grads) -> Grads:
    """The gradient scaled by f = min(1, limit / (|g| + 1e-6)), and its tangents."""
    scale = update.clip_scale(grads[0])
    if scale == 1.0:
        return grads
    g, g1, g2 = grads
    norm = g.norm()
    n1 = _row_dot(g1, g) / norm
    n2 = (_row_dot(g1, g1) + _row_dot(g2, g) - n1 * n1) / norm
    f1 = -scale * n1 / (norm + 1e-6)
    f2 = -(scale * n2 + 2 * f1 * n1) / (norm + 1e-6)
    first = scale * g1 + _row_scale(_as_row(g), f1)
    second = scale * g2 + _row_scale(g1, 2 * f1) + _row_scale(_as_row(g), f2)
    return scale * g, first, second


def _with_moving_lr(before: StateTangents, after: StateTangents, s: Tensor) -> StateTangents:
    """`after` an update at a rate at rest, as it is where the rate moves."""
    (theta, theta1, _), (then, then1, then2) = before.params, after.params
    first = then1 + _row_scale(_as_row(then - theta), s)
    second = then2 + _row_scale(then1 - theta1, 2 * s)
    return after._replace(
        first=after.first._replace(params=first), second=after.second._replace(params=second)
    )


def _row_dot(rows: Params, other: Params) -> Tensor:
    """Inner product of each row with `other`, which may have rows too; shape (M,)."""
    parts = [(rows[name] * other[name]).flatten(1).sum(1) for name in rows]
    return torch.stack(parts).sum(0)


def _row_scale(rows: Params, factors: Tensor) -> Params:
    """Each row times its factor."""
    return rows.map(lambda x: x * factors.reshape(-1, *[1] * (x.ndim - 1)))


def _as_row(params: Params) -> Params:
    return params.map(lambda x: x[None])


def _advance_rule(
    rule: Rule, motion: StateTangents, grads: Grads, typical: Tensor
) -> StateTangents:
    if isinstance(rule, SGD):  # linear: every tangent is updated as the value is
        return StateTangents(
            *(rule.advance(state, g) for state, g in zip(motion, grads, strict=True))
        )
    assert isinstance(rule, AdamW)
    if not rule.decoupled and rule.weight_decay:
        value, first, second = (
            g.add(params, rule.weight_decay) for g, params in zip(grads, motion.params, strict=True)
        )
        grads = (value, first, second)
    return _advance_adamw(rule, motion, grads, typical)


def _advance_adamw(
    rule: AdamW, motion: StateTangents, grads: Grads, typical: Tensor
) -> StateTangents:
    g, g1, g2 = grads
    m, m1, m2 = (
        (rule.beta1 * state.exp_avg).add(grad, 1 - rule.beta1)
        for state, grad in zip(motion, grads, strict=True)
    )
    new = 1 - rule.beta2
    v, v1, v2 = (rule.beta2 * state.exp_avg_sq for state in motion)
    v, v1, v2 = v.add(g * g, new), v1.add(g1 * g, 2 * new), v2.add(g1 * g1 + g2 * g, 2 * new)
    r = v.sqrt()
    inverse = r.map(lambda x: torch.where(x > 0, 1 / x, 0.0))
    r1 = v1 * inverse * 0.5
    r2 = (0.5 * v2 - r1 * r1) * inverse
    root = math.sqrt(rule.c2)
    q, q1, q2 = r / root + rule.eps, r1 / root, r2 / root
    u = m / q
    u1 = (m1 - q1 * u) / q
    u2 = (m2 - 2 * (u1 * q1) - q2 * u) / q
    scale = -rule.lr / rule.c1
    theta = (rule.decay * motion.value.params).add(u, scale)
    after = State(theta, m, v)
    theta1, theta2 = (
        (rule.decay * params).add(rule.masked(move, after, typical), scale)
        for params, move in zip(motion.params[1:], (u1, u2), strict=True)
    )
    return StateTangents(after, State(theta1, m1, v1), State(theta2, m2, v2))
