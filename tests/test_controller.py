"""The rule of the learning rate, on losses whose right answer is known by hand."""

import math

import pytest

from selectflow.control.rules import AutoRate, RateRule, restore, state_of


def settled(**settings):
    """A rule after its first window, in which the rate as it is was best."""
    rule = RateRule(AutoRate(**settings))
    rule.decide(1.0, 0.9, lambda factor: 0.95)
    return rule


def curve(best, start=1.0):
    """Replays whose loss is lowest at the rate `best`, with the rule's multiplier as the rate."""
    return lambda rate: start - 0.1 + 0.02 * math.log2(rate / best) ** 2


def drive(rule, loss_of, num, progress=0.1):
    """Decisions over windows in which the loss at a rate is loss_of(rate)."""
    made = []
    for _ in range(num):
        now = rule.multiplier
        end = loss_of(now)
        made.append(rule.decide(end + progress, end, lambda f, now=now: loss_of(now * f))[0])
    return made


# --- the learning rate ----------------------------------------------------------------------


def test_the_first_window_searches_down_and_once_up():
    for best, found in ((1 / 8, 1 / 8), (1.0, 1.0), (2.0, 2.0), (8.0, 2.0)):
        rule = RateRule(AutoRate())
        decision, redo = rule.decide(1.0, curve(best)(1.0), curve(best))
        assert decision.after == rule.multiplier == found
        assert redo == (found != 1.0)


@pytest.mark.parametrize(("rise", "found"), [(0.15, 1.0), (0.5, 0.25)])
def test_a_loss_that_rises_at_any_rate_does_not_ask_for_the_lowest(rise, found):
    """It rises with the rate: down to where it is no failed step, and no further."""
    rule = RateRule(AutoRate())
    decision, _ = rule.decide(1.0, 1.0 + rise, lambda factor: 1.0 + rise * factor)
    assert decision.after == found


def test_it_climbs_to_the_best_rate_and_stays():
    rule = settled()
    made = drive(rule, curve(16.0), 12, progress=0.0)
    assert rule.multiplier == 16.0
    assert [decision.after for decision in made if decision.moved] == [2, 4, 8, 16]
    assert {decision.after for decision in made[-4:]} == {16.0}


def test_half_the_rate_must_gain_more_than_training_did():
    def replay(factor):
        return {0.5: 0.85, 2.0: 1.0}[factor]  # gains 0.05 over an end of 0.9

    rule = settled()
    once, _ = rule.decide(0.94, 0.9, replay)  # training gained 0.04
    again, _ = rule.decide(0.94, 0.9, replay)
    assert (once.after, again.after) == (1.0, 0.5)
    rule = settled()
    fast = [rule.decide(0.96, 0.9, replay)[0] for _ in range(2)]  # training gained 0.06
    assert fast[-1].after == 1.0


@pytest.mark.parametrize(("half", "after"), [(0.98, 0.5), (1.02, 1.0)])
def test_where_the_loss_rises_at_half_the_rate_too_the_rate_stays(half, after):
    """Two windows from 1 to 1.05, and to less or more than 1 at half the rate."""
    rule = settled()
    for _ in range(2):
        decision, _ = rule.decide(1.0, 1.05, lambda factor: {0.5: half, 2.0: 1.2}[factor])
    assert decision.after == after


@pytest.mark.parametrize(("fall", "after"), [(0.01, 0.5), (0.02, 1.0), (-0.02, 0.5)])
def test_what_training_gains_between_windows_counts(fall, after):
    """Of two windows P = .06 and G = .075; what fell between them counts whole, as P does."""
    rule = settled()
    rule.decide(0.94, 0.9, lambda factor: {0.5: 0.85, 2.0: 1.0}[factor])
    rule.rest(0.9, 0.9 - fall)
    decision, _ = rule.decide(0.94, 0.9, lambda factor: {0.5: 0.85, 2.0: 1.0}[factor])
    assert decision.after == after


def test_a_calm_fall_of_the_rate_leaves_time_to_see():
    rule = settled()
    for _ in range(2):
        gap = rule.gap
        rule.decide(0.94, 0.9, lambda factor: {0.5: 0.85, 2.0: 1.0}[factor])
    assert rule.multiplier == 0.5
    assert rule.gap == gap > 0
    rule.decide(0.9, 1.2, lambda factor: 0.85)  # a rise is looked at again at once
    assert rule.gap == 0


