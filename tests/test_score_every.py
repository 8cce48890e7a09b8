"""Steps of which one is selected for: the others train on any examples, and cost no pass."""

from itertools import islice

import pytest
import torch

from selectflow import AutoHorizon, Selector
from selectflow.control.rules import AutoRate
from selectflow.core.batches import num_examples, take, tensors
from selectflow.run.config import ConfigError, load
from tests.problems import PROBLEMS

PROBLEM = PROBLEMS[0]


def parts(loss_fn=PROBLEM.loss_fn, **options):
    model, make = PROBLEM.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    given = {"keep": 4, "horizon": 0, "derivative": "central", "score_every": 3} | options
    return model, optimizer, Selector(model, optimizer, loss_fn, [make(8), make(9)], **given), make


def train_on(model, optimizer, batch):
    optimizer.zero_grad()
    PROBLEM.loss_fn(model, batch).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("pools_per_update", [1, 2])
def test_the_steps_in_between_cost_no_pass_and_take_any_examples(pools_per_update):
    calls = []

    def counted(model, batch):
        calls.append(num_examples(batch))
        return PROBLEM.loss_fn(model, batch)

    model, optimizer, selector, make = parts(counted, pools_per_update=pools_per_update)
    seen = []
    for number, batch in enumerate(islice(selector.stream(make(10) for _ in range(40)), 36)):
        step, last = number // pools_per_update, selector.last
        assert last.step == step
        assert (last.scores is not None) == bool(calls) == (step % 3 == 0)
        calls.clear()
        if last.scores is None:
            assert last.indices.tolist() == sorted(set(last.indices.tolist()))
            assert (last.horizon, last.losses, last.target_loss) == (None, None, None)
            seen.append(tuple(last.indices.tolist()))
        assert len(last.indices) == 4
        kept = take(last.pool, last.indices)
        pairs = zip(tensors(batch), tensors(kept), strict=True)
        assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs)
        if number % pools_per_update == pools_per_update - 1:
            train_on(model, optimizer, batch)
    assert len(set(seen)) > 5  # not the same ones all the time


def test_what_is_scored_of_the_candidates_is_made_where_they_are_scored():
    seen = []
    model, optimizer, selector, make = parts(score_view=lambda x: seen.append(x) or x)
    for number, batch in enumerate(islice(selector.stream(make(10) for _ in range(9)), 6)):
        assert bool(seen) == (number % 3 == 0)
        seen.clear()
        train_on(model, optimizer, batch)


def test_a_step_that_is_selected_for_is_selected_for_as_ever():
    """A new selector at the same state of training keeps the same."""
    model, optimizer, selector, make = parts()
    pools = [make(10) for _ in range(9)]
    for number, batch in enumerate(selector.stream(pools)):
        if number % 3 == 0:
            target = [list(selector._target.cycle._batches)[number // 3 % 2]]
            alone = Selector(model, optimizer, PROBLEM.loss_fn, target, 4, 0, derivative="central")
            alone.select(pools[number])
            assert torch.equal(alone.last.scores, selector.last.scores)
            assert torch.equal(alone.last.indices, selector.last.indices)
        train_on(model, optimizer, batch)


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_it_is_resumed_to_the_bit(cut):
    def run(model, optimizer, selector, pools):
        for batch in selector.stream(pools):
            train_on(model, optimizer, batch)

    pools = [PROBLEM.make()[1](10) for _ in range(10)]
    model, optimizer, selector, _ = parts(lr=AutoRate(window=2))
    run(model, optimizer, selector, pools)
    other, second, first_part, _ = parts(lr=AutoRate(window=2))
    run(other, second, first_part, pools[:cut])
    saved = first_part.state_dict()
    last, third, resumed, _ = parts(lr=AutoRate(window=2))
    last.load_state_dict(other.state_dict())
    third.load_state_dict(second.state_dict())
    resumed.load_state_dict(saved)
    run(last, third, resumed, pools[cut:])
    for one, two in zip(model.parameters(), last.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_is_weighted_has_equal_weights_in_between():
    _, optimizer, selector, make = parts(weighting="relu", score_every=2)
    for _ in islice(selector.stream(make(10) for _ in range(9)), 4):
        weights = selector.last.weights
        assert (weights == 1).all() == (selector.last.scores is None)
        optimizer.step()


def test_what_compares_every_step_is_refused():
    for options in ({"horizon": "auto"}, {"horizon": AutoHorizon()}, {"interval": "auto"}):
        with pytest.raises(ValueError, match="must be a number when score_every is above 1"):
            parts(**options)


@pytest.mark.parametrize(
    ("key", "value"), [("horizon", "auto"), ("interval", "auto"), ("horizon", ".inf")]
)
def test_a_configuration_refuses_it_likewise(key, value):
    with pytest.raises(ConfigError, match=f"select.(score_every|{key}) must be"):
        load("configs/digits_online.yaml", ["select.score_every=2", f"select.{key}={value}"])
