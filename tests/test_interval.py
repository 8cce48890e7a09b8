"""interval="auto": how scores change is measured as by hand, and decides how long they serve."""

import copy
import math
from itertools import islice

import pytest
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from selectflow import AutoHorizon, AutoRate, Selector
from selectflow.control.interval import (
    LARGEST,
    Costs,
    IntervalState,
    Turning,
    decay,
    rank_correlation,
    worth_per_cost,
)
from selectflow.control.state import SelectorState, TargetSet
from selectflow.core.forms import Forms
from selectflow.core.target import Cycle
from selectflow.run import metrics
from tests import reference
from tests.problems import PROBLEMS
from tests.test_distributed import KEEP, POOL, TARGET, data, losses, make, train

PROBLEM = PROBLEMS[0]
EVEN = Costs(1.0, 1.0)  # a look-ahead costs as much as a step with its scores


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("agree", [0.2, 1.0])
def test_the_decay_of_exact_measurements_is_found(rate, agree):
    measured = [Turning(age, agree * math.exp(-rate * age), agree) for age in (1, 2, 4, 8)]
    assert decay(measured) == pytest.approx(rate, rel=0.08, abs=1e-9)


def test_scores_that_turned_against_fresh_ones_decay_as_fast_as_can_be():
    assert decay([Turning(1, -0.5, 0.8)] * 3) > 3


def test_the_newest_counts_most():
    slow, fast = [Turning(4, 0.9, 1.0)] * 6, [Turning(4, 0.1, 1.0)] * 6
    assert decay(slow + fast) > 3 * decay(fast + slow)


def test_where_fresh_scores_do_not_agree_nothing_is_known():
    assert decay([Turning(1, 0.0, 0.05)]) is None
    state = IntervalState(interval=2)
    made = state.decide(40, Turning(2, 0.0, 0.05), EVEN)
    assert (state.interval, made.moved) == (2, False)
    assert "larger target batches would help" in made.reason


def test_worth_per_cost_by_hand():
    costs = Costs(112.0, 48.0)  # keep 16 of 32, 16 of the target, H = 0
    assert worth_per_cost(1, 0.0, costs) == pytest.approx(1 / 160)
    half = math.log(2)
    assert worth_per_cost(4, half, costs) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8) / 496)


def test_a_sensitivity_serves_longer_where_scores_stay():
    state, step, seen = IntervalState(), 0, []
    for _ in range(9):
        step = state.next_at
        state.decide(step, Turning(state.interval, 0.6, 0.6), EVEN)
        seen.append(state.interval)
    assert seen == [1, 1, 2, 4, 8, LARGEST, LARGEST, LARGEST, LARGEST]
    assert state.gap == 256  # measured rarely once it stays
    for _ in range(9):
        state.decide(step, Turning(state.interval, -0.2, 0.6), EVEN)
    assert (state.interval, state.gap) == (1, 256)


def test_a_dear_look_ahead_serves_longer_than_a_cheap_one():
    found = {}
    for ahead in (0.1, 10.0):
        state = IntervalState()
        for _ in range(12):
            worth = math.exp(-0.5 * state.interval)
            state.decide(0, Turning(state.interval, worth, 1.0), Costs(1.0, ahead))
        found[ahead] = state.interval
    assert found == {0.1: 1, 10.0: 4}


def test_scores_that_say_nothing_have_no_rank_correlation():
    assert math.isnan(rank_correlation(torch.zeros(5), torch.arange(5.0)))
    assert rank_correlation(torch.arange(5.0), torch.arange(5.0) ** 3) == pytest.approx(1)


# --- what is measured -----------------------------------------------------------------------------


def build(horizon=0, num_targets=3, **options):
    model, make = PROBLEM.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = [make(9 + index) for index in range(num_targets)]
    selector = Selector(
        model, optimizer, PROBLEM.loss_fn, target, 4, horizon, "auto",
        **{"derivative": "exact"} | options,
    )  # fmt: skip
    selector.state.interval.next_at = selector.state.interval.gap = 5
    return model, optimizer, selector, target, [make(11) for _ in range(40)]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    PROBLEM.loss_fn(model, batch).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("num_targets", [1, 3])
def test_both_correlations_are_those_of_scores_found_by_hand(num_targets):
    model, optimizer, selector, target, pools = build(num_targets=num_targets)
    stream = selector.stream(pools)
    for _ in range(5):
        step(model, optimizer, next(stream))
    old = selector.state.ahead.gamma(0)
    by_old = -reference.slopes(model, PROBLEM.loss_fn, pools[5], old)
    twin, other = reference.clone(model, optimizer)
    fresh, again = (
        Selector(twin, other, PROBLEM.loss_fn, [target[index % num_targets]], 4, 0)
        for index in (5, 6)
    )
    for each in (fresh, again):
        each.select(pools[5])
    next(stream)
    (made,) = selector.last.decisions
    assert (made.what, made.before, made.after, made.step) == ("interval", 1, 1, 5)
    assert made.measures["age"] == 1
    expected = [
        spearmanr(by_old, fresh.last.scores).statistic,
        spearmanr(again.last.scores, fresh.last.scores).statistic if num_targets > 1 else 1.0,
    ]
    found = [made.measures["rank_of_old"], made.measures["rank_of_fresh"]]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("horizon", [0, 2])
def test_measuring_changes_no_choice_while_the_interval_stays(horizon):
    """The target's batches come in their order, each once, and random parts alone differ."""
    seen = []
    for first in (5, 10**6):
        model, optimizer, selector, _, pools = build(horizon, nominal="policy")
        selector.state.interval.next_at = first
        for batch in islice(selector.stream(pools), 8):
            seen.append((selector.last.scores, batch["key"], selector.last.target_loss))
            step(model, optimizer, batch)
    for (scores, keys, loss), (others, theirs, other) in zip(seen[:8], seen[8:], strict=True):
        assert torch.equal(scores, others)
        assert (keys, loss) == (theirs, other)


