"""The baselines: each formula against a loop over single examples, in float64."""

import copy
import math
import typing

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, Problem, image_loss, images
from reference import (
    adam_direction,
    adam_step_matrix,
    clone,
    example,
    greedy_order,
    inner,
    per_example_gradients,
    rerun,
)
from torch import nn

from selectflow import Selector
from selectflow.models.language import causal_lm_losses
from selectflow.run.config import SelectConfig
from selectflow.strategies import STRATEGIES, Boltzmann, TargetPath

MLP, CNN, TRANSFORMER = PROBLEMS
IDS = [problem.name for problem in PROBLEMS]
PER_EXAMPLE = ("gradient_norm", "adam", "greats", "opus_greedy")
every_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)


def setting(problem=MLP, steps=4, kind=torch.optim.AdamW, size=12, **options):
    """A model in eval mode after some training, its optimizer, a pool and a target."""
    model, make = problem.make()
    optimizer = kind(model.parameters(), **({"lr": 3e-3, "weight_decay": 0.1} | options))
    model.eval()
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss_fn(model, make(6)).mean().backward()
        optimizer.step()
    return model, optimizer, make(size), [make(9), make(7)]


def scores(problem, model, optimizer, pool, target, strategy, **options):
    selector = Selector(
        model, optimizer, problem.loss_fn, target, 4, strategy=strategy, derivative="exact",
        **options,
    )  # fmt: skip
    selector.select(pool)
    return selector.last.scores


def gradient_of_mean(problem, model, batch):
    each = per_example_gradients(model, problem.loss_fn, batch)
    return {name: sum(g[name] for g in each) / len(each) for name in each[0]}


def close(ours, theirs, tolerance=1e-9):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    return float((ours - theirs).norm() / theirs.norm()) < tolerance


def order_of(ranks):
    return ranks.argsort(descending=True).tolist()


# --- the formulas ---------------------------------------------------------------------------------


@every_problem
def test_gradient_is_the_product_with_the_target_gradient(problem):
    model, optimizer, pool, target = setting(problem)
    found = scores(problem, model, optimizer, pool, target, "gradient")
    toward = gradient_of_mean(problem, model, target[0])
    each = per_example_gradients(model, problem.loss_fn, pool)
    assert close(found, [inner(g, toward) for g in each])


def test_gradient_is_what_an_sgd_step_on_the_example_alone_takes_off_the_target_loss():
    model, _, pool, target = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    found = scores(MLP, model, optimizer, pool, target, "gradient")
    before = MLP.loss_fn(model, target[0]).mean().item()
    falls = [
        before - rerun(model, optimizer, MLP.loss_fn, [example(pool, i)], target[0])
        for i in range(len(found))
    ]
    assert close(found, [fall / 1e-6 for fall in falls], 1e-4)


@every_problem
def test_gradient_norm(problem):
    model, optimizer, pool, target = setting(problem)
    found = scores(problem, model, optimizer, pool, target, "gradient_norm")
    each = per_example_gradients(model, problem.loss_fn, pool)
    assert close(found, [math.sqrt(inner(g, g)) for g in each])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@every_problem
def test_adam_is_the_cosine_of_its_direction_with_the_target_gradient(problem, kind):
    model, optimizer, pool, target = setting(problem, kind=kind)
    found = scores(problem, model, optimizer, pool, target, "adam")
    toward = gradient_of_mean(problem, model, target[0])
    expected = []
    for gradient in per_example_gradients(model, problem.loss_fn, pool):
        moved = adam_direction(model, optimizer, gradient)
        size = math.sqrt(inner(moved, moved) * inner(toward, toward))
        expected.append(inner(moved, toward) / size)
    assert close(found, expected)


