"""Sensitivities of a window against really rerunning it with one example's weight changed."""

import pytest
import torch
from problems import PROBLEMS
from reference import inner, per_example_gradients, rerun, weight_derivative

from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate, look_ahead
from selectflow.core.optim import NEGLIGIBLE_SHARE, Adjoint
from selectflow.core.passes import Objective
from selectflow.core.sweep import Window, sweep, sweep_capacity
from selectflow.core.torch_optim import OptimizerReader

IDS = [problem.name for problem in PROBLEMS]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}


def setting(problem, optimizer="adamw", warm=8, num=8, size=6, scheduler=None, max_grad_norm=None):
    """A model in the middle of training, and a window of `num` batches after that point."""
    model, make = problem.make()
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    model.train()
    for _ in range(warm):
        optimizer.zero_grad()
        problem.loss_fn(model, make(size)).mean().backward()
        optimizer.step()
    model.eval()
    optimizer.zero_grad()
    batches, target = [make(size) for _ in range(num)], make(10)
    reader = OptimizerReader(model, optimizer, scheduler and scheduler(optimizer), max_grad_norm)
    derivatives = Derivatives(Objective(model, problem.loss_fn), "exact")
    return model, optimizer, batches, target, reader, derivatives


def window(reader, derivatives, batches, curvature="exact"):
    return Window(derivatives, reader.updates(len(batches)), lambda i, _: batches[i], curvature)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("horizon", [1, 3, 8])
@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_sensitivities_equal_central_differences_of_reruns(problem, horizon, optimizer):
    model, optimizer, batches, target, reader, derivatives = setting(
        problem, optimizer, num=horizon
    )
    found = look_ahead(
        window(reader, derivatives, batches), reader.state(), target, num_sensitivities=horizon
    )
    args = model, optimizer, problem.loss_fn, batches, target
    assert found.target_loss == pytest.approx(rerun(*args), rel=1e-10)
    assert len(found.sensitivities) == horizon
    # Gradients of the first batch are at the live parameters, so update 0 is checked example by
    # example. Later gammas are what a shorter window from the rerun state gives, checked below.
    gradients = per_example_gradients(model, problem.loss_fn, batches[0])
    predicted = [inner(found.sensitivities[0], gradient) for gradient in gradients]
    truth = [weight_derivative(*args, 0, index) for index in range(len(gradients))]
    scale = max(map(abs, truth))
    assert scale > 1e-6
    for ours, theirs in zip(predicted, truth, strict=True):
        assert abs(ours - theirs) < 1e-5 * scale


def test_later_sensitivities_are_those_of_the_shorter_window():
    problem = PROBLEMS[0]
    model, optimizer, batches, target, reader, derivatives = setting(problem, num=5)
    long = look_ahead(
        window(reader, derivatives, batches), reader.state(), target, num_sensitivities=5
    )
    for done in range(1, 5):
        optimizer.zero_grad()
        problem.loss_fn(model, batches[done - 1]).mean().backward()
        optimizer.step()
        short = look_ahead(window(reader, derivatives, batches[done:]), reader.state(), target)
        gap = long.sensitivities[done] - short.sensitivities[0]
        assert gap.norm() < 1e-10 * short.sensitivities[0].norm()


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_horizon_zero_is_the_preconditioned_target_gradient(problem):
    """Moving along an example's preconditioned gradient changes the target loss as predicted."""
    model, _, batches, target, reader, derivatives = setting(problem)
    state, update = reader.state(), reader.updates(1)[0]
    gamma = immediate(derivatives, update, state, target).sensitivities[0]
    rule, delta = update.rules[0], 1e-4
    seen = 1 - rule.beta2 ** (rule.step - 1)
    squares = torch.cat([v.flatten() for v in state.exp_avg_sq.values()]) / seen
    negligible = NEGLIGIBLE_SHARE * squares.mean().sqrt()
    for gradient in per_example_gradients(model, problem.loss_fn, batches[0]):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                moved = {
                    name: param
                    - sign
                    * delta
                    * rule.lr
                    * (1 - rule.beta1)
                    / rule.c1
                    * gradient[name]
                    / ((state.exp_avg_sq[name] / seen).sqrt() + rule.eps)
                    * ((state.exp_avg_sq[name] / seen).sqrt() > negligible)
                    for name, param in state.params.items()
                }
                ends.append(float(derivatives.objective.losses(moved, target).mean()))
        truth = (ends[0] - ends[1]) / (2 * delta)
        assert inner(gamma, gradient) == pytest.approx(truth, rel=1e-5, abs=1e-9)


