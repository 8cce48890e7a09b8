"""Scores over some of the parameters: which ones, and that the influence through them is exact."""

import pytest
import torch
from problems import PROBLEMS
from reference import clone, inner, per_example_gradients

from selectflow import Selector
from selectflow.core.params import scored_names

MLP, CNN, TRANSFORMER = PROBLEMS


def transformer():
    model, _ = TRANSFORMER.make()
    model.position.requires_grad_(False)
    return model, [name for name, p in model.named_parameters() if p.requires_grad]


# --- which ones -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["blocks.*"], lambda name: name.startswith("blocks.")),
        (["blocks.1.*", "norm.*"], lambda name: name.startswith(("blocks.1.", "norm."))),
        (["!embed.weight"], lambda name: name != "embed.weight"),
        (["!head.*"], lambda name: name != "embed.weight"),  # the tied weight by its other name
        (["head.weight"], lambda name: name == "embed.weight"),
        (["*.weight", "!blocks.*"], lambda name: name in ("embed.weight", "norm.weight")),
        (["embed.weight", "head.weight"], lambda name: name == "embed.weight"),
    ],
)
def test_patterns_choose_by_name(patterns, chosen):
    model, trained = transformer()
    found = scored_names(patterns, trained, model)
    assert found == tuple(filter(chosen, trained))
    assert 0 < len(found) < len(trained)


def test_no_patterns_are_no_restriction():
    model, trained = transformer()
    assert scored_names(None, trained, model) is None
    assert scored_names([], trained, model) == tuple(trained)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["block.0.norm1.weight"],
            r"got 'block.0.norm1.weight'.*none; the nearest is 'blocks.0.no",
        ),
        (["!hed.weight"], r"got '!hed.weight'.*the nearest is 'head.weight'"),
        (["blocks"], r"got 'blocks', which matches none"),
        (["position"], r"got 'position', which only frozen ones match, as position"),
        (["!*"], r"must leave a parameter to score, got \['!\*'\]"),
        ("blocks.*", r"params must be a list, got 'blocks.\*'"),
    ],
)
def test_patterns_that_choose_nothing(patterns, message):
    model, _ = transformer()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=message):
        Selector(model, optimizer, TRANSFORMER.loss_fn, [], keep=1, params=patterns)


# --- what the scores are --------------------------------------------------------------------


def setting(problem, patterns, **options):
    """A selector over some parameters, and one over all, at the same point of a training."""
    model, make = problem.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    model.eval()
    for _ in range(4):
        optimizer.zero_grad()
        problem.loss_fn(model, make(6)).mean().backward()
        optimizer.step()
    pools, target = [make(6) for _ in range(4)], make(8)
    options = {"keep": 1.0, "derivative": "exact"} | options
    selectors = [
        Selector(model, optimizer, problem.loss_fn, [target], params=params, **options)
        for params in (patterns, None)
    ]
    return model, optimizer, pools, target, selectors


@pytest.mark.parametrize("derivative", ["exact", "central"])
@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize(
    ("problem", "patterns"),
    [(MLP, ["3.*"]), (CNN, ["!0.*", "!*.bias"]), (TRANSFORMER, ["!head.weight"])],
    ids=["mlp", "cnn", "transformer"],
)
def test_a_score_is_the_part_of_the_whole_over_these_parameters(
    problem, patterns, horizon, derivative
):
    model, _, pools, _, (some, everything) = setting(
        problem, patterns, horizon=horizon, derivative=derivative
    )
    some.select(pools[0], pools[1:])
    everything.select(pools[0], pools[1:])
    gamma = everything.state.ahead.sensitivities[0]
    names = scored_names(patterns, gamma, model)
    gradients = per_example_gradients(model, problem.loss_fn, pools[0])
    expected = torch.tensor([-inner(g, gamma.pick(names)) for g in gradients])
    assert torch.allclose(
        some.last.scores, expected.double(), rtol=1e-5, atol=1e-6 * expected.abs().max()
    )
    assert not torch.allclose(some.last.scores, everything.last.scores, rtol=1e-2)
    assert some.state.ahead.sensitivities[0].keys() == set(names)


@pytest.mark.parametrize("horizon", [1, 3])
def test_it_is_the_influence_through_these_parameters(horizon):
    """Rerun with an example whose gradient reaches the named parameters only."""
    problem, patterns = TRANSFORMER, ["blocks.0.*"]
    model, optimizer, pools, target, (selector, _) = setting(problem, patterns, horizon=horizon)
    selector.select(pools[0], pools[1:])
    names = selector.state.ahead.sensitivities[0].keys()
    gradients = per_example_gradients(model, problem.loss_fn, pools[0])

    def end(extra, share):
        twin, stepper = clone(model, optimizer)
        for step, pool in enumerate(pools[:horizon]):
            stepper.zero_grad()
            problem.loss_fn(twin, pool).mean().backward()
            if step == 0:
                for name, param in twin.named_parameters():
                    if name in names:
                        param.grad += share * extra[name]
            stepper.step()
        return problem.loss_fn(twin, target).mean().item()

    truth = [(end(g, -1e-4) - end(g, 1e-4)) / 2e-4 for g in gradients]
    scale = max(map(abs, truth))
    for score, real in zip(selector.last.scores.tolist(), truth, strict=True):
        assert abs(score - real) < 1e-5 * scale


def test_at_horizon_zero_only_their_gradient_is_computed():
    problem = TRANSFORMER
    model, _, pools, _, (selector, _) = setting(problem, ["blocks.1.*"], horizon=0)
    asked = []
    find = torch.autograd.grad

    def watched(outputs, inputs, *args, **kwargs):
        asked.append(len(inputs))
        return find(outputs, inputs, *args, **kwargs)

    torch.autograd.grad = watched
    try:
        selector.select(pools[0])
    finally:
        torch.autograd.grad = find
    num = sum(name.startswith("blocks.1.") for name, _ in model.named_parameters())
    assert asked == [num]


def test_the_state_of_another_subset_is_refused():
    _, _, pools, _, (selector, everything) = setting(MLP, ["3.*"])
    selector.select(pools[0])
    state = selector.state_dict()
    selector.load_state_dict(state)
    with pytest.raises(ValueError, match=r"params: \['3.\*'\] saved, None here"):
        everything.load_state_dict(state)


def test_groups_of_the_optimizer_that_have_no_scored_parameter():
    torch.manual_seed(0)
    model, make = MLP.make()
    groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    pool, target = make(6), make(6)
    scores = []
    for params in (None, ["*"], ["3.weight"]):
        for horizon in (0, 2):
            selector = Selector(
                model, optimizer, MLP.loss_fn, [target], keep=2, horizon=horizon, params=params
            )
            selector.select(pool, [pool])
            scores.append(selector.last.scores)
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores[1], scores[3])
    assert not torch.allclose(scores[0], scores[4])
