"""The gradient that a recorded update was made with, from the states before and after it.

Each rule is linear in the gradient where it enters the first moment,

    AdamW          g = (m' - beta1 m) / (1 - beta1)                 Adam: less wd theta
    SGD            g = (m' - momentum m) / (1 - dampening) - wd theta
    SGD, momentum 0    g = (theta - theta') / lr - wd theta

which costs no pass of the model. What both terms of a difference share is lost to rounding, so the
rounding is bounded by their sizes, and a gradient that it could reach is not given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from selectflow.core.optim import SGD, AdamW, Rule, State, part_of
from selectflow.core.params import Params, measured, merge
from selectflow.core.update import Update

_MOST_ROUNDING = 1e-4  # of the norm of the gradient
_UNCLIPPED = 0.99  # of the limit: a clipped gradient has a norm of the limit itself


def gradient_between(
    update: Update, following: Update, state: State, after: State, resolution: float
) -> Params | None:
    """The batch gradient that led from one state to the next.

    Args:
        update: made between them.
        following: the next one, whose step counts tell which parameters this one skipped.
        state: before it.
        after: after it.
        resolution: relative rounding of the numbers that the optimizer held.

    Returns:
        The gradient, without parameters that were skipped; None where it does not follow: it was
        clipped, it was skipped or zero without a count that tells which, or rounding hides it.
    """
    parts: list[Params] = []
    lost = 0.0
    steps = {name: rule.step for rule in following.rules for name in rule.names}
    for rule, every in update.parts(state.params):
        is_counted = isinstance(rule, AdamW)  # SGD has no count of its updates
        names = [name for name in every if not is_counted or steps[name] > rule.step]
        if not names:
            continue
        line = _line(rule, part_of(state, names), part_of(after, names))
        is_still = not is_counted and any(torch.equal(line.old[k], line.new[k]) for k in names)
        if is_still or not line.share:
            return None
        grad, size = line.gradient()
        parts.append(grad)
        lost = math.hypot(lost, resolution * size)
    if not parts:
        return None
    joined = merge(parts)
    grad = joined.pick(filter(joined.__contains__, state.params))
    norm = grad.norm()
    limit = math.inf if update.max_grad_norm is None else _UNCLIPPED * update.max_grad_norm
    return grad if lost <= _MOST_ROUNDING * norm and norm < limit else None


class _Line(NamedTuple):
    """new = keep * old + share * (gradient + weight_decay * params)"""

    old: Params
    new: Params
    params: Params
    keep: float
    share: float
    weight_decay: float

    def gradient(self) -> tuple[Params, float]:
        """The gradient, and a bound for the norms of the terms that add up to it."""
        grad = self.new.add(self.old, -self.keep) / self.share
        if self.weight_decay:
            grad = grad.add(self.params, -self.weight_decay)
        norms = [each.norm for each in measured(grad, self.new)]
        decay = abs(self.weight_decay) * self.params.norm() if self.weight_decay else 0.0
        return grad, norms[0] + 2 * norms[1] / abs(self.share) + 2 * decay


def _line(rule: Rule, state: State, after: State) -> _Line:
    """The line of a rule that the gradient enters first."""
    assert isinstance(rule, AdamW | SGD)
    moments = state.exp_avg, after.exp_avg, state.params
    if isinstance(rule, AdamW):
        decay = 0.0 if rule.decoupled else rule.weight_decay
        return _Line(*moments, rule.beta1, 1 - rule.beta1, decay)
    if rule.momentum:
        return _Line(*moments, *rule.mix, rule.weight_decay)
    return _Line(state.params, after.params, state.params, 1.0, -rule.lr, rule.weight_decay)
