"""The choice of form and step, on made-up derivatives."""

import math

import pytest
import torch

from selectflow.core.forms import GOOD, SCALES, TOLERANCE, Forms, apart, best_step


@pytest.mark.parametrize("best", [0.7, 4.0, 5.5, 30.0])
def test_the_best_step_is_between_those_that_are_tried(best):
    """Rounding and truncation at right angles, of which the sum is least at `best`."""
    exact = torch.tensor([100.0, 0, 0], dtype=torch.float64)

    def derive(form, scale):
        assert form == "central"
        rounding, truncation = math.sqrt(2) * best / scale, (scale / best) ** 2
        return exact + torch.tensor([0, rounding, truncation], dtype=torch.float64)

    scale, error = best_step(derive, exact, "gradients")
    assert scale == pytest.approx(best, rel=0.05)
    assert error == pytest.approx(math.sqrt(3) / 100, rel=0.01)
    assert error < min(apart(derive("central", s), exact, "gradients") for s in SCALES)


@pytest.mark.parametrize(
    ("least", "scale", "stays"),
    [
        (GOOD + 0.01, 5.0, True),  # no other is better
        (GOOD - 0.01, 7.0, True),  # good
        (GOOD - 0.01, 25.0, False),
    ],
)
def test_a_step_that_is_right_but_not_good_gives_way_to_a_better_one(least, scale, stays):
    exact = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

    def derive(form, scale):  # best at a scale of 5
        return exact if form == "exact" else exact * (1 + least + abs(math.log(scale / 5)) / 100)

    assert apart(derive("central", scale), exact, "losses") < TOLERANCE
    forms = Forms(decided={"losses": "central"}, scales={"losses": scale})
    assert forms.decide("losses", "auto", derive) == "central"
    assert (forms.scales["losses"] == scale) == stays
    assert abs(math.log(forms.scales["losses"] / 5)) <= abs(math.log(scale / 5))