def test_the_schedule_and_clipping_are_part_of_the_dynamics():
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    problem, horizon = PROBLEMS[0], 4
    model, optimizer, batches, target, reader, derivatives = setting(
        problem, num=horizon, scheduler=scheduler, max_grad_norm=0.5
    )
    view = window(reader, derivatives, batches)
    found = look_ahead(view, reader.state(), target)
    state = reader.state()
    for index, update in enumerate(view.updates):
        grad, after = view.advance(index, state)
        assert update.clip_scale(grad) < 1
        state = after
    lrs = [3e-3 * 0.5**step for step in range(horizon)]
    how = {"lrs": lrs, "max_grad_norm": 0.5}
    args = model, optimizer, problem.loss_fn, batches, target
    assert found.target_loss == pytest.approx(rerun(*args, **how), rel=1e-10)
    gradients = per_example_gradients(model, problem.loss_fn, batches[0])
    truth = [weight_derivative(*args, 0, index, **how) for index in range(len(gradients))]
    for gradient, theirs in zip(gradients, truth, strict=True):
        assert abs(inner(found.sensitivities[0], gradient) - theirs) < 1e-5 * max(map(abs, truth))


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 12, 13])
def test_bounded_memory_gives_the_same_sensitivities(capacity):
    """Snapshots and recomputation change nothing, and never keep more states than allowed."""
    problem = PROBLEMS[0]
    _, _, batches, target, reader, derivatives = setting(problem, num=13)
    full = look_ahead(
        window(reader, derivatives, batches), reader.state(), target, num_sensitivities=13
    )

    def read_end(end):
        _, grad = derivatives.gradient(end.params, target)
        return Adjoint(grad, grad.zeros_like(), grad.zeros_like())

    found = {}

    def keep(visit):
        found[visit.index] = visit.gamma

    sweep(window(reader, derivatives, batches), reader.state(), read_end, keep, capacity)
    assert list(found) == list(reversed(range(13)))
    for index, gamma in found.items():
        assert (gamma - full.sensitivities[index]).norm() == 0


def test_capacity_counts_states_and_refuses_too_little():
    problem = PROBLEMS[0]
    _, _, batches, target, reader, derivatives = setting(problem, num=8)
    state = reader.state()
    bytes_each = 4 * state.params.num_bytes()  # theta, m, v and the gradient
    assert sweep_capacity(state, 8, 10.5 * bytes_each / 2**30) == 10
    assert sweep_capacity(state, 8, None) == 2**30 // bytes_each
    with pytest.raises(ValueError, match=r"memory_gib must be at least .* for a horizon of 8"):
        look_ahead(
            window(reader, derivatives, batches), state, target, memory_gib=bytes_each / 2**30
        )


def test_without_a_limit_no_model_is_too_large(monkeypatch):
    """States of more than 1 GiB each, as a GPT-2 of 124M has, must not stop the default call."""
    problem = PROBLEMS[0]
    _, _, batches, target, reader, derivatives = setting(problem, num=8)
    view, state = window(reader, derivatives, batches), reader.state()
    wanted = look_ahead(view, state, target, num_sensitivities=8)
    monkeypatch.setattr("selectflow.core.chunks.USUAL_GIB", 1e-9)
    assert sweep_capacity(state, 1, None) == 1
    assert sweep_capacity(state, 8, None) == 5  # 2 + log2(8)
    found = look_ahead(view, state, target, num_sensitivities=8)
    for gamma, same in zip(found.sensitivities, wanted.sensitivities, strict=True):
        assert (gamma - same).norm() == 0


def test_curvature_none_and_fisher_replace_the_hessian():
    """At H = 2 the first gamma is linear in the curvature term, which is known for each choice."""
    problem = PROBLEMS[0]
    _, _, batches, target, reader, derivatives = setting(problem, num=2)
    state = reader.state()
    gammas = {
        curvature: look_ahead(
            window(reader, derivatives, batches, curvature), state, target, num_sensitivities=2
        ).sensitivities
        for curvature in ("exact", "fisher", "none")
    }
    view = window(reader, derivatives, batches)
    grad, after = view.advance(0, state)
    for curvature in ("exact", "fisher"):
        product = {
            "exact": derivatives.hessian_product,
            "fisher": derivatives.fisher_product,
        }[curvature](after.params, gammas[curvature][1], batches[1])
        zeros = product.zeros_like()
        bent, _ = view.updates[0].adjoint(Adjoint(product, zeros, zeros), state, after, grad)
        gap = gammas[curvature][0] - gammas["none"][0] - bent
        assert gap.norm() < 1e-9 * bent.norm()
    assert (gammas["exact"][0] - gammas["fisher"][0]).norm() > 1e-3 * gammas["exact"][0].norm()


