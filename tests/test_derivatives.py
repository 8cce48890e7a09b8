"""Scores, gradients and Hessian-vector products against loops over examples and autograd."""

import itertools
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, image_loss, images
from reference import per_example_gradients, slopes
from torch import nn

from selectflow.core.derivatives import Derivatives
from selectflow.core.params import Params
from selectflow.core.passes import Objective
from selectflow.core.wrappers import uncompiled, unwrap

IDS = [problem.name for problem in PROBLEMS]


def setting(problem, dtype=torch.float64, num=24):
    model, make = problem.make(dtype)
    model.eval()
    params = Params(model.named_parameters()).detach()
    torch.manual_seed(1)
    direction = params.map(torch.randn_like) * 1e-3
    return model, params, direction, make(num)


def derive(problem, model, method, chunk_size=None):
    return Derivatives(Objective(model, problem.loss_fn), method, chunk_size)


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-12), ("central", 1e-7)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_scores_equal_a_loop_over_examples(problem, method, tolerance):
    model, params, direction, batch = setting(problem)
    losses, found = derive(problem, model, method).directional(params, direction, batch)
    assert relative(found, slopes(model, problem.loss_fn, batch, direction)) < tolerance
    assert relative(losses, problem.loss_fn(model, batch).detach()) < 1e-9


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_exact_and_central_scores_agree_in_float32(problem):
    model, params, direction, batch = setting(problem, torch.float32, num=64)
    exact = derive(problem, model, "exact").directional(params, direction, batch)[1]
    central = derive(problem, model, "central").directional(params, direction, batch)[1]
    assert torch.corrcoef(torch.stack([exact, central]))[0, 1] > 0.999


