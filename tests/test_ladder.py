"""The rule of the horizon, on contests whose right answer is known by hand."""

import math

import pytest

from selectflow.control.ladder import OFF, AutoHorizon, HorizonRule, Outcome
from selectflow.control.rules import restore, state_of

TRUSTED = {"relative_error": 0.1, "trust_ratio": 0.9}


def outcome(cheap, dear, lead, error=0.003, trust=TRUSTED):
    """The dearer rung's loss is `lead` below the other's, which is 1."""
    return Outcome({cheap: 1.0, dear: 1.0 - lead}, error, 2.0, trust)


def contests(rule, num, lead, **how):
    """Contests in which every dearer rung ends `lead` below its cheaper neighbour."""
    made = []
    for _ in range(num):
        cheap, dear = sorted((rule.horizon, rule.rival()))
        made.append(rule.decide(rule.rival(), outcome(cheap, dear, lead, **how)))
    return made


def test_ladder():
    assert AutoHorizon(largest=0).ladder == (OFF, 0)
    assert AutoHorizon(largest=0, off=False).ladder == (0,)
    assert AutoHorizon(largest=1).ladder == (OFF, 0, 1)
    assert AutoHorizon(largest=6, off=False).ladder == (0, 1, 2, 4)
    assert AutoHorizon(largest=8).ladder == (OFF, 0, 1, 2, 4, 8)


def test_it_begins_with_plain_training_unless_told():
    assert HorizonRule(AutoHorizon()).horizon == OFF
    assert HorizonRule(AutoHorizon(first=0)).horizon == 0
    assert HorizonRule(AutoHorizon(first=2)).horizon == 2
    assert HorizonRule(AutoHorizon(off=False)).horizon == 0


def test_a_lead_is_relative_to_the_larger_loss():
    assert Outcome({OFF: 2.0, 0: 1.5}, 0.1, 3.0).lead() == (0.25, 0.05)
    assert Outcome({0: 1.5, 1: 2.0}, 0.1, 3.0).lead() == (-0.25, 0.05)


def test_what_diverges_loses():
    assert Outcome({0: 2.0, 1: math.inf}, math.nan, 1.0).lead() == (-1.0, 0.0)
    assert Outcome({0: math.inf, 1: 2.0}, math.nan, 1.0).lead() == (1.0, 0.0)
    assert Outcome({0: math.inf, 1: math.inf}, math.nan, 1.0).lead() == (0.0, 0.0)
    assert Outcome({0: 0.0, 1: 0.0}, 0.0, 1.0).lead() == (0.0, 0.0)
    rule = HorizonRule(AutoHorizon())
    contests(rule, 1, lead=0.1)
    assert rule.horizon == 0
    rule.upward = True
    diverged = Outcome({0: 0.9, 1: math.inf}, math.nan, 2.0, TRUSTED)
    assert "diverged" in rule.decide(1, diverged).reason
    assert rule.horizon == 0


def test_selection_begins_where_it_clearly_pays():
    """Leads of 4% +- .4% and of 1% +- .9%."""
    rule = HorizonRule(AutoHorizon())
    decision = contests(rule, 1, lead=0.04, error=0.004)[0]
    assert decision.measures["lead_error"] == 0.004
    assert (decision.before, decision.after, rule.horizon) == ("off", 0, 0)
    assert decision.measures["lead"] == pytest.approx(0.04)
    assert "worth its cost" in decision.reason
    assert "H = 0 is 4.0%" in str(decision)
    assert "below plain training in the same time" in str(decision)
    doubtful = HorizonRule(AutoHorizon())
    decision = contests(doubtful, 1, lead=0.01, error=0.009)[0]
    assert doubtful.horizon == OFF
    assert not decision.moved
    assert "not clearly" in decision.reason


def test_selection_ends_where_it_no_longer_pays():
    rule = HorizonRule(AutoHorizon(largest=0))
    contests(rule, 1, lead=0.05)
    assert rule.horizon == 0
    contests(rule, 1, lead=0.001)  # still ahead, if not clearly
    assert rule.horizon == 0
    contests(rule, 3, lead=-0.05)
    assert rule.horizon == OFF


def test_recent_contests_count_more():
    """Leads of 6% and then -4%, of weights 1 and 2: -2 / 3 %; errors of 3% allow for both."""
    rule = HorizonRule(AutoHorizon(largest=0))
    contests(rule, 1, lead=0.06, error=0.03)
    decision = contests(rule, 1, lead=-0.04, error=0.03)[0]
    assert decision.measures["lead"] == pytest.approx((0.06 - 0.04 / 1.04 * 2) / 3, rel=1e-2)
    assert rule.horizon == OFF


