"""Weights by score: what is trained, by hand, in simulation, in replays and in a saved state."""

import copy
from itertools import islice

import pytest
import torch
from problems import PROBLEMS, image_loss, images
from reference import per_example_gradients

from selectflow import AutoHorizon, AutoRate, Scorer, Selector
from selectflow.control.shares import AutoShares
from selectflow.core.batches import MicroBatches, as_one, weighted
from selectflow.core.optim import State
from selectflow.core.weight_changes import selection
from selectflow.core.weighted import relu_weights
from selectflow.data.shares import Shares

MLP = PROBLEMS[0]
RESTLESS = AutoHorizon(
    largest=1, gap=3, longest_gap=3, contest_steps=2, share=1.0, costs={0: 1.5, 1: 2.0}
)


def setting(lr=3e-3, kind=torch.optim.AdamW, num_pools=12, size=10):
    model, make = MLP.make(torch.float64, 0)
    pools = [make(size) for _ in range(num_pools)]
    return model, kind(model.parameters(), lr=lr), pools, [make(9), make(7)]


def selector_for(model, optimizer, target, **options):
    options = {"keep": 1.0, "weighting": "relu", "horizon": 0} | options
    return Selector(model, optimizer, image_loss, target=target, **options)


def train(model, optimizer, selector, batches, steps=None):
    """The user's loop, weighted; returns the weights of each step."""
    found = []
    for batch in islice(batches, steps):
        weights = selector.last.weights
        found.append(weights)
        optimizer.zero_grad()
        (weights * image_loss(model, batch)).mean().backward()
        optimizer.step()
    return found


def params_of(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


# --- the weights --------------------------------------------------------------------------------


def test_weights_are_positive_scores_of_mean_1():
    weights = relu_weights(torch.tensor([3.0, -2.0, 1.0, 0.0]))
    assert weights.tolist() == [3.0, 0.0, 1.0, 0.0]
    assert relu_weights(torch.tensor([-1.0, 0.0, -3.0])).tolist() == [1.0, 1.0, 1.0]
    tiny = torch.tensor([5e-324, 1e-323, -1.0], dtype=torch.float64)
    assert relu_weights(tiny).tolist() == [1.0, 2.0, 0.0]


def test_h_0_under_sgd_is_reweighting_by_products_of_gradients():
    """Ren et al. 2018: w_i = max(0, g_target . g_i), normalised, each gradient by autograd."""
    model, optimizer, pools, target = setting(0.1, torch.optim.SGD)
    selector = selector_for(model, optimizer, target, derivative="exact")
    batch = selector.select(pools[0])
    named = dict(model.named_parameters())
    mean = torch.autograd.grad(image_loss(model, target[0]).mean(), list(named.values()))
    goal = dict(zip(named, mean, strict=True))
    products = torch.stack(
        [
            sum((grad[name] * goal[name]).sum() for name in goal)
            for grad in per_example_gradients(model, image_loss, batch)
        ]
    )
    expected = products.clamp(min=0) / products.clamp(min=0).sum()
    assert 0 < (expected > 0).sum() < len(expected)
    torch.testing.assert_close(
        selector.last.weights / len(expected), expected, rtol=1e-12, atol=1e-12
    )


def test_weights_are_1_where_no_example_helps(caplog):
    model, optimizer, pools, target = setting()

    def bad(candidates):
        return -torch.arange(1.0, candidates.size + 1)

    selector = selector_for(model, optimizer, target, strategy=bad)
    with caplog.at_level("INFO", "selectflow"):
        weights = train(model, optimizer, selector, selector.stream(pools[:3]))
    assert all((each == 1).all() for each in weights)
    assert caplog.text.count("no score is positive") == 1


# --- what is simulated is what is trained -------------------------------------------------------


@pytest.mark.parametrize(("horizon", "per"), [(0, 1), (1, 2)])
def test_a_simulated_step_trains_as_the_loop_does(horizon, per):
    """From the live state, steps of the policy end where the same steps of torch's optimizer do."""
    model, optimizer, pools, target = setting()
    options = {"horizon": horizon, "keep": 6, "pools_per_update": per, "interval": 2}
    selector = selector_for(model, optimizer, target, **options)
    selector.select(pools[0])  # derivatives are decided
    simulated = selector._controls._trained
    future = simulated.upcoming(3, pools[: 2 * per], target[0])
    with selector._objective.scoring():
        steps = list(simulated.policy.select_and_train(horizon, future, selector.state.generator))
    assert len(steps) == 2
    for state, kept, _ in steps:
        parts = kept.parts if per > 1 else [kept]
        batches = [part.parts[0] for part in parts]
        weights = kept.weights.split([6] * per)
        optimizer.zero_grad()
        for batch, own in zip(batches, weights, strict=True):
            ((own * image_loss(model, batch)).mean() / per).backward()
        optimizer.step()
        assert any((own != 1).any() for own in weights)
        for name, param in model.named_parameters():
            torch.testing.assert_close(state.params[name], param.detach(), rtol=1e-12, atol=1e-12)


def test_a_simulated_choice_has_the_weights_of_the_real_one():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, keep=6)
    selector.select(pools[0])
    policy = selector._scoring.policy
    with selector._objective.scoring():
        state = State(*(part.map(torch.clone) for part in selector._optimizer.state()))
        positions, weights = policy.choice(selector.state.ahead.gamma(0), state, pools[0])
    assert positions.equal(selector.last.indices)
    assert weights.equal(selector.last.weights)


