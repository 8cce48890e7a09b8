"""A dense recording holds the gradients of its updates; where it does not, a pass makes them."""

import dataclasses

import pytest
import torch
from problems import PROBLEMS, image_loss
from torch import nn

from selectflow.core.derivatives import Derivatives
from selectflow.core.optim import Adjoint
from selectflow.core.params import Params
from selectflow.core.recovered import gradient_between
from selectflow.offline.record import record, reopen
from selectflow.offline.recorded import RecordedWindow
from selectflow.offline.score import score_samples

MLP, CNN, TRANSFORMER = PROBLEMS
NUM, SIZE = 6, 6
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 3e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, 0.9, dampening=0.5, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
}


def setting(optimizer="adamw", dtype=torch.float64, problem=MLP, num=NUM, **options):
    model, make = problem.make(dtype)
    model.eval()
    batches = [
        make(SIZE) | {"key": [f"{step}-{position}" for position in range(SIZE)]}
        for step in range(num)
    ]
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return record(model, optimizer, problem.loss_fn, batches, **options), make(5)


def between(trajectory, index, resolution=None):
    updates = trajectory.updates
    state, after = trajectory.state(index), trajectory.state(index + 1)
    if resolution is None:
        resolution = torch.finfo(trajectory.coarsest(state.params)).eps
    return gradient_between(updates[index], updates[index + 1], state, after, resolution)


def gap(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_states_hold_the_gradient_between_them(optimizer, dtype, most):
    trajectory, _ = setting(optimizer, dtype)
    for index in range(NUM - 1):
        state = trajectory.state(index)
        expected = trajectory.derivatives.step_gradient(state.params, trajectory.batches[index])
        assert gap(between(trajectory, index), expected) < most


def test_what_rounding_hides_is_not_given():
    trajectory, _ = setting(dtype=torch.float32)
    assert between(trajectory, 2) is not None
    assert between(trajectory, 2, resolution=torch.finfo(torch.bfloat16).eps) is None
    slow, _ = setting("sgd", torch.float32)
    slow.updates[2] = dataclasses.replace(
        slow.updates[2], rules=tuple(dataclasses.replace(r, lr=0.0) for r in slow.updates[2].rules)
    )
    assert between(slow, 2) is None


def test_a_clipped_gradient_is_not_given_and_one_below_the_limit_is():
    for limit, is_given in ((1e-2, False), (1e3, True)):
        trajectory, _ = setting(max_grad_norm=limit)
        assert (between(trajectory, 2) is not None) == is_given


class Branches(nn.Module):
    """A layer for each half of a run; the other has no gradient."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 10) for _ in range(2))

    def forward(self, image, which):
        return self.layers[which](image.flatten(1))


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_skipped_parameters_have_none(optimizer):
    torch.manual_seed(0)
    model = Branches().double()
    batches = [PROBLEMS[0].batch(SIZE) | {"which": step % 2} for step in range(NUM)]
    for batch in batches:
        batch["image"] = batch["image"].double()

    def loss_fn(model, batch):
        logits = model(batch["image"], batch["which"])
        return nn.functional.cross_entropy(logits, batch["label"], reduction="none")

    trajectory = record(model, OPTIMIZERS[optimizer](model.parameters()), loss_fn, batches)
    for index in range(1, NUM - 1):
        found = between(trajectory, index)
        if optimizer == "momentum":  # a zero gradient might have left the same states
            assert found is None
            continue
        expected = trajectory.derivatives.step_gradient(
            trajectory.state(index).params, batches[index]
        )
        assert found.keys() == expected.keys() < trajectory.state(0).params.keys()
        assert gap(found, expected) < 1e-12


@pytest.mark.parametrize("derivative", ["exact", "central"])
@pytest.mark.parametrize("curvature", ["exact", "fisher", "none"])
def test_a_dense_recording_needs_one_gradient_pass(monkeypatch, curvature, derivative):
    """That of the last update; the scores are those of a recording that is replayed."""
    dense, target = setting()
    sparse, _ = setting(spacing=100)
    passes = []
    made = Derivatives.step_gradient
    monkeypatch.setattr(Derivatives, "step_gradient", lambda *args: passes.append(1) or made(*args))
    options = {"curvature": curvature, "derivative": derivative}
    found = score_samples(dense, [target], **options)
    assert len(passes) == 1
    expected = score_samples(sparse, [target], **options)
    assert len(passes) > NUM
    assert gap(Params(a=found.score), Params(a=expected.score)) < 1e-7


@pytest.mark.parametrize("curvature", ["exact", "none"])
@pytest.mark.parametrize("derivative", ["exact", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_that_are_not_the_recorded_ones_are_noticed(tmp_path, dtype, derivative, curvature):
    trajectory, target = setting(dtype=dtype, folder=tmp_path / "run")
    batches, model = list(trajectory.batches), trajectory.derivatives.objective.model
    image = batches[2]["image"].clone()
    image[3] = -image[3]
    batches[2] = batches[2] | {"image": image}
    other = reopen(tmp_path / "run", model, image_loss, batches)
    with pytest.raises(RuntimeError, match="replay must arrive at the recorded state"):
        score_samples(other, [target], curvature=curvature, derivative=derivative)


@pytest.mark.parametrize("curvature", ["exact", "fisher"])
@pytest.mark.parametrize("derivative", ["exact", "central"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_slopes_that_products_bring_along_are_those_of_a_pass_of_their_own(
    problem, derivative, curvature
):
    trajectory, target = setting(problem=problem)
    derivatives = Derivatives(trajectory.derivatives.objective, derivative)
    trajectory = dataclasses.replace(trajectory, derivatives=derivatives)
    exact = Derivatives(derivatives.objective, "exact")
    visited = []

    def compare(visit):
        shares = visit.index > 0 and derivative == "central"
        if not shares:
            assert visit.slopes is None
            return
        gamma = trajectory.updates[visit.index].masked(visit.gamma, visit.after)
        batch = trajectory.batches[visit.index]
        losses, slopes = exact.directional(visit.state.params, gamma, batch)
        assert (visit.slopes[0] - losses).norm() < 1e-6 * losses.norm()
        assert (visit.slopes[1] - slopes).norm() < 1e-6 * slopes.norm()
        visited.append(visit.index)

    window = RecordedWindow.of(trajectory, trajectory.window(curvature=curvature))
    end = trajectory.state(NUM)
    adjoint = Adjoint(
        exact.gradient(end.params, target)[1], *(part.zeros_like() for part in end[1:])
    )
    trajectory.sweep(window, NUM, adjoint, compare)
    assert visited == (list(range(NUM - 1, 0, -1)) if derivative == "central" else [])
