"""Which examples of a pool to keep: a strategy gives each a score, the largest are kept.

A strategy is a function of `Candidates`. It asks for what it needs, and only that is computed:
`uniform` costs nothing, `loss` one forward pass, `influence` the look-ahead and two passes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.batches import Batch


@dataclass(frozen=True)
class Candidates:
    """A pool before selection.

    Attributes:
        pool: the batch of P candidates.
        size: P.
        losses: call for the loss of each at the present parameters, shape (P,).
        influence: call for -gamma . grad loss_z of each, shape (P,): the predicted rise of the
            target loss if the example were removed; positive = it helps.
        generator: the selector's own random numbers, on the CPU.
    """

    pool: Batch
    size: int
    losses: Callable[[], Tensor]
    influence: Callable[[], Tensor]
    generator: torch.Generator


Strategy = Callable[[Candidates], Tensor]
"""Candidates -> scores, shape (P,); larger is kept first."""


def uniform(candidates: Candidates) -> Tensor:
    """Random scores: what training on the stream as it comes keeps."""
    return torch.rand(candidates.size, generator=candidates.generator, device="cpu")


def loss(candidates: Candidates) -> Tensor:
    """The example's own loss: hardest first."""
    return candidates.losses()


def influence(candidates: Candidates) -> Tensor:
    """Look-ahead influence on the target loss through the real optimizer: most helpful first."""
    return candidates.influence()


STRATEGIES: dict[str, Strategy] = {"uniform": uniform, "loss": loss, "influence": influence}


def resolve(strategy: str | Strategy) -> Strategy:
    """The strategy of that name, or the function itself.

    Raises:
        ValueError: no strategy has the name; says which is nearest.
    """
    if callable(strategy):
        return strategy
    if strategy not in STRATEGIES:
        near = difflib.get_close_matches(str(strategy), STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "or pass a function of Candidates"
        raise ValueError(
            f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}; {hint}"
        )
    return STRATEGIES[strategy]