def test_the_direction_is_the_step_that_adam_really_takes():
    """Else the reference and the strategy could share one mistake."""
    model, optimizer, pool, _ = setting()
    gradient = per_example_gradients(model, MLP.loss_fn, pool)[3]
    twin, other = clone(model, optimizer)
    MLP.loss_fn(twin, example(pool, 3)).sum().backward()
    other.step()
    lr, decay = 3e-3, 1 - 3e-3 * 0.1
    for name, direction in adam_direction(model, optimizer, gradient).items():
        before, after = model.get_parameter(name), twin.get_parameter(name)
        assert torch.allclose((decay * before - after) / lr, direction, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lr", [3e-3, 0.3])
@every_problem
def test_greats_picks_greedily_less_what_is_alike(problem, lr):
    model, optimizer, pool, target = setting(problem)
    for group in optimizer.param_groups:
        group["lr"] = lr
    found = scores(problem, model, optimizer, pool, target, "greats")
    toward = gradient_of_mean(problem, model, target[0])
    each = per_example_gradients(model, problem.loss_fn, pool)
    order = greedy_order(
        [lr * inner(g, toward) for g in each], lambda i, j: lr**2 * inner(each[i], each[j])
    )
    assert order_of(found) == order
    assert sorted(found.tolist()) == list(range(1, len(each) + 1))


def test_greats_takes_the_rate_of_each_group_and_what_the_controller_makes_of_it():
    model, _, pool, target = setting()
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)
    found = scores(MLP, model, optimizer, pool, target, "greats")
    rates = dict.fromkeys(dict(model.named_parameters()), 0.1) | {"1.weight": 0.5}
    toward = gradient_of_mean(MLP, model, target[0])
    each = [
        {name: rates[name] * g[name] for name in g}
        for g in per_example_gradients(model, MLP.loss_fn, pool)
    ]
    order = greedy_order([inner(g, toward) for g in each], lambda i, j: inner(each[i], each[j]))
    assert order_of(found) == order
    same = scores(MLP, model, optimizer, pool, target, "gradient")
    assert order_of(found) != order_of(same)


@every_problem
def test_opus_measures_in_the_optimizers_own_steps(problem):
    model, optimizer, pool, target = setting(problem, lr=0.1)
    found = scores(problem, model, optimizer, pool, target, "opus_greedy")
    toward = gradient_of_mean(problem, model, target[0])
    each = per_example_gradients(model, problem.loss_fn, pool)
    moved = [adam_step_matrix(model, optimizer, g) for g in each]
    utilities = [inner(m, toward) for m in moved]
    order = greedy_order(utilities, lambda i, j: inner(moved[i], moved[j]))
    assert order_of(found) == order
    assert order != torch.tensor(utilities).argsort(descending=True).tolist()


def test_opus_before_anything_is_redundant_is_influence_at_horizon_0():
    model, optimizer, pool, target = setting()
    found = scores(MLP, model, optimizer, pool, target, "influence", horizon=0)
    greedy = scores(MLP, model, optimizer, pool, target, "opus_greedy")
    assert greedy.argmax() == found.argmax()


def test_opus_draws_the_first_pick_by_boltzmann():
    """Of 600 draws the shares are the probabilities, within four standard errors."""
    model, optimizer, pool, target = setting(size=5)
    toward = gradient_of_mean(MLP, model, target[0])
    each = per_example_gradients(model, MLP.loss_fn, pool)
    utilities = torch.tensor(
        [inner(adam_step_matrix(model, optimizer, g), toward) for g in each], dtype=torch.float64
    )
    chances = (utilities / utilities.std(correction=0) / 0.5).softmax(0)
    selector = Selector(
        model, optimizer, MLP.loss_fn, target[:1], 2, strategy=Boltzmann(temperature=0.5)
    )
    counts = torch.zeros(5)
    for _ in range(600):
        selector.select(pool)
        counts[selector.last.indices[0]] += 1
    errors = (chances * (1 - chances) / 600).sqrt()
    assert ((counts / 600 - chances).abs() < 4 * errors).all()
    assert counts.gt(0).sum() > 2


def test_el2n_is_the_distance_from_probabilities_to_labels():
    for problem in (MLP, CNN):
        model, optimizer, pool, target = setting(problem)
        found = scores(problem, model, optimizer, pool, target, "el2n")
        chances = model(pool["image"]).softmax(1)
        expected = (chances - F.one_hot(pool["label"], 10)).norm(dim=1)
        assert close(found, expected.detach())


def test_easiest_is_the_smallest_loss_first():
    model, optimizer, pool, target = setting()
    found = scores(MLP, model, optimizer, pool, target, "easiest")
    assert torch.equal(found, -MLP.loss_fn(model, pool).detach())


