"""What the field scores examples by, each as its paper has it, and the names of all strategies.

Signs are ours: larger is kept first, so an example that helps the target has a positive score. A
formula is of plain gradients: clipping by norm is a property of a batch and no part of any.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selectflow.core.counts import is_count
from selectflow.core.examples import inner, norms
from selectflow.core.optim import AdamW, State, part_of
from selectflow.core.params import Params, merge
from selectflow.core.passes import check_finite
from selectflow.strategies.candidates import Candidates, Strategy
from selectflow.strategies.irreducible import ReducibleLoss

# --- by losses ------------------------------------------------------------------------------------


def uniform(candidates: Candidates) -> Tensor:
    """Random scores: what training on the stream as it comes keeps."""
    return torch.rand(candidates.size, generator=candidates.generator, device="cpu")


def loss(candidates: Candidates) -> Tensor:
    """The example's own loss: hardest first."""
    return candidates.losses()


def easiest(candidates: Candidates) -> Tensor:
    """The example's own loss: smallest first, as self-paced learning begins (Kumar et al. 2010)."""
    return -candidates.losses()


@dataclass(frozen=True)
class TargetPath:
    """What a short training on the target set alone would do to the example's loss:

        score(z) = loss_z(theta) - loss_z(theta'),  theta' after `steps` updates on target batches

    by the optimizer's own rule, from its present state without momentum. To first order in the
    learning rate this is `influence` at H = 0. It is RHO-LOSS with a reference that starts from
    the present model; no paper is followed.

    Args:
        steps: updates, >= 1.
    """

    steps: int = 4

    def __post_init__(self) -> None:
        if not is_count(self.steps):
            raise ValueError(f"steps must be an integer >= 1, got {self.steps!r}")

    def __call__(self, candidates: Candidates) -> Tensor:
        training = candidates.training
        batches = [training.next_target() for _ in range(self.steps)]
        updates, now = training.optimizer.updates(self.steps), training.optimizer.state()
        # Momentum is of what was kept before: with it that would be kept again, and again.
        state = now._replace(exp_avg=now.exp_avg.zeros_like())
        after = training.trained_on(batches, updates, state)
        return candidates.losses() - training.losses_at(after.params)


# --- by one gradient ------------------------------------------------------------------------------


def influence(candidates: Candidates) -> Tensor:
    """Look-ahead influence on the target loss through the real optimizer: most helpful first."""
    return candidates.influence()


def gradient(candidates: Candidates) -> Tensor:
    """Influence under plain SGD, per unit of learning rate:

        score(z) = grad target . grad loss_z

    TracIn (Pruthi et al. 2020, arXiv 2002.08484, equation 1) at the present checkpoint.
    """
    return candidates.slopes(candidates.training.target_gradient())


def gradient_norm(candidates: Candidates) -> Tensor:
    """GraNd, |grad loss_z| (Paul et al. 2021, arXiv 2107.07075, definition 2.1), of this model."""
    return candidates.training.reduced(norms)


def el2n(candidates: Candidates) -> Tensor:
    """EL2N, |p - y| (Paul et al. 2021, arXiv 2107.07075, definition 2.2), of this model.

    p - y is the gradient of the cross entropy in the logits, and found as such. So the loss must be
    the cross entropy of what the model returns.

    Raises:
        ValueError: the loss is another one.
    """
    logits, errors = candidates.training.output_errors()
    labels = logits.softmax(-1) - errors
    slack = 1e-4 if labels.dtype in (torch.float32, torch.float64) else 2e-2
    if logits.ndim != 2 or (labels.sum(1) - 1).abs().max() > slack or labels.min() < -slack:
        raise ValueError(
            "strategy 'el2n' must have a classification loss, the cross entropy of the logits "
            "(N, classes) that the model returns, without weights of classes; got "
            f"{tuple(logits.shape)} and another gradient than p - y; use 'gradient_norm' or 'loss'"
        )
    return errors.square().sum(1).sqrt()


def adam(candidates: Candidates) -> Tensor:
    """LESS (Xia et al. 2024, arXiv 2402.04333, definition 3.1) at the present checkpoint:

        score(z) = cos(grad target, Gamma(z)),  Gamma = m' / c1 / (sqrt(v' / c2) + eps)

    Gamma is what Adam would move by, had it the example as its batch, its moments as they are. In
    the paper gradients are projected to fewer dimensions and scores summed over checkpoints.

    Raises:
        ValueError: the optimizer is not Adam or AdamW.
    """
    training = candidates.training
    target = training.target_gradient()
    update, state = training.next_update()

    def direction(gradients: Params) -> Params:
        return merge(
            _direction(rule, part_of(state, names), gradients.pick(names))
            for rule, names in update.parts(gradients)
        )

    def cosines(gradients: Params) -> Tensor:
        moved = direction(gradients)
        size = norms(moved) * target.norm()
        return torch.where(size > 0, inner(moved, target) / size, 0.0)

    return training.reduced(cosines)


