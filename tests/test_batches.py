"""Batches of every kind: counted, indexed and split without losing their type."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from selectflow.batches import chunks, describe, num_examples, take

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    name: str = "kept"


class Encoding(UserDict):
    """As Hugging Face's BatchEncoding: a UserDict with attributes of its own."""

    def __init__(self, data, origin):
        super().__init__(data)
        self.origin = origin


X = torch.arange(5) * 10
INDEX = torch.tensor([3, 0])
KEYS = list("abcde")


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        (X, lambda b: b),
        ((X, X + 1), lambda b: b[0]),
        ([X, X + 1], lambda b: b[0]),
        (Pair(X, X), lambda b: b.x),
        ({"a": {"b": X}, "key": KEYS}, lambda b: b["a"]["b"]),
        (Record(X), lambda b: b.x),
        (Encoding({"input_ids": X}, "here"), lambda b: b["input_ids"]),
        ((X, X.numpy()), lambda b: torch.from_numpy(b[1])),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "dict", "dataclass", "encoding", "numpy"],
)
def test_take_and_chunks_keep_the_type(batch, read):
    assert num_examples(batch) == 5
    taken = take(batch, INDEX)
    assert type(taken) is type(batch)
    assert read(taken).tolist() == [30, 0]
    assert [read(part).tolist() for part in chunks(batch, 2)] == [[0, 10], [20, 30], [40]]
    assert next(iter(chunks(batch, None))) is batch


def test_what_is_not_a_tensor_is_indexed_or_passed_through():
    batch = {"x": X, "key": KEYS, "weights": [1, 2], "split": "train", "np": np.arange(5)}
    taken = take(batch, INDEX)
    assert taken["key"] == ["d", "a"]
    assert taken["np"].tolist() == [3, 0]
    assert (taken["weights"], taken["split"]) == ([1, 2], "train")
    assert take(Encoding({"x": X}, "here"), INDEX).origin == "here"
    assert take(Record(X, "n"), INDEX).name == "n"


def test_leading_dimensions_must_agree():
    with pytest.raises(ValueError, match=r"same leading dimension, got a.b: 5, c: 4"):
        num_examples({"a": {"b": X}, "c": X[:4]})
    with pytest.raises(ValueError, match="same leading dimension, got 0: 5, 1: None"):
        num_examples((X, torch.tensor(1.0)))
    with pytest.raises(ValueError, match="at least one tensor, got dict"):
        num_examples({"key": KEYS})


def test_examples_are_named_by_key_or_position():
    assert describe({"x": X, "key": KEYS}, INDEX) == "keys d, a"
    assert describe((X,), INDEX) == "positions 3, 0"
