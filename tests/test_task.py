"""The pools of a run: in order, each once, and resumed after the last one handed out."""

from itertools import islice

import pytest
import torch

from selectflow.run.task import PoolSource

CPU = torch.device("cpu")


class Counting:
    """Pools 0, 1, ... up to `end`, which can be resumed and say nothing else."""

    def __init__(self, end=8):
        self.at, self.end = 0, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.end:
            raise StopIteration
        self.at += 1
        return {"x": torch.tensor([self.at - 1])}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def numbers(pools):
    return [int(pool["x"]) for pool in pools]


@pytest.mark.parametrize("peeked", [[], [0, 3], [2, 1, 4], [9, 0, 9]])
def test_pools_that_were_peeked_at_are_handed_out_once_and_drawn_again_on_resumption(peeked):
    source, handed_out = PoolSource(Counting(), CPU), []
    for num in peeked:
        handed_out += numbers(islice(source, 1))
        expected = range(len(handed_out), min(8, len(handed_out) + num))
        assert numbers(islice(source.upcoming(), num)) == list(expected)
    assert handed_out == list(range(len(peeked)))
    resumed = PoolSource(Counting(), CPU)
    resumed.load_state_dict(source.state_dict())
    rest = list(range(len(peeked), 8))
    assert numbers(source) == numbers(resumed) == rest
    assert source.state_dict() == {"at": 8}


def test_pools_are_drawn_only_when_they_are_asked_for():
    pools = Counting()
    source = PoolSource(pools, CPU)
    upcoming = source.upcoming()
    next(source)
    assert pools.at == 1
    next(upcoming)
    assert pools.at == 2
    next(source)
    assert pools.at == 2


def test_a_plain_list_has_no_position_and_is_not_resumed():
    pools = [{"x": torch.tensor([0])}]
    source = PoolSource(pools, CPU)
    assert numbers(source) == [0]
    assert (source.state_dict(), source.errors, source.identity) == (None, {}, {})
    for state in (None, {"at": 0}):
        with pytest.raises(ValueError, match=r"pools must have state_dict .*, got list; use"):
            source.load_state_dict(state)