def test_sums_forget_by_halves():
    # by hand: in the second window 0.08 / 2 = 0.04 < 0.03 (1/2 + 1) = 0.045
    rule = settled()
    rule.gap = 0
    first, _ = rule.decide(0.98, 0.9, lambda f: 0.87 if f < 1 else 1.0)
    second, _ = rule.decide(0.9, 0.9, lambda f: 0.87 if f < 1 else 1.0)
    assert (first.after, second.after) == (1.0, 0.5)


def test_a_rise_is_one_of_losses_of_either_sign():
    rule = settled()
    assert rule.has_risen(1.0, 1.21)
    assert not rule.has_risen(1.0, 1.19)
    assert not rule.has_risen(-1.0, -1.0)
    assert not rule.has_risen(-1.0, -2.0)
    assert rule.has_risen(-1.0, -0.79)


@pytest.mark.parametrize(
    ("at_half", "lowest", "after"), [(1.1, 0.01, 0.5), (1.5, 0.01, 0.25), (3.0, 0.4, 0.5)]
)
def test_a_window_that_failed_is_taken_back_at_half_the_rate_or_a_quarter(at_half, lowest, after):
    """A quarter where the loss, from 1.0, rises by more than 20% at half the rate too."""
    rule = settled(rise=0.2, lowest=lowest)
    decision, redo = rule.decide(1.0, 2.0, {0.5: at_half}.__getitem__)
    assert (redo, decision.after) == (True, after)
    assert "rose from 1 to 2: taken back" in decision.reason


def test_at_the_lowest_rate_nothing_is_taken_back():
    decision, redo = settled(lowest=1.0).decide(1.0, 2.0, {}.__getitem__)
    assert (redo, decision.after) == (False, 1.0)
    assert "at the lowest rate" in decision.reason


def test_a_rate_that_diverges_is_never_chosen():
    rule = settled()
    decision, _ = rule.decide(1.0, 0.9, lambda f: math.inf if f > 1 else 0.89)
    assert decision.after == 1.0


def test_a_rising_schedule_is_not_pushed():
    rule = RateRule(AutoRate())
    assert rule.decide(1.0, 0.9, curve(16.0), rising=True)[0].after == 1.0
    assert rule.decide(1.0, 0.9, curve(16.0), rising=True)[0].after == 1.0


def test_a_flat_loss_changes_nothing():
    rule = RateRule(AutoRate())
    made = [rule.decide(0.7, 0.7, lambda factor: 0.7)[0] for _ in range(20)]
    assert {decision.after for decision in made} == {1.0}
    assert rule.gap == AutoRate().longest_gap


def test_it_does_not_oscillate_without_end():
    """Twice always looks better, then half: every raise asks for more windows than the last."""
    rule, raised, lowered = settled(), [], []
    for window in range(300):
        up = rule.multiplier <= 1.0
        decision, _ = rule.decide(0.9, 0.9, lambda f, up=up: 0.8 if (f > 1) == up else 1.0)
        if decision.moved:
            (raised if decision.after > decision.before else lowered).append(window)
    assert raised[1] - raised[0] <= 4
    assert len(raised) < 300 / 16 + 5
    assert raised[-1] - raised[-2] >= 16
    assert all(down - up <= 2 for up, down in zip(raised, lowered, strict=False))


def test_a_gain_that_nobody_would_notice_does_not_raise_the_rate():
    # twice the rate gains 0.004 of 0.9 in each window: by hand, the sums stay below 0.008 < 0.009
    rule = settled()
    made = [rule.decide(0.9, 0.9, lambda f: 0.896 if f > 1 else 0.9)[0] for _ in range(20)]
    assert {decision.after for decision in made} == {1.0}
    assert rule.decide(0.9, 0.9, lambda f: 0.89 if f > 1 else 0.9)[0].after == 2.0