@every_problem
def test_target_path_is_the_loss_before_and_after_really_training_on_the_target(problem):
    model, optimizer, pool, target = setting(problem)
    found = scores(problem, model, optimizer, pool, target, TargetPath(steps=3))
    before = problem.loss_fn(model, pool).detach()
    path = [target[0], target[1], target[0]]
    twin, other = clone(model, optimizer)
    for state in other.state.values():
        state["exp_avg"].zero_()  # momentum is not of the target
    after = rerun(twin, other, problem.loss_fn, path, pool, reduce=lambda losses: losses)
    assert close(found, before - after, 1e-8)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["rho", "opus", "target_path", "greats"])
def test_a_resumed_selector_goes_on_bit_for_bit(strategy, tmp_path):
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pools, target = [make(12) for _ in range(6)], [make(20), make(20)]

    def selector_of(model, optimizer):
        return Selector(model, optimizer, MLP.loss_fn, target, 4, strategy=strategy)

    def train(selector, model, optimizer, pools):
        kept = []
        for pool in pools:
            batch = selector.select(pool)
            kept.append((selector.last.indices.tolist(), selector.last.scores.tolist()))
            optimizer.zero_grad()
            MLP.loss_fn(model, batch).mean().backward()
            optimizer.step()
        return kept

    selector = selector_of(model, optimizer)
    train(selector, model, optimizer, pools[:3])
    torch.save(selector.state_dict(), tmp_path / "state.pt")
    twin, other = clone(model, optimizer)
    resumed = selector_of(twin, other)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert train(resumed, twin, other, pools[3:]) == train(selector, model, optimizer, pools[3:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_selection_leaves_no_trace(strategy):
    model, optimizer, pool, target = setting(CNN)
    model.train()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    scores(CNN, model, optimizer, pool, target, strategy)
    assert model.training
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    now = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    assert all(torch.equal(value, before[0][name]) for name, value in now[0].items())
    assert torch.equal(now[2], before[2])
    for index, state in now[1]["state"].items():
        assert all(torch.equal(v, before[1]["state"][index][k]) for k, v in state.items())


@pytest.mark.parametrize("strategy", ["gradient", *PER_EXAMPLE])
def test_only_the_scored_parameters_count(strategy):
    """As of a model whose other parameters are frozen, but for its optimizer's state."""
    model, optimizer, pool, target = setting(TRANSFORMER)
    found = scores(TRANSFORMER, model, optimizer, pool, target, strategy, params=["blocks.1.*"])
    twin, other = clone(model, optimizer)
    for name, p in twin.named_parameters():
        p.requires_grad_(name.startswith("blocks.1."))
    alone = scores(TRANSFORMER, twin, other, pool, target, strategy)
    whole = scores(TRANSFORMER, model, optimizer, pool, target, strategy)
    assert close(found, alone)
    assert not close(found, whole)


@pytest.mark.parametrize("options", [{"chunk_size": 5}, {"chunk_size": "auto"}, "memory"])
@pytest.mark.parametrize("strategy", [*PER_EXAMPLE, "el2n"])
def test_chunks_leave_scores_unchanged(strategy, options):
    model, optimizer, pool, target = setting(MLP)
    if options == "memory":  # room for the gradients of three examples
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        options = {"memory_gib": 3.5 * 8 * size / 2**30}
    whole = scores(MLP, model, optimizer, pool, target, strategy)
    assert close(scores(MLP, model, optimizer, pool, target, strategy, **options), whole)


def test_no_more_gradients_are_held_than_memory_allows():
    model, optimizer, pool, target = setting(MLP)
    seen = []
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def norm(candidates):
        def note(gradients):
            seen.append(len(next(iter(gradients.values()))))
            return torch.zeros(seen[-1])

        return candidates.training.reduced(note)

    scores(MLP, model, optimizer, pool, target, norm, memory_gib=3.5 * 8 * size / 2**30)
    assert seen == [3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"memory_gib must be at least .* score fewer `params`"):
        scores(MLP, model, optimizer, pool, target, norm, memory_gib=size / 2**30)


def test_a_score_view_is_what_is_scored():
    model, optimizer, pool, target = setting(TRANSFORMER)
    view = lambda batch: {"tokens": batch["tokens"][:, :5]}  # noqa: E731
    for strategy in STRATEGIES.keys() - {"el2n", "influence", "uniform"}:
        found = scores(TRANSFORMER, model, optimizer, pool, target, strategy, score_view=view)
        twin, other = clone(model, optimizer)
        cut = [view(batch) for batch in target]
        assert torch.equal(found, scores(TRANSFORMER, twin, other, view(pool), cut, strategy))


def test_names_are_those_of_a_configuration():
    assert typing.get_args(SelectConfig.model_fields["strategy"].annotation) == tuple(STRATEGIES)


# --- what is refused ------------------------------------------------------------------------------


class Branching(nn.Module):
    """Looks at its activations before it goes on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        out = self.layer(x.flatten(1))
        return out if out.abs().max() < 1e3 else out.clamp(-1e3, 1e3)


def by_key(model, batch):
    weights = torch.tensor([float(key.rpartition("-")[2]) + 1 for key in batch["key"]])
    return weights * image_loss(model, batch)


@pytest.mark.parametrize(
    "problem",
    [
        Problem("branching", Branching, images, image_loss),
        Problem("by key", MLP.build, images, by_key),  # vmap would show each example the same key
    ],
    ids=lambda problem: problem.name,
)
def test_where_vmap_cannot_go_each_example_has_a_pass_and_it_is_said(problem, caplog):
    model, optimizer, pool, target = setting(problem)
    found = scores(problem, model, optimizer, pool, target, "gradient_norm", chunk_size=5)
    each = per_example_gradients(model, problem.loss_fn, pool)
    assert close(found, [math.sqrt(inner(g, g)) for g in each])
    assert [r.message[:50] for r in caplog.records] == [
        "gradients of single examples take a pass each, as "
    ]
    for strategy in PER_EXAMPLE:
        scores(problem, model, optimizer, pool, target, strategy)


def test_gradients_of_a_language_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    problem = Problem(
        "gpt2",
        lambda: transformers.GPT2LMHeadModel(config),
        lambda num: {"input_ids": torch.randint(50, (num, 12))},
        causal_lm_losses,
    )
    model, optimizer, pool, target = setting(problem)
    found = scores(problem, model, optimizer, pool, target, "greats")
    toward = gradient_of_mean(problem, model, target[0])
    each = per_example_gradients(model, problem.loss_fn, pool)
    order = greedy_order(
        [3e-3 * inner(g, toward) for g in each], lambda i, j: 9e-6 * inner(each[i], each[j])
    )
    assert order_of(found) == order


def test_losses_that_depend_on_the_rest_of_the_batch_are_refused():
    def relative(model, batch):
        losses = image_loss(model, batch)
        return losses / losses.detach().mean()

    problem = Problem("relative", MLP.build, images, relative)
    model, optimizer, pool, target = setting(problem)
    with pytest.raises(ValueError, match=r"an example alone the loss.*influence or gradient"):
        scores(problem, model, optimizer, pool, target, "gradient_norm")


def test_el2n_of_another_loss_is_refused():
    def square(model, batch):
        return (model(batch["image"]) - F.one_hot(batch["label"], 10)).square().sum(1)

    def twice(model, batch):
        return image_loss(model, batch) + image_loss(model, batch)

    for loss_fn, message in ((square, "'el2n' must have a class"), (twice, "call the model once")):
        problem = Problem("odd", MLP.build, images, loss_fn)
        with pytest.raises(ValueError, match=message):
            scores(problem, *setting(problem), "el2n")
    with pytest.raises(ValueError, match="'el2n' must have a classification loss"):
        scores(TRANSFORMER, *setting(TRANSFORMER), "el2n")


def test_options_of_others_out_of_their_range():
    with pytest.raises(ValueError, match="temperature must be >= 0 and finite, got -1"):
        Boltzmann(temperature=-1)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        TargetPath(steps=0)


def test_adam_needs_adam():
    model, optimizer, pool, target = setting(kind=torch.optim.SGD)
    with pytest.raises(ValueError, match="must be Adam or AdamW for the strategy 'adam', got SGD"):
        scores(MLP, model, optimizer, pool, target, "adam")


def test_gradients_that_are_not_finite_are_named():
    model, optimizer, pool, target = setting()
    pool["image"][2] = math.nan
    for strategy in PER_EXAMPLE:
        with pytest.raises(FloatingPointError, match="keys sample-2"):
            scores(MLP, model, optimizer, pool, target, strategy)
