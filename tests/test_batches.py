"""Batches of every kind: counted, indexed and split without losing their type."""

import itertools
import random
from collections import UserDict, deque, namedtuple
from collections.abc import MutableMapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from selectflow.core.batches import PeekedPools, chunks, describe, num_examples, take, to_device
from selectflow.core.target import Cycle

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


def test_one_batch_is_not_taken_for_several():
    with pytest.raises(ValueError, match=r"got one batch, a dict of x, y; put it into a list"):
        Cycle({"x": torch.zeros(2), "y": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"got one batch, a Tensor; put it into a list"):
        Cycle(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"iterable of batches, got function; pass a list"):
        Cycle(drawn)


# --- what an example is -------------------------------------------------------------------------

META = [{"id": i} for i in range(5)]
TEXTS = [None, "b", None, "d", "e"]
BOXES = [{"boxes": torch.full((i + 1, 4), i), "label": torch.tensor(i)} for i in range(5)]


@pytest.mark.parametrize("make", [tuple, list])
@pytest.mark.parametrize("column", [range(5), [0.5, 1, 2, 3, 4], META, TEXTS, BOXES, [[1, 2]] * 5])
def test_entries_go_with_their_rows(make, column):
    taken = take({"x": X, "nested": (X, {"column": make(column)})}, INDEX)["nested"][1]["column"]
    assert type(taken) is make
    assert all(entry is column[i] for entry, i in zip(taken, INDEX, strict=True))
    parts = chunks((X, make(column)), 2)
    assert [len(part[1]) for part in parts] == [2, 2, 1]


def test_other_sequences_have_entries_too():
    batch = {"x": X, "ids": range(5), "queue": deque(KEYS), "shape": torch.Size([5, 7])}
    taken = take(batch, INDEX)
    assert (taken["ids"], taken["queue"], taken["shape"]) == ([3, 0], ["d", "a"], (5, 7))
    assert take({"x": X, "size": torch.Size([1] * 5)}, INDEX)["size"] == (1,) * 5


@pytest.mark.parametrize("make", [tuple, list])
@pytest.mark.parametrize("num", [2, 5])
def test_parts_are_no_entries(make, num):
    """As torch collates samples that are pairs of dicts or of pairs, for as many examples, too."""
    x = X[:num]
    batch = make([{"a": x}, {"b": make([x, x + 1])}])
    assert num_examples(batch) == num
    taken = take(batch, torch.tensor([1]))
    assert (taken[0]["a"].tolist(), taken[1]["b"][1].tolist()) == ([10], [11])
    inner = take({"y": x, "pair": batch}, torch.tensor([1]))["pair"]
    assert (len(inner), inner[0]["a"].tolist()) == (2, [10])


def test_pairs_of_texts_as_torch_collates_them():
    pairs = [(f"q{i}", f"d{i}") for i in range(5)]
    batch = next(iter(DataLoader(list(zip(X, pairs, strict=True)), batch_size=5)))
    assert [list(texts) for texts in take(batch, INDEX)[1]] == [["q3", "q0"], ["d3", "d0"]]


def test_tensors_in_entries_are_moved_as_well():
    moved = to_device({"x": X, "boxes": BOXES}, torch.device("meta"))
    assert {box["boxes"].device.type for box in moved["boxes"]} == {"meta"}
    assert moved["x"].device.type == "meta"


def test_parts_that_disagree_are_not_taken_for_entries():
    with pytest.raises(ValueError, match=r"leading dimension, got x: 5, pair.0.a: 4, pair.1.b: 5"):
        num_examples({"x": X, "pair": ({"a": X[:4]}, {"b": X})})
    with pytest.raises(ValueError, match=r"same leading dimension, got 0.a: 2, 1.b: 3"):
        num_examples(({"a": X[:2]}, {"b": X[:3]}))


@pytest.mark.parametrize("keys", [KEYS, tuple(KEYS), np.array(KEYS), deque(KEYS)])
def test_keys_are_found_where_they_are(keys):
    assert describe({"x": X, "key": keys}, INDEX) == "keys d, a"
    assert describe((X, {"meta": {"__key__": keys}}), INDEX) == "keys d, a"
    assert describe({"x": X, "key": X + 1}, INDEX) == "keys 31, 1"


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support")
def test_rows_of_sparse_tensors(layout):
    dense = torch.arange(15.0).view(5, 3) % 4
    batch = {"x": dense.to_sparse(layout=layout), "key": KEYS}
    assert num_examples(batch) == 5
    for index in (INDEX, torch.tensor([2, 2, 4]), slice(1, 3)):
        taken = take(batch, index)["x"]
        assert taken.layout is layout
        assert torch.equal(taken.to_dense(), dense[index])


def test_tensors_without_rows_are_refused_by_name():
    jagged = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"got a jagged \(nested\) tensor at 1.text; pad it"):
        num_examples((torch.ones(2), {"text": jagged}))
    blocks = torch.ones(4, 4).to_sparse_bsr((2, 2))
    with pytest.raises(ValueError, match=r"got one of torch.sparse_bsr at batch"):
        take(blocks, INDEX)