def test_where_progress_goes_with_the_rate_it_is_raised_however_small():
    rule = settled()  # a window gains a thousandth, twice the rate as much again, half of it half
    made = drive(rule, lambda rate: 0.9 - 0.001 * rate, 3, progress=0.001)
    assert [decision.after for decision in made] == [2.0, 4.0, 8.0]
    for twice, half in ((0.8988, 0.8995), (0.898, 0.8992)):  # one of the two is too small
        rule = settled()
        decision, _ = rule.decide(0.9, 0.899, lambda f, a=twice, b=half: a if f > 1 else b)
        assert decision.after == 1.0


def test_replays_that_stand_for_nothing_take_over_nothing_but_a_rise_is_one():
    """Real training rose from 1 to 2, the replay at the same rate to 1.1 only."""
    decision, redo = settled(rise=0.2).decide(1.0, 2.0, lambda factor: 1.1, replaceable=False)
    assert (decision.after, redo) == (0.5, True)  # on from the window's start
    rule = RateRule(AutoRate())
    decision, redo = rule.decide(1.0, 1.1, lambda factor: factor, replaceable=False)
    assert (decision.after, redo) == (1 / 64, False)  # a lower rate is better, and none taken over


@pytest.mark.parametrize(
    ("losses", "after"),
    [
        ({1: math.inf, 1 / 2: math.inf, 1 / 4: math.inf, 1 / 8: 0.9, 1 / 16: 0.95}, 1 / 8),
        ({1: 39.0, 1 / 2: 60.0, 1 / 4: 1.19, 1 / 8: 1.1, 1 / 16: 1.15}, 1 / 8),
        ({1: 39.0, 1 / 2: 1.1, 1 / 4: 1.1}, 1 / 2),
        ({2.0**-power: math.inf for power in range(7)}, 1 / 64),
    ],
)
def test_a_first_window_that_rose_searches_down_past_rates_that_rise_too(losses, after):
    """Half of a rate that is far too high need be no better; the start, at 1.0, is."""
    decision, redo = RateRule(AutoRate()).decide(1.0, losses[1], losses.__getitem__)
    assert (decision.after, redo) == (after, True)
    assert "rose from 1 to" in decision.reason


def test_a_first_window_that_rose_at_the_lowest_rate_says_so():
    decision, redo = RateRule(AutoRate(lowest=1.0)).decide(1.0, 2.0, {}.__getitem__)
    assert (decision.after, redo) == (1.0, False)
    assert "at the lowest rate" in decision.reason


def test_a_turn_downwards_asks_for_more_windows_before_a_raise():
    rule = settled()
    slower, faster = ({0.5: 0.5, 2.0: 1.0}, {0.5: 1.0, 2.0: 0.5})
    for losses, after, patience in (
        (slower, 0.5, 2), (faster, 1.0, 2), (faster, 2.0, 2), (slower, 1.0, 4), (slower, 0.5, 4),
    ):  # fmt: skip
        while True:
            decision, _ = rule.decide(0.9, 0.9, losses.__getitem__)
            if decision.moved:
                break
        assert (decision.after, rule.patience) == (after, patience)


def test_bounds_hold_and_are_named():
    rule = settled(lowest=0.5, highest=4.0)
    made = drive(rule, curve(1024.0), 8, progress=0.0)
    assert rule.multiplier == 4.0
    assert "at a bound of [0.5, 4]" in made[-1].reason


def test_rate_rule_goes_on_from_its_state():
    whole, half = settled(), settled()
    drive(whole, curve(8.0), 3)
    drive(half, curve(8.0), 3)
    other = RateRule(AutoRate())
    restore(other, state_of(half))
    assert drive(other, curve(2.0), 9) == drive(whole, curve(2.0), 9)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lowest": 2.0}, "0 < lowest <= 1 <= highest"),
        ({"highest": 0.5}, "0 < lowest <= 1 <= highest"),
        ({"lowest": 0.0}, "0 < lowest <= 1 <= highest"),
        ({"highest": math.inf}, "0 < lowest <= 1 <= highest"),
        ({"window": 0}, "window must be >= 1"),
        ({"rise": 0.0}, "rise > 0"),
    ],
)
def test_bad_rate_settings(settings, named):
    with pytest.raises(ValueError, match=named):
        AutoRate(**settings)
