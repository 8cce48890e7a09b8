"""Elementwise arithmetic on a large tensor, some rows at a time.

A formula over a whole tensor makes a temporary of its size for each operation. Those of a large
tensor fit into no cache, and the system clears their memory anew each time, which takes longer than
the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves, tree_map

from selectflow.core.params import Params

_Found = TypeVar("_Found")


def in_pieces(function: Callable[..., _Found], most: int, *of: Any) -> _Found:
    """What an elementwise function makes of vectors, in pieces where they are of one large tensor.

    Args:
        function: makes of its arguments a `Params`, or named tuples and tuples of them.
        most: bytes of a piece of a tensor without query dimensions.
        of: its arguments, each a `Params` or a named tuple of them; at least one has a tensor
            without query dimensions.

    Returns:
        What `function(*of)` returns; with several names it is called just so.
    """
    vectors = [vector for vector in tree_leaves(of) if vector]
    whole = min((x for vector in vectors for x in vector.values()), key=lambda x: x.ndim)
    is_one = all(len(vector) == 1 for vector in vectors)
    if not is_one or not whole.ndim or whole.nbytes <= most:
        return function(*of)
    dim, num = -whole.ndim, min(math.ceil(whole.nbytes / most), len(whole))

    def rows(index: int) -> Any:
        return tree_map(lambda part: part.map(lambda x: x.tensor_split(num, dim)[index]), of)

    def joined(*parts: Params) -> Params:
        return Params((name, torch.cat([part[name] for part in parts], dim)) for name in parts[0])

    first, *others = (function(*rows(index)) for index in range(num))
    return tree_map(joined, first, *others)  # type: ignore[no-any-return]
