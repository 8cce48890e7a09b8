"""Weights of examples, and gradients of weighted sums of losses: how chunks of a batch add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples
from selectflow.core.params import Params

Weigh = Callable[[Tensor, int], Tensor]
"""Losses of a chunk and its first position in the batch -> their weights, (N,) or (Q, N)."""


def relu_weights(scores: Tensor) -> Tensor:
    """Weights of examples by their scores:

        w_i = max(0, score_i) / mean_j max(0, score_j)

    so that the mean of w_i loss_i is a weighted mean of the losses. Ren et al. 2018, "Learning to
    Reweight Examples for Robust Deep Learning", equations 6 and 7, where the score is the product
    of the example's gradient with the target's.

    Args:
        scores: shape (N,); positive where the example helps.

    Returns:
        Shape (N,), float64, on the CPU, of mean 1; all 1 where no score is positive.
    """
    helps = scores.detach().cpu().double().clamp(min=0)
    largest = helps.max()
    if not largest:
        return torch.ones_like(helps)
    helps = helps / largest  # the sum of the smallest numbers may have no reciprocal
    return helps / helps.mean()


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of weight times loss; None: of the losses."""
    return (losses if weights is None else weights.to(losses) * losses).mean()


def mean_of(batch: Batch) -> Weigh:
    size = num_examples(batch)
    return lambda losses, _: torch.full_like(losses, 1 / size)


def parts_of(weights: Tensor) -> Weigh:
    return lambda losses, start: weights[..., start : start + len(losses)].to(losses)


def summed(
    total: Mapping[str, Tensor | None], grads: Mapping[str, Tensor | None], params: Params
) -> dict[str, Tensor | None]:
    """Gradients of two chunks in the type of the values; None where neither uses a parameter."""
    one = Params((k, g.to_dense().to(params[k])) for k, g in grads.items() if g is not None)
    before = Params((k, g) for k, g in total.items() if g is not None)
    both = one.keys() & before.keys()
    added = before.pick(both) + one.pick(both) if both else Params()
    return {name: added.get(name, one.get(name, before.get(name))) for name in grads}


def filled(grads: Mapping[str, Tensor | None], params: Params, leading: Sequence[int]) -> Params:
    """Gradients with zeros, after Q `leading` rows or none, where a parameter is not used."""
    return Params(
        (k, params[k].new_zeros((*leading, *params[k].shape)) if g is None else g)
        for k, g in grads.items()
    )
