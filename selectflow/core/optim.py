"""AdamW and SGD as pure functions: one update, and the adjoint of one update.

Before update n the state is (theta, m, v); g is the gradient of the batch, after clipping.
With c1 = 1 - beta1^n and c2 = 1 - beta2^n, `torch.optim.AdamW` computes

    m'     = beta1 m + (1 - beta1) g
    v'     = beta2 v + (1 - beta2) g^2
    theta' = (1 - lr wd) theta - (lr / c1) m' / q          q = sqrt(v') / sqrt(c2) + eps

Let (a', b', c') be the derivatives of a scalar, the target loss, in (theta', m', v'). The chain
rule, read from the last line to the first, gives

    b      = b' - (lr / c1) a' / q                         derivative in m'
    c      = c' + (lr / c1) a' m' / (2 q^2 sqrt(v' c2))    derivative in v'; 0 where v' = 0
    gamma  = (1 - beta1) b + 2 (1 - beta2) g c             derivative in g: the sensitivity
    a_prev = (1 - lr wd) a' + H gamma                      H: Hessian of the batch loss at theta
    b_prev = beta1 b
    c_prev = beta2 c

`adjoint` returns all but H gamma, which needs the model; `lookahead` adds it. The equations are
those of Deng et al. 2026 (arXiv 2605.18814) for AdamW without eps_root, as torch computes it.

`Adam` differs in one line (weight decay is part of the gradient), SGD has only m, the momentum
buffer. Adjoints may carry leading query dimensions; states and gradients never do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selectflow.core.params import Params, merge

# A gradient of this share of the model's typical one is float32 rounding, not a signal. The measure
# is the whole model: of a bias that batch norm cancels, all entries are rounding.
NEGLIGIBLE_SHARE = 1e-6


class State(NamedTuple):
    """What one update reads and writes. `exp_avg` is SGD's momentum buffer; unused parts: empty."""

    params: Params
    exp_avg: Params
    exp_avg_sq: Params


Adjoint = State
"""Derivatives of the target loss in the entries of a `State`."""


def part_of(state: State, names: Sequence[str]) -> State:
    """The entries of a state with these names; a moment that is not there stays empty."""
    return State(*(params.pick(names) if params else params for params in state))


def join(states: Iterable[State]) -> State:
    """States of disjoint names as one."""
    return State(*(merge(fields) for fields in zip(*states, strict=True)))


