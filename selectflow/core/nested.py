"""What of a batch has one row for each example: the rule, and walks by it.

- Mappings (dict, BatchEncoding, ModelOutput), dataclasses, named tuples, lists and tuples are
  looked into, to any depth. Tensors and numpy arrays inside have one row for each example: their
  common number of rows is N, the number of examples.
- A list or tuple of N things that are no tensors has one entry for each example (keys, texts,
  numbers, records, None), and its entries go where the rows go. Where tensors are inside the
  entries and all have N rows, it is looked into instead: `({"x": x}, {"y": y})` is two parts of a
  batch for any N. Other sequences (range, deque) count, too, and become lists.
- All else goes with the batch as it is: texts, numbers, objects, sequences of other lengths.
- The entries of a field called `key` or `__key__` name the examples in messages.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

INTO_ALL = -1  # for a size: no sequence has so many entries, so that each is looked into
_SCALARS = {int, float, bool, str, bytes, type(None)}
_TEXT = str | bytes | bytearray | memoryview
_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def _is_record(node: Any) -> bool:
    if isinstance(node, tuple):
        return hasattr(node, "_fields")  # a named tuple
    is_instance = dataclasses.is_dataclass(node) and not isinstance(node, type)
    return isinstance(node, Mapping) or is_instance


def _is_nested(node: Any, size: int | None) -> bool:
    """Whether a node is looked into, in a batch of `size` examples; None: not known yet."""
    if isinstance(node, Tensor | np.ndarray | str | int):  # most nodes, and the quickest test
        return False
    if not isinstance(node, list | tuple) or _is_record(node):
        return _is_record(node)
    kinds = set(map(type, node))
    if kinds <= _SCALARS:
        return False
    if any(issubclass(kind, Tensor | np.ndarray) for kind in kinds):
        return True
    if size is None:
        return False
    return len(node) != size or set(num_rows(node, INTO_ALL).values()) == {size}


def has_entries(leaf: Any, size: int) -> bool:
    """Whether a leaf without rows has one entry for each of `size` examples."""
    is_sequence = isinstance(leaf, Sequence) and not isinstance(leaf, _TEXT | torch.Size)
    return is_sequence and len(leaf) == size


def num_rows(batch: Any, size: int | None) -> dict[str, int | None]:
    """Rows of each tensor and array by its path; None for one without dimensions."""
    found = {}
    for path, leaf in each_leaf(batch, size):
        if isinstance(leaf, Tensor) and is_odd(leaf):
            kind = "a jagged (nested) tensor" if leaf.is_nested else f"one of {leaf.layout}"
            raise ValueError(
                "tensors of a batch must be dense, or sparse in COO, CSR or CSC form, got "
                f"{kind} at {path or 'batch'}; pad it, or make it a list of one entry per example"
            )
        if isinstance(leaf, Tensor | np.ndarray):
            found[path] = len(leaf) if leaf.ndim else None
    return found


def usual_size(batch: Any) -> int | None:
    """Rows of dense tensors, flat in a dict or list beside lists of plain values; None: not so."""
    if type(batch) not in (dict, list, tuple):
        return None
    size = None
    for leaf in batch.values() if type(batch) is dict else batch:
        if isinstance(leaf, Tensor):
            if not leaf.ndim or leaf.layout is not torch.strided or leaf.is_nested:
                return None
            if size not in (None, len(leaf)):
                return None
            size = len(leaf)
        elif type(leaf) not in (list, tuple) or not _SCALARS.issuperset(map(type, leaf)):
            return None
    return size


def is_odd(leaf: Tensor) -> bool:
    """Whether the rows of a tensor cannot be taken."""
    return leaf.is_nested or leaf.layout not in _LAYOUTS


def rows_at(leaf: Tensor, index: Tensor | slice) -> Tensor:
    if leaf.layout is torch.strided:
        return leaf[index]
    places = torch.arange(len(leaf), device="cpu")[
        index.cpu() if isinstance(index, Tensor) else index
    ]
    # Sparse tensors have no other way to rows, and this one in COO form only.
    chosen = leaf.to_sparse(layout=torch.sparse_coo).index_select(0, places.to(leaf.device))
    return chosen if leaf.layout is torch.sparse_coo else chosen.to_sparse(layout=leaf.layout)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif dataclasses.is_dataclass(node):
        yield from ((field.name, getattr(node, field.name)) for field in dataclasses.fields(node))
    else:
        yield from ((str(position), value) for position, value in enumerate(node))


def each_leaf(node: Any, size: int | None, path: str = "") -> Iterator[tuple[str, Any]]:
    # The batch itself is never one entry per example: that would be no batch but samples.
    if not _is_nested(node, size if path else INTO_ALL):
        yield path, node
        return
    for name, child in _children(node):
        yield from each_leaf(child, size, f"{path}.{name}" if path else name)


def map_leaves(
    function: Callable[[Any], Any], node: Any, size: int | None, is_outermost: bool = True
) -> Any:
    if not _is_nested(node, INTO_ALL if is_outermost else size):
        return function(node)

    def mapped(child: Any) -> Any:
        return map_leaves(function, child, size, is_outermost=False)

    if isinstance(node, Mapping):
        return _with_items(node, {key: mapped(value) for key, value in node.items()})
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        given = [field.name for field in dataclasses.fields(node) if field.init]
        return dataclasses.replace(node, **{name: mapped(getattr(node, name)) for name in given})
    parts = [mapped(child) for child in node]
    return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)


def _with_items(node: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping with other values for its keys, and all that it is beside its items."""
    if type(node) is dict or not isinstance(node, MutableMapping):
        return items
    if isinstance(node, dict | UserDict):
        made: MutableMapping[Any, Any] = copy.copy(node)
    else:  # a shallow copy may share the dict that it keeps its items in
        made = copy.deepcopy(node, {id(value): value for value in node.values()})
    for key, value in items.items():  # some, such as ModelOutput, have no `update`
        made[key] = value
    return made