def test_a_lead_far_from_those_before_counts_alone():
    """60% and then 2%, errors of 1%: the stream has changed. It is to be seen again."""
    rule = HorizonRule(AutoHorizon(largest=0))
    contests(rule, 3, lead=0.6, error=0.01)
    assert rule.gap == 400
    decision = contests(rule, 1, lead=0.02, error=0.01)[0]
    assert decision.measures["lead"] == pytest.approx(0.02)
    assert contests(rule, 1, lead=-0.01, error=0.01)[0].measures["lead"] == pytest.approx(
        (0.02 - 2 * 0.01 / 1.01) / 3
    )
    assert rule.horizon == 0
    diverged = HorizonRule(AutoHorizon(largest=0, first=0))
    diverged.decide(OFF, Outcome({OFF: 1.0, 0: math.inf}, math.nan, 2.0))
    decision = contests(diverged, 1, lead=0.02, error=0.001)[0]
    assert decision.measures["lead"] == pytest.approx((0.02 * 2 - 1) / 3)  # not forgotten so soon


def test_what_is_not_clear_yet_is_seen_again_soon():
    rule = HorizonRule(AutoHorizon(first=0))
    decision = contests(rule, 1, lead=-0.01, error=0.02)[0]
    assert decision.reason.endswith("not clear yet")
    assert (rule.horizon, rule.gap, rule.rival()) == (0, AutoHorizon().gap, OFF)


def test_a_jump_of_the_loss_begins_selection_without_a_contest():
    rule = HorizonRule(AutoHorizon())
    contests(rule, 3, lead=-0.1)
    assert rule.gap == 800
    decision = rule.distrust(0.1, 1.0)
    assert (decision.before, decision.after, rule.horizon) == ("off", 0, 0)
    assert decision.measures == {"loss_before": 0.1, "loss_now": 1.0}
    assert "jumped from 0.1 to 1 under plain training" in str(decision)
    assert (rule.gap, rule.rival(), rule.leads) == (AutoHorizon().gap, OFF, {})


def test_a_horizon_that_wins_and_is_trusted_grows():
    rule = HorizonRule(AutoHorizon())
    contests(rule, 40, lead=0.05)
    assert rule.horizon == 8


def test_a_horizon_that_buys_nothing_is_not_paid_for():
    rule = HorizonRule(AutoHorizon(off=False))
    made = contests(rule, 10, lead=0.0)
    assert rule.horizon == 0
    assert all("not worth its cost" in decision.reason for decision in made)


def test_it_takes_trust_to_grow_and_less_to_stay():
    for error, grows, stays in ((0.3, True, True), (0.5, False, True), (0.8, False, False)):
        trust = {"relative_error": error, "trust_ratio": 1 - error}
        rule = HorizonRule(AutoHorizon(tolerance=0.35, off=False))
        contests(rule, 12, lead=0.05, trust=trust)
        assert (rule.horizon > 0) == grows
        rule = HorizonRule(AutoHorizon(tolerance=0.35, off=False))
        contests(rule, 1, lead=0.05)
        rule.upward = False
        contests(rule, 1, lead=0.05, trust=trust)
        assert (rule.horizon == 1) == stays


def test_whether_to_select_needs_no_trust():
    rule = HorizonRule(AutoHorizon(largest=0))
    contests(rule, 1, lead=0.05, trust={})
    assert rule.horizon == 0


def test_a_prediction_of_the_wrong_sign_ends_at_zero():
    rule = HorizonRule(AutoHorizon())
    contests(rule, 20, lead=0.05)
    assert rule.horizon > 2
    rule.upward = False
    contests(rule, 1, lead=0.05, trust={"relative_error": 3.0, "trust_ratio": -2.0})
    assert rule.horizon == 0


def test_gaps_grow_while_nothing_changes():
    rule = HorizonRule(AutoHorizon(gap=25, longest_gap=200, off=False))
    contests(rule, 30, lead=0.0)
    assert rule.gap == 200
    contests(rule, 1, lead=0.5)
    assert (rule.horizon, rule.gap) == (1, 25)


def test_a_contest_that_left_it_open_is_soon_held_again():
    rule = HorizonRule(AutoHorizon(gap=25, longest_gap=200))
    contests(rule, 1, lead=0.0)
    assert rule.gap == 50
    contests(rule, 1, lead=0.02, error=0.014)  # .013 +- .010: not 1.5 times its error
    assert (rule.horizon, rule.gap) == (OFF, 25)


def test_horizon_rule_goes_on_from_its_state():
    whole, half = HorizonRule(AutoHorizon()), HorizonRule(AutoHorizon())
    contests(whole, 5, lead=0.02)
    contests(half, 5, lead=0.02)
    other = HorizonRule(AutoHorizon())
    restore(other, state_of(half))
    assert contests(other, 9, lead=0.01) == contests(whole, 9, lead=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"largest": -1},
        {"tolerance": 0.5},
        {"contest_steps": 1},
        {"gap": 5000},
        {"early": -1},
        {"first": 3},
        {"first": True},
        {"first": 0.0},
        {"first": -1},
        {"first": 2, "largest": 1},
        {"share": 0.0},
        {"late_share": 0.0},
        {"largest": 1, "costs": {0: 2.0}},
        {"largest": 0, "costs": {0: 0.5}},
    ],
)
def test_bad_horizon_settings(settings):
    with pytest.raises(ValueError, match="must"):
        AutoHorizon(**settings)
