"""Arithmetic on named tensors, so that formulas over all parameters read as on paper.

`Params` maps a parameter's name to a tensor. Operators act name by name through `torch._foreach`,
one kernel for many small tensors. A tensor may carry leading query dimensions: they broadcast
against tensors without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Operand: TypeAlias = "Params | float"


class Params(dict[str, Tensor]):
    """Named tensors with elementwise arithmetic; every operator returns new tensors."""

    def _unary(self, op: Callable[[list[Tensor]], Sequence[Tensor]]) -> Params:
        return Params(zip(self, op(list(self.values())), strict=True)) if self else Params()

    def _binary(self, op: Callable[..., Sequence[Tensor]], other: Operand) -> Params:
        if not isinstance(other, Params):
            return self._unary(lambda tensors: op(tensors, other))
        if self.keys() != other.keys():
            raise KeyError(f"both operands must have the names {list(self)}, got {list(other)}")
        return self._unary(lambda tensors: op(tensors, [other[name] for name in self]))

    def __add__(self, other: Operand) -> Params:
        return self._binary(torch._foreach_add, other)

    def __sub__(self, other: Operand) -> Params:
        return self._binary(torch._foreach_sub, other)

    def __mul__(self, other: Operand) -> Params:
        return self._binary(torch._foreach_mul, other)

    def __truediv__(self, other: Operand) -> Params:
        return self._binary(torch._foreach_div, other)

    def __neg__(self) -> Params:
        return self._unary(torch._foreach_neg)

    __radd__ = __add__
    __rmul__ = __mul__

    def sqrt(self) -> Params:
        """Elementwise square root."""
        return self._unary(torch._foreach_sqrt)

    def add(self, other: Params, scale: float) -> Params:
        """`self + scale * other` without a temporary for the product."""
        others = [other[name] for name in self]
        return self._unary(lambda tensors: torch._foreach_add(tensors, others, alpha=scale))

    def moved(self, direction: Params, step: float) -> Params:
        """`self + step * direction`; tensors that `direction` does not name are shared."""
        if direction.keys() == self.keys():
            return self.add(direction, step)
        return Params({**self, **self.pick(direction).add(direction, step)})

    def map(self, function: Callable[[Tensor], Tensor]) -> Params:
        """`function` applied to every tensor."""
        return Params((name, function(tensor)) for name, tensor in self.items())

    def detach(self) -> Params:
        """The same storage without autograd history: never requires a gradient."""
        return self.map(Tensor.detach)

    def pick(self, names: Iterable[str]) -> Params:
        """The part with these names, in their order."""
        return Params((name, self[name]) for name in names)

    def zeros_like(self, *leading: int) -> Params:
        """Zeros of the same types and devices, for reading: one number in memory each.

        Their shapes are the same, too, after `leading` dimensions.
        """
        return self.map(lambda x: x.new_zeros(()).expand((*leading, *x.shape)))

    def dot(self, other: Params) -> float:
        """Inner product over all entries of all tensors."""
        return float(sum((self[name] * other[name]).sum() for name in self))

    def norm(self) -> float:
        """Euclidean norm over all entries of all tensors."""
        return math.hypot(*torch.stack(torch._foreach_norm(list(self.values()))).tolist())

    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.values())


def merge(parts: Iterable[Params]) -> Params:
    """Parts with disjoint names as one."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    return Params((name, tensor) for part in parts for name, tensor in part.items())
