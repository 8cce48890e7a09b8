"""Batches as `torch.load` takes them back by its default, `weights_only=True`.

It takes tensors, numbers, texts, lists, tuples and dicts. Of any other container its content is
saved, and the name of its type. A name is looked up among what the program has imported already,
and only for containers of data: loading a file neither imports a module nor calls by name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectflow.core.batches import Batch

_TYPE = "selectflow.type"  # marks the dict that stands for a container of another type


def plain(batch: Batch) -> Any:
    """A batch as tensors, numbers, texts, lists, tuples and dicts.

    Args:
        batch: any nesting of mappings, dataclasses, named tuples, lists, tensors and arrays. What
            else it holds is left as it is. A BatchEncoding loses what the tokenizer knows of its
            texts, a defaultdict its default.

    Raises:
        TypeError: a type that a later program could not find by its name.
    """
    kind = type(batch)
    if isinstance(batch, Mapping):
        items = {key: plain(value) for key, value in batch.items()}
        is_dict = kind in (dict, defaultdict) or not isinstance(batch, MutableMapping)
        return items if is_dict else _marked(kind, items=items)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch)]
        return _marked(kind, fields={name: plain(getattr(batch, name)) for name in fields})
    if isinstance(batch, list | tuple) and kind is not torch.Size:
        parts = [plain(part) for part in batch]
        return kind(parts) if kind in (list, tuple) else _marked(kind, parts=parts)
    return _plain_leaf(batch)


def restored(saved: Any) -> Batch:
    """The batch that `plain` made `saved` from, of the same types.

    Raises:
        ValueError: a type is not there, as its module is not imported yet.
    """
    kind = type(saved)
    if kind in (list, tuple):
        return kind([restored(part) for part in saved])
    if kind is not dict:
        return saved
    content = {key: restored(value) for key, value in saved.items()}
    if _TYPE not in saved:
        return content
    name = content.pop(_TYPE)
    if name == "no bytes":
        return b""
    return _array(**content) if name == "numpy" else _built(_found(name), **content)


def _holds_itself(tensor: Tensor) -> bool:
    """Whether a tensor of another type has its values in its own storage, as an image has."""
    return not torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)


def _marked(kind: type, **content: Any) -> dict[str, Any]:
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = _found(name)
    except ValueError:
        found = None
    if found is not kind:
        raise TypeError(
            f"types of batches must be found by their names to be saved, got {name}; define it at "
            "the top of a module, or use a dict"
        )
    return {_TYPE: name, **content}


def _found(name: str) -> type:
    """A type of containers that is imported already."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    is_container = isinstance(found, type) and (
        issubclass(found, MutableMapping | list | tuple | Tensor) or dataclasses.is_dataclass(found)
    )
    if not is_container:
        raise ValueError(
            f"the type of a saved batch must be imported before it is loaded, got {name}; import "
            f"{module} first, and keep the type where it was"
        )
    return found  # type: ignore[no-any-return]


def _built(kind: Any, **content: Any) -> Any:
    if "tensor" in content:
        return content["tensor"].as_subclass(kind)
    if "items" in content:
        items = content["items"]
        is_record = dataclasses.is_dataclass(kind)  # a ModelOutput is both
        return kind(**items) if is_record else kind(items)
    if "fields" in content:  # without the constructor, which may make other values of them
        record = object.__new__(kind)
        for name, value in content["fields"].items():
            object.__setattr__(record, name, value)
        return record
    if issubclass(kind, tuple):
        return tuple.__new__(kind, content["parts"])
    return kind(content["parts"])


def _plain_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        is_usual = type(leaf) in (Tensor, nn.Parameter) or not _holds_itself(leaf)
        return leaf if is_usual else _marked(type(leaf), tensor=leaf.as_subclass(Tensor))
    if isinstance(leaf, np.ndarray | np.generic):
        return _plain_array(np.asarray(leaf), isinstance(leaf, np.generic))
    return (
        {_TYPE: "no bytes"} if isinstance(leaf, bytes) and not leaf else leaf
    )  # which torch.load does not take


def _plain_array(array: np.ndarray[Any, Any], is_scalar: bool) -> Any:
    if array.dtype.names is not None:
        return array
    values: Any
    if array.dtype.hasobject:
        values = plain(array.ravel().tolist())
    else:
        values = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
    return {
        _TYPE: "numpy",
        "dtype": array.dtype.str,
        "shape": array.shape,
        "values": values,
        "is_scalar": is_scalar,
    }


def _array(dtype: str, shape: tuple[int, ...], values: Any, is_scalar: bool) -> Any:
    if isinstance(values, Tensor):
        array = values.cpu().numpy().view(np.dtype(dtype)).reshape(shape)
    else:
        array = np.empty(len(values), object)
        array[:] = values
        array = array.reshape(shape)
    return array[()] if is_scalar else array
