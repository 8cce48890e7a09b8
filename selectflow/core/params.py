"""Arithmetic on named tensors, so that formulas over all parameters read as on paper.

`Params` maps a parameter's name to a tensor. Operators act name by name through `torch._foreach`,
one kernel for many small tensors. A tensor may carry leading query dimensions: they broadcast
against tensors without.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from selectflow.distributed import are_shards, over_shards

Operand: TypeAlias = "Params | float"


class Params(dict[str, Tensor]):
    """Named tensors with elementwise arithmetic; every operator returns new tensors."""

    @property
    def device(self) -> torch.device:
        """Where the first of them is."""
        return next(iter(self.values())).device

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

    def toward(self, other: Params, share: float) -> Params:
        """`self + share * (other - self)`."""
        others = [other[name] for name in self]
        return self._unary(lambda tensors: torch._foreach_lerp(tensors, others, share))

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
        parts = torch.stack([(self[name] * other[name]).sum() for name in self])
        return over_shards(parts.sum()).item()

    def norm(self) -> float:
        """Euclidean norm over all entries of all tensors."""
        return measured(self)[0].norm

    def num_bytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.values())


class Measure(NamedTuple):
    """Size of a vector: Euclidean norm, and number of entries."""

    norm: float
    num_entries: int


def measured(*vectors: Params) -> list[Measure]:
    """The size of each vector, from one read; of shards, by one reduction over those who hold the
    rest.
    """
    norms = [torch.stack(torch._foreach_norm(list(each.values()))) for each in vectors]
    nums = [sum(tensor.numel() for tensor in each.values()) for each in vectors]
    if not are_shards():
        read = iter(torch.cat(norms).tolist())
        sizes = [math.hypot(*islice(read, len(each))) for each in vectors]
        return list(map(Measure, sizes, nums))
    squares = torch.stack([part.double().square().sum() for part in norms])
    squares, counts = over_shards(torch.stack([squares, squares.new_tensor(nums)])).tolist()
    return [Measure(math.sqrt(x), round(num)) for x, num in zip(squares, counts, strict=True)]


def merge(parts: Iterable[Params]) -> Params:
    """Parts with disjoint names as one."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    return Params((name, tensor) for part in parts for name, tensor in part.items())


# --- which parameters a score is taken over -----------------------------------------------------


def scored_names(
    patterns: Sequence[str] | None, trained: Iterable[str], model: nn.Module
) -> tuple[str, ...] | None:
    """Names of the trained parameters that the patterns choose.

    A pattern is matched as a whole, with `*` for any characters. Chosen is what one of them
    matches, or everything where none chooses, less what one that begins with `!` matches:
    `["transformer.h.*"]`, `["!*.wte.*", "!*.wpe.*"]`. A tied weight goes by each of its names and
    counts once.

    Args:
        patterns: of names; None: all trained parameters.
        trained: names of the trained parameters.
        model: has the parameters, and the further names of tied ones.

    Returns:
        The chosen names, in the order of `trained`; None where there are no patterns.

    Raises:
        ValueError: a pattern matches no trained parameter, or nothing is left.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ValueError(f"params must be a list of patterns, got {patterns!r}; put it in a list")
    trained = list(trained)
    aliases = _aliases(model)
    chosen: set[str] = set()
    dropped: set[str] = set()
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        found = {
            name
            for name in trained
            if any(fnmatchcase(alias, bare) for alias in aliases.get(name, [name]))
        }
        if not found:
            raise ValueError(_no_match(pattern, bare, trained, aliases))
        (chosen if bare == pattern else dropped).update(found)
    names = tuple(name for name in trained if name in (chosen or trained) and name not in dropped)
    if not names:
        raise ValueError(
            f"params must leave a parameter to score, got {list(patterns)}, which leave none of "
            f"{len(trained)}; name fewer after '!'"
        )
    return names


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {each[0]: each for each in names.values()}


def _no_match(pattern: str, bare: str, trained: list[str], aliases: dict[str, list[str]]) -> str:
    frozen = [name for name in aliases if name not in trained and fnmatchcase(name, bare)]
    if frozen:
        why = f"which only frozen ones match, as {frozen[0]}"
    else:
        known = [alias for name in trained for alias in aliases.get(name, [name])]
        near = difflib.get_close_matches(bare, known, n=1, cutoff=0)
        why = f"which matches none; the nearest is {near[0]!r}"
    return (
        f"params must be patterns of trained parameters' names, got {pattern!r}, {why}; "
        "* stands for any characters, as in 'transformer.h.*'"
    )
