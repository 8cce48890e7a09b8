"""Batches of every kind: counted, indexed and split without losing their type."""

import itertools
from collections import UserDict, deque, namedtuple
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from selectflow.core.batches import Cycle, PeekedPools, chunks, describe, num_examples, take

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    name: str = "kept"


@dataclass(frozen=True)
class Counted:
    x: torch.Tensor
    num: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "num", len(self.x))


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


class Named:
    """Samples of a number and a name."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.tensor(index), f"name-{index}"


def test_a_dataclass_computes_its_own_fields_again():
    assert take(Counted(X), INDEX).num == 2


def test_names_that_torch_collated_stay_with_their_examples():
    numbers, names = take(next(iter(DataLoader(Named(), batch_size=6))), INDEX)
    assert list(names) == [f"name-{number}" for number in numbers.tolist()]
    pair = {"x": X, "shape": (28, 28), "key": tuple(KEYS)}
    assert [part["key"] for part in chunks(pair, 3)] == [tuple("abc"), tuple("de")]
    assert take(pair, INDEX)["shape"] == (28, 28)
    assert describe(pair, INDEX) == "keys d, a"


def drawn(target, position, num):
    """So many batches from a position on, and the position after them."""
    found = []
    for _ in range(num):
        batch, position = target.draw(position)
        found.append(batch)
    return found, position


@pytest.mark.parametrize("num", range(7))
def test_a_target_goes_on_where_another_was(num):
    first, second = Cycle("abc"), Cycle("abc")
    before, position = drawn(first, 0, num)
    assert before == list("abcabca")[:num]
    assert drawn(second, position, 7) == drawn(first, position, 7)


def test_a_loader_of_the_target_draws_no_random_number_before_it_is_used():
    loader = DataLoader(Named(), batch_size=2, shuffle=True)
    before = torch.get_rng_state()
    target = Cycle(loader)
    assert torch.equal(torch.get_rng_state(), before)
    target.draw(1)


@pytest.mark.parametrize("pattern", [[0], [2, 0, 0, 3, 0], [1] * 6, [0, 0, 9]])
def test_peeked_pools_come_later_in_order(pattern):
    """However far is looked ahead, by streams one after the other over the same source."""
    source, peeked, seen = iter(range(12)), deque(), []
    for part in range(3):
        stream = PeekedPools(source, peeked)
        for ahead, pool in zip(pattern, stream, strict=False):
            coming = list(itertools.islice(stream.upcoming(), ahead))
            assert coming == list(range(pool + 1, 12))[:ahead]
            seen.append(pool)
            if part < 2 and len(seen) % 2:
                break
    assert seen == list(range(len(seen)))


def test_a_target_without_end_is_refused():
    with pytest.raises(ValueError, match=r"must come to an end, got itertools.cycle; pass what"):
        Cycle(itertools.cycle("abc"))


def test_one_batch_is_not_taken_for_several():
    with pytest.raises(ValueError, match=r"got one batch, a dict of x, y; put it into a list"):
        Cycle({"x": torch.zeros(2), "y": torch.zeros(2)})