@pytest.mark.parametrize("method", ["exact", "central"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_chunks_and_order_leave_scores_unchanged(problem, method):
    model, params, direction, batch = setting(problem)
    whole = derive(problem, model, method).directional(params, direction, batch)[1]
    chunked = derive(problem, model, method, 7).directional(params, direction, batch)[1]
    order = torch.randperm(24)
    shuffled = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    permuted = derive(problem, model, method).directional(params, direction, shuffled)[1]
    assert relative(chunked, whole) < 1e-8
    assert relative(permuted, whole[order]) < 1e-8


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_gradient_and_curvature_products(problem, chunk_size):
    model, params, direction, batch = setting(problem, num=12)
    exact = derive(problem, model, "exact", chunk_size)
    central = derive(problem, model, "central", chunk_size)
    loss = problem.loss_fn(model, batch).mean()
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    value, grad = exact.gradient(params, batch)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    assert (grad - Params(zip(named, grads, strict=True)).detach()).norm() < 1e-12 * grad.norm()

    examples = per_example_gradients(model, problem.loss_fn, batch)
    along = slopes(model, problem.loss_fn, batch, direction)
    fisher = Params(
        (name, sum(s * g[name] for s, g in zip(along, examples, strict=True)) / 12)
        for name in params
    )
    found = exact.fisher_product(params, direction, batch)
    assert (found - fisher).norm() < 1e-11 * fisher.norm()

    # Double backward has no fused attention: compare with a difference of gradients there.
    step = 1e-5
    ahead = exact.gradient(params.add(direction, step / direction.norm()), batch)[1]
    behind = exact.gradient(params.add(direction, -step / direction.norm()), batch)[1]
    hessian = (ahead - behind) / (2 * step) * direction.norm()
    for derivatives in (exact, central):
        found = derivatives.hessian_product(params, direction, batch)
        assert (found - hessian).norm() < 1e-7 * hessian.norm()


def test_weighted_gradient():
    problem = PROBLEMS[0]
    model, params, _, batch = setting(problem, num=6)
    weights = torch.rand(6, dtype=torch.float64)
    losses, grad = derive(problem, model, "exact", 4).gradients(params, batch, weights)
    examples = per_example_gradients(model, problem.loss_fn, batch)
    expected = Params(
        (name, sum(w * g[name] for w, g in zip(weights, examples, strict=True))) for name in params
    )
    assert (grad - expected).norm() < 1e-12 * expected.norm()
    assert (losses - problem.loss_fn(model, batch).detach()).norm() < 1e-12


def test_frozen_and_adapter_parameters_are_outside_the_vector():
    class Adapted(nn.Module):
        """A frozen layer plus a low-rank update that starts at zero, as LoRA adds it."""

        def __init__(self):
            super().__init__()
            self.base = nn.Linear(64, 10).requires_grad_(False)
            self.down = nn.Linear(64, 2, bias=False)
            self.up = nn.Linear(2, 10, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            x = x.flatten(1)
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model = Adapted().double()
    batch = {k: v.double() if k == "image" else v for k, v in images(8).items()}
    params = Params((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    assert set(params) == {"down.weight", "up.weight"}
    direction = params.map(torch.randn_like)
    expected = slopes(model, image_loss, batch, direction)
    for method in ("exact", "central", "auto"):
        found = Derivatives(Objective(model, image_loss), method).directional(
            params, direction, batch
        )
        assert relative(found[1], expected) < 1e-6


def test_scoring_switches_dropout_and_batch_norm_off_and_restores_all():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    model[3].eval()
    objective = Objective(model, lambda m, b: m(b["image"]).square().mean(1))
    params = Params(model.named_parameters()).detach()
    batch = images(16)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    generator = torch.get_rng_state()

    def score():
        with objective.scoring():
            torch.rand(3)
            return objective.losses(params, batch)

    assert torch.equal(score(), score())
    with pytest.raises(KeyError), objective.scoring():
        raise KeyError
    assert [module.training for module in model] == [True, True, True, False]
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name])


def test_auto_takes_central_differences_where_they_agree(caplog):
    problem = PROBLEMS[2]
    model, params, direction, batch = setting(problem, torch.float32)
    derivatives = derive(problem, model, "auto")
    with caplog.at_level(logging.INFO, "selectflow"):
        derivatives.directional(params, direction, batch)
        derivatives.directional(params, direction, batch)
        derivatives.hessian_product(params, direction, batch)
        derivatives.forms.recheck()
        derivatives.directional(params, direction, batch)
    assert derivatives.forms.decided == {"losses": "central", "gradients": "central"}
    assert len([r for r in caplog.records if "derivatives of losses: central" in r.message]) == 1


class Scale(torch.autograd.Function):
    """A custom operator without forward mode, as fused kernels often are."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_auto_falls_back_to_central_where_forward_mode_fails(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss_fn(model, batch):
        return F.cross_entropy(Scale.apply(model(batch["image"])), batch["label"], reduction="none")

    params = Params(model.named_parameters()).detach()
    direction, batch = params.map(torch.randn_like), images(16)
    derivatives = Derivatives(Objective(model, loss_fn), "auto")
    with caplog.at_level(logging.INFO, "selectflow"):
        found = derivatives.directional(params, direction, batch)[1]
    assert derivatives.forms.decided == {"losses": "central"}
    assert "no forward-mode derivative" in caplog.text
    assert relative(found, slopes(model, loss_fn, batch, direction)) < 1e-2


def through_bfloat16(model, batch):
    """Losses that have lost the digits that a small difference needs."""
    logits = model(batch["image"]).bfloat16().float()
    return F.cross_entropy(logits, batch["label"], reduction="none")


def test_a_longer_step_is_taken_where_low_precision_drowns_the_usual_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    params, batch = Params(model.named_parameters()).detach(), images(64)
    direction = Params(Derivatives(Objective(model, image_loss)).gradient(params, batch)[1])
    expected = slopes(model, through_bfloat16, batch, direction)
    derivatives = Derivatives(Objective(model, through_bfloat16), "auto")
    found = derivatives.directional(params, direction, batch)[1]
    assert derivatives.forms.decided == {"losses": "central"}
    assert derivatives.forms.scales["losses"] > 1
    assert relative(found, expected) < 2 * derivatives.forms.errors["losses"] < 0.2
    usual = derivatives._directional_central(params, direction, batch, 1.0)[1]
    assert relative(usual, expected) > 0.2


def test_central_differences_that_no_step_makes_right_give_way_to_the_exact_form(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    params = Params(model.named_parameters()).detach()
    direction, batch = params.map(torch.randn_like), images(16)
    derivatives = Derivatives(Objective(model, through_bfloat16), "central")
    found = derivatives.directional(params, direction, batch)[1]
    assert "derivatives of losses: exact" in caplog.text
    assert relative(found, slopes(model, through_bfloat16, batch, direction)) < 1e-2


class Wave(nn.Module):
    """Losses with slopes `shared` + spread, of which one part is a wave as short as the step.

    A central difference sees sin(x) / x of the wave's slope, x being the step over its length.
    """

    def __init__(self, length, shared, *, waves_are_shared):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.length, self.shared, self.waves_are_shared = length, shared, waves_are_shared

    def forward(self, spread):
        wave = self.length * ((self.weight - 1) / self.length).sin()
        parts = (wave, self.weight) if self.waves_are_shared else (self.weight, wave)
        return self.shared * parts[0] + spread * parts[1]


STEP = 1e-6  # of float64, for a weight of 1


@pytest.mark.parametrize(
    ("unseen", "shared", "waves_are_shared", "expected"),
    [
        (0.02, 0.0, False, "usual"),
        (0.10, 0.0, False, "shorter"),
        (0.02, 1e3, False, "usual"),
        (0.10, 1e3, False, "shorter"),  # 1e-4 of the slopes, but a tenth of what they differ by
        (0.10, 1e3, True, "shorter"),  # no rank moves, but a Fisher product would be wrong
        (0.02, 1e3, True, "usual"),
    ],
)
def test_auto_judges_by_what_tells_the_examples_apart(unseen, shared, waves_are_shared, expected):
    x = (6 * unseen) ** 0.5  # sin(x) / x ~ 1 - x^2 / 6
    model = Wave(STEP / x, shared, waves_are_shared=waves_are_shared)
    derivatives = Derivatives(Objective(model, lambda m, spread: m(spread)), "auto")
    spread = torch.linspace(-1, 2, 24, dtype=torch.float64)
    params = Params(model.named_parameters()).detach()
    direction = params.map(torch.ones_like)
    _, found = derivatives.directional(params, direction, spread)
    assert derivatives.forms.decided == {"losses": "central"}
    exact = spread + shared
    error = found - exact
    if expected == "shorter":
        assert derivatives.forms.scales["losses"] < 1
        assert relative(found - found.mean(), exact - exact.mean()) < 0.02
    else:  # as constructed
        assert error.norm() / (shared * torch.ones(24) if waves_are_shared else spread).norm() == (
            pytest.approx(unseen, rel=0.05)
        )


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_longer_step_is_taken_where_a_dead_entry_drowns_the_others(chunk_size):
    """A dead unit of ReLU has second moments of 0, and so a sensitivity of lr / eps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad():
        model[1].weight[0], model[1].bias[0] = 0, -1
    params = Params(model.named_parameters()).detach()
    direction, batch = params.map(torch.randn_like), images(16)
    objective = Objective(model, image_loss)
    derivatives = Derivatives(objective, "auto", chunk_size)
    derivatives.directional(params, direction, batch)
    assert derivatives.forms.decided == {"losses": "central"}
    direction["1.bias"][0] = 1e8
    derivatives.forms.recheck()
    expected = slopes(model, image_loss, batch, direction)
    for method in ("auto", "central"):
        derivatives = Derivatives(objective, method, chunk_size)
        found = derivatives.directional(params, direction, batch)[1]
        assert relative(found, expected) < 0.05
    usual = derivatives._directional_central(params, direction, batch, 1.0)[1]
    assert relative(usual, expected) > 0.5  # it sees next to nothing


@pytest.mark.parametrize("method", ["auto", "central"])
def test_no_usable_form_is_an_error(method):
    """Losses that differ from pass to pass, and an operator without forward mode."""
    model, passes = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), itertools.count()

    def loss_fn(model, batch):
        logits = Scale.apply(model(batch["image"])) + torch.arange(10) * math.sin(next(passes))
        return F.cross_entropy(logits, batch["label"], reduction="none")

    params = Params(model.named_parameters()).detach()
    derivatives = Derivatives(Objective(model, loss_fn), method)
    with pytest.raises(FloatingPointError, match=r"must agree to 10%.*no state that forward"):
        derivatives.directional(params, params.map(torch.randn_like), images(16))


@pytest.mark.parametrize("method", ["exact", "central"])
def test_a_direction_of_zeros_scores_zero(method):
    problem = PROBLEMS[0]
    model, params, direction, batch = setting(problem)
    zeros = direction.zeros_like()
    derivatives = derive(problem, model, method)
    assert derivatives.directional(params, zeros, batch)[1].abs().max() == 0
    assert derivatives.hessian_product(params, zeros, batch).norm() == 0


def test_half_precision_parameters_are_refused():
    problem = PROBLEMS[0]
    model, params, direction, batch = setting(problem, torch.bfloat16)
    with pytest.raises(ValueError, match=r"values of float32 or float64, got torch.bfloat16"):
        derive(problem, model, "central").directional(params, direction, batch)


def test_one_parameter_in_half_precision_is_refused_by_name():
    problem = PROBLEMS[0]
    model, params, direction, batch = setting(problem)
    *_, last = params
    params = Params({**params, last: params[last].bfloat16()})
    with pytest.raises(ValueError, match=f"float64, got torch.bfloat16 for {last}; give"):
        derive(problem, model, "central").directional(params, direction, batch)


@pytest.mark.parametrize("reduction", ["mean", "none-but-per-token"])
def test_losses_of_a_wrong_shape_are_refused(reduction):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss_fn(model, batch):
        if reduction == "mean":
            return F.cross_entropy(model(batch["image"]), batch["label"])
        return model(batch["image"])

    params = Params(model.named_parameters()).detach()
    with pytest.raises(ValueError, match=r"one loss per example, shape \(5,\), got \("):
        Objective(model, loss_fn).losses(params, images(5))


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(model)) is model
    compiled = torch.compile(model)
    assert unwrap(compiled) is compiled  # scoring passes run compiled
    assert uncompiled(unwrap(nn.DataParallel(compiled))) is model


@pytest.mark.parametrize("method", ["exact", "central"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_several_directions_at_once_equal_one_at_a_time(problem, method):
    model, params, _, batch = setting(problem, num=7)
    directions = params.map(lambda x: torch.randn(3, *x.shape, dtype=x.dtype))
    derivatives = derive(problem, model, method, 4)
    losses, slopes_at_once = derivatives.directional(params, directions, batch)
    assert losses.shape == (7,)
    products = [
        getattr(derivatives, f"{name}_product")(params, directions, batch)
        for name in ("hessian", "fisher")
    ]
    for query in range(3):
        one = directions.map(lambda x, query=query: x[query])
        assert (
            relative(slopes_at_once[query], derivatives.directional(params, one, batch)[1]) < 1e-11
        )
        for found, name in zip(products, ("hessian", "fisher"), strict=True):
            expected = getattr(derivatives, f"{name}_product")(params, one, batch)
            gap = found.map(lambda x, query=query: x[query]) - expected
            assert gap.norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory in functorch"), RuntimeError("a bug")]
)
def test_an_error_that_is_not_of_forward_mode_is_raised(monkeypatch, method, error):
    """Memory that does not suffice once must not change the form for the rest of the run."""
    problem = PROBLEMS[0]
    model, make = problem.make()
    derivatives = Derivatives(Objective(model, problem.loss_fn), method)
    params = Params(model.named_parameters()).detach()

    def fails(*args):
        raise error

    monkeypatch.setattr(Derivatives, "_directional_exact", fails)
    with pytest.raises(type(error), match=str(error)):
        derivatives.directional(params, params, make(4))
    assert derivatives.forms.decided == {}
