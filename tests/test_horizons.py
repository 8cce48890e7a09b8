"""Horizons that change over the run: their values by hand, and a selector that follows them."""

import pytest
import torch
from problems import image_loss
from test_selector import selector_for, setting, train

from selectflow import HorizonSchedule
from selectflow.control.horizon import as_horizon


def values(schedule, num):
    return [schedule.at(step) for step in range(num)]


def test_a_list_by_step_holds_each_horizon_until_the_next():
    schedule = HorizonSchedule([(0, 4), (3, 1), (5, 0)])
    assert values(schedule, 8) == [4, 4, 4, 1, 1, 0, 0, 0]
    assert schedule.largest == 4


def test_a_linear_one_rounds_to_the_nearest_halves_up():
    falling = HorizonSchedule([(0, 3), (6, 0)], "linear")  # 3 2.5 2 1.5 1 0.5 0
    assert values(falling, 9) == [3, 3, 2, 2, 1, 1, 0, 0, 0]
    rising = HorizonSchedule([(0, 1), (4, 2), (6, 8)], "linear")  # 1 1.25 1.5 1.75 2 5 8
    assert values(rising, 8) == [1, 1, 2, 2, 2, 5, 8, 8]
    assert rising.largest == 8


def test_a_number_is_its_own_constant():
    assert values(as_horizon(2), 3) == [2, 2, 2]
    schedule = HorizonSchedule([(0, 1)])
    assert as_horizon(schedule) is schedule


@pytest.mark.parametrize(
    ("points", "shape", "message"),
    [
        ([], "step", r"must rise from 0, got \[\]"),
        ([(1, 2)], "step", r"must rise from 0, got \[1\]"),
        ([(0, 2), (5, 1), (5, 0)], "step", r"must rise from 0, got \[0, 5, 5\]"),
        ([(0, 2), (5, -1)], "linear", "horizon must be an integer >= 0, got -1"),
        ([(0, 1.5)], "step", "horizon must be an integer >= 0, got 1.5"),
        ([(0, 1)], "cosine", "shape must be 'step' or 'linear', got 'cosine'"),
    ],
)
def test_what_is_no_schedule(points, shape, message):
    with pytest.raises(ValueError, match=message):
        HorizonSchedule(points, shape)


def test_a_selector_looks_ahead_as_far_as_each_step_says_and_loses_no_pool():
    model, optimizer, pools, target = setting()
    schedule = HorizonSchedule([(0, 0), (2, 5), (6, 1), (9, 4)])
    selector = selector_for(model, optimizer, target, horizon=schedule, interval=2)
    found, pools_seen = [], []

    for batch in selector.stream(iter(pools)):
        found.append((selector.last.horizon, selector.last.age))
        pools_seen.append(selector.last.pool)
        train(model, optimizer, image_loss, [batch])
    # of 12 pools; the look-ahead at step 10 meets the last two only
    starts = [0, 5, 5, 1, 1, 2]
    assert found == [(horizon, age) for horizon in starts for age in range(2)]
    assert all(mine is theirs for mine, theirs in zip(pools_seen, pools, strict=True))


def test_scores_are_those_of_the_constant_horizon_at_the_same_step():
    model, optimizer, pools, target = setting()
    changing = HorizonSchedule([(0, 3), (4, 0)], "linear")  # 3 2 2 1 0
    options = {"keep": 1.0, "derivative": "exact"}  # keep all: no random part in the look-ahead
    selector = selector_for(model, optimizer, target[:1], horizon=changing, **options)
    for step, horizon in enumerate([3, 2, 2, 1, 0]):
        fresh = selector_for(model, optimizer, target[:1], horizon=horizon, **options)
        fresh.select(pools[step], pools[step + 1 :])
        batch = selector.select(pools[step], pools[step + 1 :])
        torch.testing.assert_close(selector.last.scores, fresh.last.scores, rtol=1e-9, atol=1e-12)
        train(model, optimizer, image_loss, [batch])


def test_a_state_is_not_loaded_under_another_schedule():
    model, optimizer, pools, target = setting()
    one, other = HorizonSchedule([(0, 1), (5, 0)]), HorizonSchedule([(0, 1), (6, 0)])
    selector = selector_for(model, optimizer, target, horizon=one)
    selector.select(pools[0], pools[1:])
    state = selector.state_dict()
    selector_for(model, optimizer, target, horizon=one).load_state_dict(state)
    with pytest.raises(ValueError, match=r"horizon: .*\(5, 0\).* saved, .*\(6, 0\).* here"):
        selector_for(model, optimizer, target, horizon=other).load_state_dict(state)
