"""Batches of any type come back from a file that `torch.load` reads by its default."""

import io
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from selectflow import Selector
from selectflow.core import plain as plain_module
from selectflow.core.plain import plain, restored


class Pair(NamedTuple):
    x: torch.Tensor
    y: Any


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    keys: list[str]
    length: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "length", len(self.x))


class Image(torch.Tensor):
    pass


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    return torch.load(io.BytesIO(file.getvalue()))


def same(left, right):
    """Whether two batches are of the same types with the same values."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
        assert right.flags.writeable
    elif isinstance(left, dict | UserDict):
        assert list(left) == list(right)
        for name in left:
            same(left[name], right[name])
    elif isinstance(left, Record):
        same(vars(left), vars(right))
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            same(a, b)
    else:
        assert left == right


X, Y = torch.arange(12.0).view(4, 3), torch.tensor([0, 1, 2, 0])
BATCHES = {
    "tensors": [X, Y],
    "encoding": transformers.BatchEncoding({"input_ids": Y[:, None], "key": ["a", "b", "c", "d"]}),
    "named tuple": Pair(X, {"deep": Pair(Y, None)}),
    "record": Record(X, Y, ["a", "b", "c", "d"]),
    "output": SequenceClassifierOutput(logits=X),
    "ordered": OrderedDict(b=X, a=Y),
    "arrays": {
        "x": X.numpy(), "text": np.array(["a", "bc", "d", ""]), "number": np.float32(0.1),
        "objects": np.array([None, "a", 3, [1, 2]], dtype=object), "none": np.zeros((4, 0)),
    },
    "image": {"x": X.as_subclass(Image), "size": torch.Size([2, 3]), "on": torch.device("cpu")},
    "others": {"t": (1, 2.5, "a", None, True), "b": (b"bytes", b""), 3: [1, [2]]},
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_comes_back_as_it_was(name):
    same(BATCHES[name], restored(through_a_file(plain(BATCHES[name]))))


def test_a_default_is_not_saved():
    batch = defaultdict(list, x=X)
    same({"x": X}, restored(through_a_file(plain(batch))))


def test_a_batch_of_before_is_taken_as_it_is():
    """States were saved with the batches themselves once."""
    batch = {"x": X, "record": BATCHES["record"]}
    same(batch, restored(batch))


def test_types_without_a_name():
    @dataclass
    class Local:
        x: torch.Tensor

    with pytest.raises(TypeError, match=r"found by their names.*<locals>.Local; define it at the"):
        plain([Local(X)])


@pytest.mark.parametrize("name", ["nowhere.at.all:Batch", "os:system", "builtins:object"])
def test_a_file_cannot_name_what_is_no_container(name):
    saved = {plain_module._TYPE: name, "items": {"x": X}}
    with pytest.raises(ValueError, match=f"must be imported before it is loaded, got {name}"):
        restored(saved)


KINDS = {
    "encoding": lambda x, y: transformers.BatchEncoding({"x": x, "y": y}),
    "named tuple": Pair,
    "record": lambda x, y: Record(x, y, [str(i) for i in range(len(x))]),
    "arrays": lambda x, y: {"x": x, "y": y, "key": np.arange(len(x))},
}


def losses(model, batch):
    part = batch if hasattr(batch, "x") else transformers.BatchEncoding(batch)  # by attribute
    return F.cross_entropy(model(part.x), part.y, reduction="none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_resumes(kind):
    """With pools that were peeked at, and an open window of the rate control."""
    torch.manual_seed(0)
    pools = [KINDS[kind](torch.randn(8, 3), torch.randint(3, (8,))) for _ in range(12)]

    def begin():
        torch.manual_seed(1)
        model = nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        selector = Selector(model, optimizer, losses, pools[:2], keep=3, horizon=3, lr="auto")
        return model, optimizer, selector

    def go_on(model, optimizer, selector, some):
        for batch in selector.stream(some):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
            yield

    model, optimizer, selector = begin()
    steps = go_on(model, optimizer, selector, iter(pools))
    for _ in range(5):
        next(steps)
    assert selector.num_peeked == 2
    assert selector.state.rate.window.batches
    saved = through_a_file([part.state_dict() for part in (model, optimizer, selector)])
    list(steps)
    others = begin()
    for part, state in zip(others, saved, strict=True):
        part.load_state_dict(state)
    list(go_on(*others, iter(pools[7:])))
    assert torch.equal(model.weight, others[0].weight)
    assert torch.equal(selector.last.scores, others[2].last.scores)