class Rule(Protocol):
    """One group of parameters that share hyperparameters and step count."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def lr(self) -> float: ...
    def advance(self, state: State, grad: Params) -> State: ...
    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]: ...
    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params: ...
    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params: ...


@dataclass(frozen=True)
class AdamW:
    """AdamW's update number `step` (the first is 1) of the parameters `names`."""

    names: tuple[str, ...]
    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool = True  # False: torch.optim.Adam, which adds wd * theta to the gradient

    @property
    def c1(self) -> float:
        return 1 - self.beta1**self.step

    @property
    def c2(self) -> float:
        return 1 - self.beta2**self.step

    @property
    def decay(self) -> float:
        """Factor on theta in the last line of the update."""
        return 1 - self.lr * self.weight_decay if self.decoupled else 1.0

    def _grad(self, state: State, grad: Params) -> Params:
        coupled = not self.decoupled and self.weight_decay
        return grad.add(state.params, self.weight_decay) if coupled else grad

    def advance(self, state: State, grad: Params) -> State:
        grad = self._grad(state, grad)
        m = (self.beta1 * state.exp_avg).add(grad, 1 - self.beta1)
        v = (self.beta2 * state.exp_avg_sq).add(grad * grad, 1 - self.beta2)
        q = v.sqrt() / math.sqrt(self.c2) + self.eps
        return State((self.decay * state.params).add(m / q, -self.lr / self.c1), m, v)

    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]:
        grad = self._grad(state, grad)
        root = after.exp_avg_sq.sqrt()
        q = root / math.sqrt(self.c2) + self.eps
        pull = adjoint.params / q * (self.lr / self.c1)
        slope = (after.exp_avg / q / root).map(lambda x: torch.where(x.isfinite(), x, 0.0))
        b = adjoint.exp_avg - pull
        c = adjoint.exp_avg_sq.add(pull * slope, 0.5 / math.sqrt(self.c2))
        gamma = ((1 - self.beta1) * b).add(grad * c, 2 * (1 - self.beta2))
        a = self.decay * adjoint.params
        if not self.decoupled and self.weight_decay:
            a = a.add(gamma, self.weight_decay)
        return gamma, Adjoint(a, self.beta1 * b, self.beta2 * c)

    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params:
        """Sensitivity at horizon 0: the present preconditioner, nothing simulated.

        An entry that has had no gradient (an input that was never on, a bias that batch norm
        cancels in training) has no preconditioner: 1 / eps would let it drown all others, so its
        sensitivity is taken as 0. Before the first step no entry has one, and the gradient
        itself gives the direction.
        """
        scale = -(1 - self.beta1) * self.lr / self.c1
        num = self.step - 1  # the updates that made exp_avg_sq
        if not num:
            return scale * grad
        q = state.exp_avg_sq.sqrt() / math.sqrt(1 - self.beta2**num) + self.eps
        return scale * self._masked(grad / q, state.exp_avg_sq, num, typical)

    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params:
        return self._masked(gamma, after.exp_avg_sq, self.step, typical)

    def _masked(self, gamma: Params, exp_avg_sq: Params, num: int, typical: Tensor) -> Params:
        """0 where the second moment after `num` updates is negligible.

        Not where eps rules all entries: then 1 / eps is the scale of each, of dead ones too.
        """
        negligible = (NEGLIGIBLE_SHARE * typical) ** 2 * (1 - self.beta2**num)
        negligible = torch.where(typical > self.eps, negligible, -1.0)
        return Params(
            (name, torch.where(exp_avg_sq[name] <= negligible, 0.0, x)) for name, x in gamma.items()
        )


@dataclass(frozen=True)
class SGD:
    """SGD's update number `step` (1 where the momentum buffer is empty) of `names`.

    d = g + wd theta;  m' = momentum m + (1 - dampening) d  (m' = d at step 1);
    theta' = theta - lr u,  u = m', or d + momentum m' with nesterov, or d without momentum.
    """

    names: tuple[str, ...]
    step: int
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    @property
    def mix(self) -> tuple[float, float]:
        """The shares of m and of d in m'."""
        return (0.0, 1.0) if self.step == 1 else (self.momentum, 1 - self.dampening)

    def advance(self, state: State, grad: Params) -> State:
        d = grad.add(state.params, self.weight_decay)
        if not self.momentum:
            return State(state.params.add(d, -self.lr), state.exp_avg, state.exp_avg_sq)
        keep, new = self.mix
        m = (keep * state.exp_avg).add(d, new)
        u = d.add(m, self.momentum) if self.nesterov else m
        return State(state.params.add(u, -self.lr), m, state.exp_avg_sq)

    def adjoint(
        self, adjoint: Adjoint, state: State, after: State, grad: Params
    ) -> tuple[Params, Adjoint]:
        del state, after, grad  # the update is linear
        pull = -self.lr * adjoint.params
        b = adjoint.exp_avg
        if not self.momentum:
            gamma = pull
        else:
            keep, new = self.mix
            b = b.add(pull, self.momentum if self.nesterov else 1.0)
            gamma = new * b + pull if self.nesterov else new * b
            b = keep * b
        return gamma, Adjoint(adjoint.params.add(gamma, self.weight_decay), b, adjoint.exp_avg_sq)

    def immediate(self, state: State, grad: Params, typical: Tensor) -> Params:
        """Sensitivity at horizon 0: the gradient itself, scaled by this update's reach."""
        del typical
        zeros = Adjoint(grad, *(part.zeros_like() for part in state[1:]))
        return self.adjoint(zeros, state, state, grad)[0]

    def masked(self, gamma: Params, after: State, typical: Tensor) -> Params:
        del after, typical  # nothing is divided by a second moment
        return gamma