def test_a_change_to_weighted_examples_ends_at_their_weighted_mean():
    pool, index = images(5), torch.tensor([3, 0, 4])
    weights = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    change = selection([pool], [torch.tensor([1, 3])], [index], [weights])
    shift = change.shifts[0]
    expected = {0: 1 / 3, 1: 0.0, 3: 2 / 3}  # the example of weight 0 is no part of it
    assert change.batches[0]["key"] == [pool["key"][place] for place in expected]
    assert (shift.base + shift.weights[0]).tolist() == pytest.approx(list(expected.values()))


def test_trust_is_of_the_weighted_selection():
    """Where all is kept, weights alone tell it from the nominal: -I is what they are to gain."""
    model, optimizer, pools, target = setting(0.1, torch.optim.SGD)
    selector = selector_for(model, optimizer, target, horizon=RESTLESS, derivative="exact")
    contests, policy = selector._controls._contests, selector._scoring.policy
    upcoming = contests._rollouts.scoring.upcoming(1, pools[:1], target[0])
    with selector._objective.scoring():
        found = contests.trust(1, upcoming)
        gamma = policy.look_ahead(1, upcoming, selector.state.generator).gamma(0)
        scores = policy.scores(gamma, upcoming.state, pools[0])
    gain = (relu_weights(scores) * scores).mean() - scores.mean()
    assert gain > 0
    assert found["proxy_first_order"] == pytest.approx(-float(gain), rel=0.02)  # of differences


def test_parts_without_weights_count_as_1_beside_others():
    first, second, weights = images(2), images(3), torch.tensor([0.5, 1.5])
    joined = as_one([weighted(first, weights), second])
    assert joined.weights.tolist() == [0.5, 1.5, 1, 1, 1]
    assert isinstance(as_one([first, second]), MicroBatches)
    assert as_one([first, second]).weights is None


def test_replays_repeat_the_weighted_training():
    """At its own rate, the open window ends where the loop is."""
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, keep=8, lr=AutoRate())
    train(model, optimizer, selector, selector.stream(pools), 4)
    rate = selector._controls._rate
    window = rate.state.window
    assert len(window.batches) > 1
    assert all(part.weights is not None for parts in window.batches for part in parts)
    with selector._objective.scoring():
        end = window.replay(rate._derivatives, 1.0)
    for name, param in model.named_parameters():
        torch.testing.assert_close(end.params[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_a_scorer_trains_with_the_weights_too():
    model, optimizer, pools, target = setting()
    small, _ = MLP.make(torch.float64, 5)
    twin = copy.deepcopy(small)
    scorer = Scorer(small, torch.optim.SGD(small.parameters(), 0.1))
    selector = selector_for(model, optimizer, target, keep=6, scorer=scorer)
    kept = selector.select(pools[0])
    own = torch.optim.SGD(twin.parameters(), 0.1)
    (selector.last.weights * image_loss(twin, kept)).mean().backward()
    own.step()
    assert (selector.last.weights != 1).any()
    torch.testing.assert_close(params_of(small), params_of(twin), rtol=1e-12, atol=1e-12)


def test_a_whole_run_is_the_loop_written_out():
    model, optimizer, pools, target = setting()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), lr=3e-3)
    selector = selector_for(model, optimizer, target, keep=6)
    plain = selector_for(twin, other, target, keep=6, weighting="none")
    train(model, optimizer, selector, selector.stream(pools))
    for batch in plain.stream(pools):
        scores = plain.last.scores[plain.last.indices].clamp(min=0)
        losses = image_loss(twin, batch)
        other.zero_grad()
        ((scores * losses).sum() / scores.sum()).backward()
        other.step()
    torch.testing.assert_close(params_of(model), params_of(twin), rtol=1e-9, atol=1e-12)


