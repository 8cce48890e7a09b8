"""Directions in the space of parameters: one or several at a time, and how far to step along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from selectflow.core.params import Params, measured

# Norm of the perturbation over norm of the parameters: (losses, gradients). Losses lose fewer
# digits to cancellation than gradients do, so they afford a smaller step and less curvature.
_STEP = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-6, 1e-5)}
_SMALLEST_RMS = 1e-2  # parameters smaller than this, as zeros at the start, count as this large

_Found = TypeVar("_Found")


def has_queries(params: Params, direction: Params) -> bool:
    """Whether `direction` holds several directions along a leading dimension."""
    name = next(iter(direction))
    return direction[name].ndim > params[name].ndim


def split(directions: Params) -> Iterator[Params]:
    """The directions one by one."""
    for tensors in zip(*directions.values(), strict=True):
        yield Params(zip(directions, tensors, strict=True))


def over_queries(
    function: Callable[[dict[str, Tensor]], _Found], params: Params, direction: Params, out: Any
) -> _Found:
    """`function` of one direction at all of them; `out`: where its results get the dimension."""
    if has_queries(params, direction):
        function = torch.func.vmap(function, out_dims=out)
    return function(dict(direction))


def step_size(params: Params, direction: Params, order: int) -> float:
    """Step size with |step * direction| a fixed share of |params|; 0 for a direction of zeros.

    Parameters that `direction` does not name stay where they are, and do not count.
    """
    params = params.pick(direction)
    for name, tensor in params.items():
        if tensor.dtype not in _STEP:
            raise ValueError(
                f"central differences need values of float32 or float64, got {tensor.dtype} for "
                f"{name}; give parameters of a lower precision as float32"
            )
    # of mixed ones the coarsest decides
    steps = [_STEP[tensor.dtype][order] for tensor in params.values()]
    (length, _), (size, num_entries) = measured(direction, params)
    scale = max(size, _SMALLEST_RMS * math.sqrt(num_entries))
    return max(steps) * scale / length if length > 0 else 0.0