def _direction(rule: object, state: State, gradients: Params) -> Params:
    """What one update would move theta by at a learning rate of 1, without decoupled decay."""
    if not isinstance(rule, AdamW):
        raise ValueError(
            f"the optimizer must be Adam or AdamW for the strategy 'adam', got "
            f"{type(rule).__name__}; use 'gradient', or 'opus' for any optimizer"
        )
    decay = 0.0 if rule.decoupled else rule.weight_decay
    moved = replace(rule, lr=1.0, weight_decay=decay).advance(state, gradients)
    return -(moved.params - state.params)


# --- a batch at a time ----------------------------------------------------------------------------


def greats(candidates: Candidates) -> Tensor:
    """GREATS (Wang et al. 2024, NeurIPS, section 4, with the identity for the Hessian): greedily

        s_i = lr grad target . g_i;  after each pick j:  s_i -= lr^2 g_i . g_j

    g_i = grad loss_i, lr the optimizer's present rate, of its group where they differ. An example
    counts as a step of its own with the whole rate, as in the authors' program, not as 1/B of it.

    Returns:
        Ranks, shape (P,): P for the first pick, 1 for the last.
    """
    training = candidates.training
    rates = training.rates()
    # lr g . target and lr^2 g . g: gradients are weighted by the rate once
    scores, gram = training.products(training.target_gradient(), rates)
    return _ranks(candidates, scores, gram, _largest)


@dataclass(frozen=True)
class Boltzmann:
    """OPUS (Wang et al. 2026, arXiv 2602.05400): like GREATS in the optimizer's own geometry,

        U_i = P g_i . grad target;  after each pick j:  U_i -= P g_i . P g_j

    with P the optimizer's next step as a function of the gradient, its second moments frozen (as
    `influence` at H = 0 has it: lr, momentum's share and the preconditioner are part of P). Picks
    are drawn with probability ~ exp(U_i / temperature) from what is left.

    Departures: products are exact, not sketched, and over all layers alike. Utilities are divided
    by their standard deviation over the pool first: as they come they are of the size of the
    learning rate, and any temperature near 1 would draw at random.

    Args:
        temperature: in standard deviations of the utilities, > 0; 0: the largest, greedily.
    """

    temperature: float = 0.9

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature!r}")

    def __call__(self, candidates: Candidates) -> Tensor:
        training = candidates.training
        target = training.target_gradient()
        update, state = training.next_update()
        ones = target.map(torch.ones_like)
        weights = -update.immediate(state, ones)  # P, which is diagonal
        utilities, gram = training.products(target, weights)

        spread = utilities.std(correction=0).clamp(min=torch.finfo(utilities.dtype).tiny)

        def draw(utilities: Tensor) -> int:
            if not self.temperature:
                return _largest(utilities)
            chances = (utilities / self.temperature).softmax(0)
            return int(torch.multinomial(chances, 1, generator=candidates.generator))

        return _ranks(candidates, utilities / spread, gram / spread, draw)


def _largest(scores: Tensor) -> int:
    return int(scores.argmax())


def _ranks(
    candidates: Candidates, scores: Tensor, gram: Tensor, pick: Callable[[Tensor], int]
) -> Tensor:
    """P for the first pick, 1 for the last; a pick lowers the scores of what is like it.

    All are picked, one by one, so that the first B are what is kept for any B.
    """
    check_finite("scores", scores, candidates.pool)
    scores, gram = scores.double().cpu(), gram.double().cpu()
    found = torch.empty_like(scores)
    for rank in range(candidates.size, 0, -1):
        place = pick(scores)
        found[place] = rank
        scores = scores - gram[place]
        scores[place] = -math.inf
    return found


STRATEGIES: dict[str, Strategy] = {
    "influence": influence,
    "uniform": uniform,
    "loss": loss,
    "easiest": easiest,
    "rho": ReducibleLoss(),
    "target_path": TargetPath(),
    "gradient": gradient,
    "gradient_norm": gradient_norm,
    "el2n": el2n,
    "adam": adam,
    "greats": greats,
    "opus": Boltzmann(),
    "opus_greedy": Boltzmann(temperature=0.0),
}

SIGNED = ("influence", "gradient", "adam", "target_path", "rho")
"""Strategies whose scores are positive where an example helps; of the others only the order counts.
"""