# --- resumption, control, and what is refused ---------------------------------------------------


def test_horizons_compete_though_all_is_kept():
    model, optimizer, pools, target = setting(num_pools=60)
    selector = selector_for(model, optimizer, target, horizon=RESTLESS)
    decisions = []
    for batch in selector.stream(pools):
        decisions += [made.what for made in selector.last.decisions]
        optimizer.zero_grad()
        (selector.last.weights * image_loss(model, batch)).mean().backward()
        optimizer.step()
    assert "horizon" in decisions


@pytest.mark.parametrize(
    "options",
    [
        {"horizon": 1, "interval": 2},
        {"horizon": 0, "lr": AutoRate(), "pools_per_update": 2},
        {"horizon": RESTLESS},
    ],
    ids=["fixed", "rate", "contests"],
)
def test_resumes_to_the_bit(options):
    def begin():
        model, optimizer, pools, target = setting(num_pools=40)
        return model, optimizer, selector_for(model, optimizer, target, keep=5, **options), pools

    def run(model, optimizer, selector, pools, start, end):
        num = selector.options.pools_per_update
        stream = selector.stream(pools[start:])
        for place in range(start, end):
            batch = next(stream)
            if place % num == 0:
                optimizer.zero_grad()
            ((selector.last.weights * image_loss(model, batch)).mean() / num).backward()
            if place % num == num - 1:
                optimizer.step()

    one = begin()
    run(*one, 0, 14)
    state = copy.deepcopy([one[0].state_dict(), one[1].state_dict()])
    saved, drawn = one[2].state_dict(), 14 + one[2].num_peeked
    other = begin()
    other[0].load_state_dict(state[0])
    other[1].load_state_dict(state[1])
    other[2].load_state_dict(saved)
    for each in (one, other):
        each[2].state.rest.clear()
        each[2].state.peeked.clear()
        run(*each, drawn, drawn + 8)
    assert params_of(one[0]).equal(params_of(other[0]))


def test_a_step_without_its_weights_is_an_error():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, keep=6)
    state, stream = selector.state_dict(), selector.stream(pools)
    image_loss(model, next(stream)).mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"selector\.last\.weights"):
        next(stream)
    selector.load_state_dict(state)  # a loop of another time
    selector.select(pools[0])


def test_without_weighting_there_are_no_weights():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, weighting="none")
    selector.select(pools[0])
    assert selector.last.weights is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "loss"}, "strategy must be one of influence, gradient"),
        ({"scope": "global"}, "scope must be local when weighting is relu"),
        ({"nominal": "policy"}, "nominal must be random when weighting is relu"),
        ({"weighting": "softmax"}, "weighting must be one of none, relu"),
    ],
)
def test_what_cannot_be_weighted_is_refused(options, says):
    model, optimizer, _, target = setting()
    with pytest.raises(ValueError, match=says):
        selector_for(model, optimizer, target, **options)


def test_sources_are_followed_by_what_has_weight():
    """Shares of sources count an example of weight 0 as one that was not kept."""
    model, optimizer, pools, target = setting(num_pools=1)
    pool = pools[0] | {"source": ["a", "b"] * 5}
    selector = selector_for(model, optimizer, target)
    selector.select(pool)
    shares = Shares(AutoShares(), ["a", "b"], [1.0, 1.0])
    helps = selector.last.scores > 0
    assert 0 < helps.sum() < 10
    expected = [[5.0, 5.0], [float(helps[::2].sum()), float(helps[1::2].sum())]]
    assert shares.counts_of(selector.last).tolist() == expected


def test_a_state_from_before_there_were_weights_is_one_without():
    model, optimizer, _, target = setting()
    plain = selector_for(model, optimizer, target, weighting="none")
    state = plain.state_dict()
    del state["options"]["weighting"]
    plain.load_state_dict(state)
    with pytest.raises(ValueError, match="weighting: 'none' saved, 'relu' here"):
        selector_for(model, optimizer, target).load_state_dict(state)
