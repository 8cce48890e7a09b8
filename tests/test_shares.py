"""The rule of live shares, by hand calculation and against its own definition."""

import math
from itertools import product

import numpy as np
import pytest

from selectflow.control.shares import (
    AutoShares,
    ShareSchedule,
    drift,
    live_shares,
    log_rates,
    loss_gains,
)

FREE = {"drift": math.inf, "floor": 1e-12}


def test_relative_kept_rates_by_hand():
    # 30 of 120 kept: r = 1/4; with 8 candidates more at r each: (20 + 2) / (40 + 8) and so on
    found = log_rates(np.array([40.0, 80.0]), np.array([20.0, 10.0]), prior=8)
    assert np.exp(found) == pytest.approx([4 * 22 / 48, 4 * 12 / 88], rel=1e-14)


def test_a_source_of_few_candidates_stays_near_the_mean():
    num, kept = np.array([2.0, 2000.0]), np.array([2.0, 500.0])
    rates = [math.exp(log_rates(num, kept, prior)[0]) for prior in (1e-9, 32, 1e9)]
    assert rates == pytest.approx([3.988, 1.176, 1], abs=1e-3)
    assert log_rates(np.array([0.0, 9.0]), np.array([0.0, 3.0]), 32)[0] == 0  # never seen
    assert log_rates(np.zeros(2), np.zeros(2), 32).tolist() == [0, 0]


def test_losses_move_towards_what_is_learnt_least():
    # mean loss (10 + 60) / 40 = 1.75; with 10 candidates more of it each
    found = loss_gains(np.array([20.0, 20.0]), np.array([10.0, 60.0]), prior=10)
    assert found == pytest.approx([27.5 / 30 - 1.75, 77.5 / 30 - 1.75], rel=1e-14)


def test_shares_by_hand():
    start, gains = np.array([0.5, 0.25, 0.25]), np.log([2.0, 1.0, 0.5])
    found = live_shares(start, gains, AutoShares(strength=2, drift=9, floor=0.2))
    tilted = np.array([0.5 * 4, 0.25, 0.25 / 4])
    assert found == pytest.approx(0.8 * tilted / tilted.sum() + 0.2 * start, rel=1e-14)


def test_they_maximize_the_mean_gain_less_the_price_of_drift():
    start, gains = np.array([0.5, 0.3, 0.2]), np.array([0.3, -0.2, 0.4])
    best = live_shares(start, gains, AutoShares(strength=3, **FREE))

    def worth(shares):
        return shares @ gains - drift(shares, start) / 3

    for i, j in product(range(3), repeat=2):
        moved = best + 1e-4 * (np.eye(3)[i] - np.eye(3)[j])
        assert worth(moved) <= worth(best)


def test_exponentiated_gradient_steps_come_to_rest_there():
    start, gains = np.array([0.5, 0.3, 0.2]), np.array([0.3, -0.2, 0.4])
    shares, rate = start, 0.1
    for _ in range(2000):
        logs = (1 - rate / 5) * np.log(shares) + rate / 5 * np.log(start) + rate * gains
        shares = np.exp(logs) / np.exp(logs).sum()
    assert live_shares(start, gains, AutoShares(strength=5, **FREE)) == pytest.approx(shares)


@pytest.mark.parametrize("bound", [0.1, 0.7])
def test_the_drift_is_bounded_and_every_source_is_seen(bound):
    start = np.array([0.7, 0.2, 0.1])
    settings = AutoShares(strength=50, drift=bound, floor=0.1)
    found = live_shares(start, np.array([-2.0, 0.0, 3.0]), settings)
    assert (found >= 0.1 * start).all()
    assert drift((found - 0.1 * start) / 0.9, start) == pytest.approx(bound, rel=1e-7)
    assert drift(found, start) < bound
    assert found.sum() == pytest.approx(1, rel=1e-14)


def test_a_schedule_goes_from_point_to_point():
    points = [(0, {"a": 1, "b": 3}), (10, {"b": 0, "a": 2})]
    linear, step = ShareSchedule(points), ShareSchedule(points, "step")
    assert linear.at(0, ["a", "b"]).tolist() == step.at(9, ["a", "b"]).tolist() == [0.25, 0.75]
    assert linear.at(5, ["b", "a"]) == pytest.approx([0.375, 0.625])
    assert linear.at(10, ["a", "b"]).tolist() == step.at(99, ["a", "b"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], r"must rise from 0, got \[\]"),
        ([(1, {"a": 1})], r"must rise from 0, got \[1\]"),
        ([(0, {"a": 1}), (5, {"b": 1})], r"of the same sources at each point, got {'b': 1}"),
        ([(0, {"a": 0})], r"not all 0, .* got {'a': 0}"),
    ],
)
def test_schedules_that_say_nothing_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        ShareSchedule(points)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength > 0, .* got strength=0"),
        ({"memory": 0.5}, "memory >= 1, .* got memory=0.5"),
        ({"floor": 1.5}, "got floor=1.5"),
        ({"drift": math.nan}, "got drift=nan"),
        ({"delay": -1}, "delay must be an integer >= 0, got -1"),
        ({"follow": "size"}, "follow must be 'kept' or 'loss', got 'size'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AutoShares(**options)