class Frozen(dict):
    """As ModelOutput: items can be set, but not by `update`."""

    def update(self, *args):
        raise TypeError("no update")


class Wrapped(MutableMapping):
    """Keeps its items in a dict that a shallow copy shares."""

    def __init__(self, items, origin):
        self.items_of, self.origin = items, origin

    def __getitem__(self, key):
        return self.items_of[key]

    def __setitem__(self, key, value):
        self.items_of[key] = value

    def __delitem__(self, key):
        del self.items_of[key]

    def __iter__(self):
        return iter(self.items_of)

    def __len__(self):
        return len(self.items_of)


@pytest.mark.parametrize("batch", [Frozen(x=X), Wrapped({"x": X}, "here")])
def test_mappings_of_other_kinds_are_copied_and_not_written_to(batch):
    taken = take(batch, INDEX)
    assert (type(taken), taken["x"].tolist()) == (type(batch), [30, 0])
    assert batch["x"] is X
    assert getattr(taken, "origin", "here") == "here"


def test_a_model_output_is_a_mapping():
    output = SequenceClassifierOutput(logits=X, hidden_states=(X, X + 1))
    taken = take({"x": X, "teacher": output}, INDEX)["teacher"]
    assert type(taken) is SequenceClassifierOutput
    assert (taken.logits.tolist(), taken["logits"].tolist()) == ([30, 0], [30, 0])
    assert [state.tolist() for state in taken.hidden_states] == [[30, 0], [31, 1]]
    assert output.logits is X


# --- targets of every kind ----------------------------------------------------------------------


class Again:
    """Re-iterable, without a length."""

    def __init__(self, batches):
        self.batches, self.num_rounds = batches, 0

    def __iter__(self):
        self.num_rounds += 1
        yield from self.batches


class Once:
    """Gives the same iterator each time."""

    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


class OnceOfLength(Once):
    def __len__(self):
        return 3


@pytest.mark.parametrize("num", range(8))
@pytest.mark.parametrize("make", [iter, Again, Once], ids=["generator", "again", "once"])
def test_a_target_of_any_kind_is_drawn_as_a_list_is(make, num):
    listed, other = Cycle("abc"), Cycle(make("abc"))
    assert drawn(other, 0, 8) == drawn(listed, 0, 8)
    _, position = drawn(listed, 0, num)
    assert drawn(Cycle(make("abc")), position, 7) == drawn(Cycle("abc"), position, 7)  # resumed
    assert drawn(other, position, 7) == drawn(listed, position, 7)  # went back to another state


def test_a_target_without_end_is_drawn_as_it_is_needed():
    numbers = itertools.count()
    target = Cycle(numbers)
    assert drawn(target, 0, 5) == ([0, 1, 2, 3, 4], 5)
    assert next(numbers) == 5  # no more were drawn
    assert drawn(Cycle(itertools.count()), 5, 2) == ([5, 6], 7)
    assert drawn(Cycle(itertools.cycle("abc")), 4, 3) == (["b", "c", "a"], 7)


def test_what_is_remembered_has_a_limit(monkeypatch):
    monkeypatch.setattr("selectflow.core.target._MOST_REMEMBERED", 3 * X.nbytes)
    batches = [X + i for i in range(6)]
    endless = Cycle(itertools.cycle(batches))
    found, _ = drawn(endless, 0, 20)
    assert all(batch is batches[i % 6] for i, batch in enumerate(found))
    assert endless._remembered is None
    found, _ = drawn(Cycle(Again(batches)), 0, 20)
    assert all(batch is batches[i % 6] for i, batch in enumerate(found))
    ending = Cycle(iter(batches))
    _, position = drawn(ending, 0, 6)
    with pytest.raises(ValueError, match=r"again in each round, got a list_iterator .* 6 batches"):
        ending.draw(position)
    with pytest.raises(ValueError, match=r"used up after 6 batches; pass a list of batches"):
        ending.draw(2)


def test_a_target_that_is_used_up_is_not_called_empty():
    target = Cycle(OnceOfLength("abc"))
    _, position = drawn(target, 0, 3)
    with pytest.raises(ValueError, match=r"got a OnceOfLength that is used up after 3 batches"):
        target.draw(position)


def test_random_targets_have_random_numbers_of_their_own():
    def endless():
        while True:
            yield torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(0)
    before = torch.get_rng_state()
    target, found = Cycle(endless()), []
    for position in range(3):
        found.append(target.draw(position)[0])
        torch.set_rng_state(before)  # as a training loop that draws nothing
    assert all(len(set(column)) == 3 for column in zip(*found, strict=True))
    state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    target.draw(3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)