@pytest.mark.parametrize("horizon", [1, 3])
def test_an_input_that_was_never_on_does_not_drown_the_others(horizon):
    """Its exact sensitivity is 1 / eps; a pool in which it is on is scored by the rest."""
    problem = PROBLEMS[0]
    model, make = problem.make(torch.float32)

    def dead(num):
        batch = make(num)
        batch["image"][:, 0, 0, 0] = 0
        return batch

    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        problem.loss_fn(model, dead(6)).mean().backward()
        optimizer.step()
    reader = OptimizerReader(model, optimizer)
    derivatives = Derivatives(Objective(model, problem.loss_fn), "exact")
    batches = [dead(6) for _ in range(horizon)]
    found = look_ahead(window(reader, derivatives, batches), reader.state(), make(10))
    gamma = found.sensitivities[0]
    assert gamma["1.weight"][:, 0].abs().max() == 0
    assert gamma["1.weight"][:, 1].abs().max() > 0
    params, pool = reader.state().params, make(32)
    central = Derivatives(Objective(model, problem.loss_fn), "central")
    exact, close = (d.directional(params, gamma, pool)[1] for d in (derivatives, central))
    assert (exact - close).norm() < 0.01 * exact.norm()


def test_a_diverging_rollout_is_named():
    problem = PROBLEMS[0]
    model, _, batches, target, reader, derivatives = setting(problem)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"losses must be finite.*keys sample-0"):
        look_ahead(window(reader, derivatives, batches), reader.state(), target)


@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_scaling_the_loss_and_eps_scales_scores_and_changes_no_choice(horizon):
    """AdamW is the same for a loss in other units, and so is what counts as a dead entry."""

    def scores(scale):
        problem = PROBLEMS[0]
        model, make = problem.make()

        def loss_fn(model, batch):
            return scale * problem.loss_fn(model, batch)

        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-8 * scale)
        for _ in range(5):
            batch = make(6)
            batch["image"][:, 0, 0, 0] = 0  # a dead input
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
        reader, derivatives = (
            OptimizerReader(model, optimizer),
            Derivatives(Objective(model, loss_fn), "exact"),
        )
        if horizon == 0:
            found = immediate(derivatives, reader.updates(1)[0], reader.state(), make(10))
        else:
            batches = [make(6) for _ in range(horizon)]
            for batch in batches:
                batch["image"][:, 0, 0, 0] = 0
            found = look_ahead(window(reader, derivatives, batches), reader.state(), make(10))
        gamma = found.sensitivities[0]
        assert gamma["1.weight"][:, 0].abs().max() == 0
        return derivatives.directional(reader.state().params, gamma, make(32))[1] / scale

    expected = scores(1.0)
    for scale in (1e-9, 1e6):
        torch.testing.assert_close(scores(scale), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("horizon", [0, 1])
def test_where_eps_rules_every_entry_a_small_gradient_is_not_dead(horizon):
    """A loss of 1e-9 and eps as it is: AdamW is momentum over eps, also at an input never on."""
    problem = PROBLEMS[0]
    model, make = problem.make()

    def loss_fn(model, batch):
        return 1e-9 * problem.loss_fn(model, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(model, make(6)).mean().backward()
        optimizer.step()
    reader, derivatives = OptimizerReader(model, optimizer), Derivatives(Objective(model, loss_fn))
    update, state, target = reader.updates(1)[0], reader.state(), make(10)
    if horizon == 0:
        found = immediate(derivatives, update, state, target)
    else:
        found = look_ahead(window(reader, derivatives, [make(6)]), state, target)
        state = update.advance(state, derivatives.gradient(state.params, make(6))[1])
    _, grad = derivatives.gradient(state.params, target)
    gamma = found.sensitivities[0]
    for name, tensor in gamma.items():  # proportional to the target's gradient, entry by entry
        cosine = -(tensor * grad[name]).sum() / tensor.norm() / grad[name].norm()
        assert cosine > 0.999


@pytest.mark.parametrize("horizon", [0, 1])
def test_an_infinite_entry_that_is_masked_is_0(horizon):
    """inf * 0 is NaN: a mask must choose, not multiply."""
    problem = PROBLEMS[0]
    _, _, _, _, reader, _ = setting(problem)
    update, state = reader.updates(1)[0], reader.state()
    dead = state.exp_avg_sq["1.weight"][0, 0].zero_()
    grad = state.params.map(torch.ones_like)
    grad["1.weight"][0, 0] = float("inf")
    found = update.immediate(state, grad) if horizon == 0 else update.masked(grad, state)
    assert dead == 0
    assert found["1.weight"][0, 0] == 0
    assert found["1.weight"].isfinite().all()