def test_a_peeked_batch_of_the_target_is_drawn_once():
    drawn = []

    class Watched(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            drawn.append(index)
            return torch.tensor(float(index))

    state = SelectorState(torch.Generator(), Forms(), None, None)
    target = TargetSet(Cycle(DataLoader(Watched(), batch_size=1)), None, state)
    found = [target.next(), target.peek(), target.peek(), target.next(), target.next()]
    assert [float(batch) for batch in found] == [0, 1, 1, 1, 2]
    assert drawn == [0, 1, 2]


def test_a_target_batch_that_is_not_finite_decides_nothing():
    model, make = PROBLEM.make()
    bad = {**make(9), "image": torch.full((9, 1, 8, 8), math.nan, dtype=torch.float64)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = [make(9), make(9), bad]
    selector = Selector(model, optimizer, PROBLEM.loss_fn, target, 4, 0, "auto")
    selector.state.interval.next_at = 1
    stream = selector.stream(make(11) for _ in range(9))
    for _ in range(2):
        step(model, optimizer, next(stream))
        assert not selector.last.decisions
    with pytest.raises(FloatingPointError, match="at optimizer step 2: losses must be finite"):
        next(stream)  # the batch's own turn


@pytest.mark.parametrize("horizon", [0, 2])
def test_each_look_ahead_serves_for_the_interval(horizon):
    model, optimizer, selector, _, pools = build(horizon, derivative="central")
    control, ages = selector.state.interval, []
    control.next_at = 4
    control.measured = [(1, 0.9, 0.9)] * 40  # scores that hardly turned
    for batch in selector.stream(pools):
        ages.append((selector.last.age, selector.state.ahead_serves))
        assert metrics.of_selection(selector.last)[metrics.INTERVAL] == control.interval
        step(model, optimizer, batch)
    assert ages[:4] == [(0, 1)] * 4
    at = 4
    while at < 30:  # from each look-ahead on, as many steps as the interval was before it
        interval = ages[at][1]
        assert [age for age, _ in ages[at : at + interval]] == list(range(interval))
        at += interval
    assert max(interval for _, interval in ages) > 1


@pytest.mark.parametrize("cut", [4, 7, 12, 18])
def test_it_is_resumed_bit_for_bit(cut, tmp_path):
    def begin():
        made = build(AutoHorizon(gap=6, largest=1, off=False, costs={0: 2.0, 1: 4.0}),
                     lr=AutoRate(window=4), derivative="central")  # fmt: skip
        made[2].state.interval.measured = [(1, 0.9, 0.9)] * 3
        return made

    def advance(model, optimizer, selector, stream, num):
        seen = []
        for batch in islice(stream, num):
            seen.append((selector.last.age, batch["key"], selector.last.decisions))
            step(model, optimizer, batch)
        return seen

    model, optimizer, selector, _, pools = begin()
    seen = advance(model, optimizer, selector, selector.stream(pools), 24)
    assert any(each.what == "interval" and each.moved for *_, made in seen for each in made)
    first, opt, sel, _, pools = begin()
    source = iter(pools)
    head = advance(first, opt, sel, sel.stream(source), cut)
    states = copy.deepcopy([part.state_dict() for part in (first, opt, sel)])
    torch.save(states, tmp_path / "state.pt")
    second, opt2, sel2, _, _ = begin()
    for part, state in zip(
        (second, opt2, sel2), torch.load(tmp_path / "state.pt", weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    tail = advance(second, opt2, sel2, sel2.stream(source), 24 - cut)
    assert head + tail == seen
    for mine, theirs in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("is_thawed", [True, False])
def test_a_sensitivity_of_other_parameters_is_not_compared(is_thawed):
    """Where layers are frozen or trained again just before a measurement, it waits for the next."""
    model, optimizer, selector, _, pools = build(derivative="central")
    first = next(model.parameters())
    first.requires_grad_(not is_thawed)
    stream = selector.stream(pools)
    for _ in range(5):
        step(model, optimizer, next(stream))
    first.requires_grad_(is_thawed)
    step(model, optimizer, next(stream))
    assert (selector.last.step, selector.last.decisions) == (5, ())
    step(model, optimizer, next(stream))
    assert [made.what for made in selector.last.decisions] == ["interval"]


@pytest.mark.parametrize("interval", [0, "often", 1.5])
def test_other_intervals_are_refused(interval):
    model, make = PROBLEM.make()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="interval must be an integer >= 1, or auto"):
        Selector(model, optimizer, PROBLEM.loss_fn, [make(4)], 2, 0, interval)


# --- several processes ----------------------------------------------------------------------------


def decided(wrapper):
    model, optimizer = make(wrapper)
    rank = torch.distributed.get_rank()
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(model, optimizer, losses, target, KEEP, 0, "auto", derivative="central")
    control = selector.state.interval
    control.next_at, control.gap = 2, 2
    control.measured = [(1, 0.6, 0.9)] * 3
    seen, weights = train(selector, model, optimizer, data(rank, 20, POOL))
    return [tuple(each) for each in control.measured], control.interval, weights, seen


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_all_processes_decide_alike(two, wrapper):
    (ours, interval, weights, seen), (theirs, other, others, unlike) = two.run(
        decided, wrapper, limit_s=240
    )
    assert ours == theirs
    assert len(ours) > 3
    assert interval == other
    assert torch.equal(weights, others)
    assert seen != unlike  # each kept of its own pools
