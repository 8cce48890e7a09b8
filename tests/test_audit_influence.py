"""Influence and its ground truth against real reruns by torch.optim, one at a time."""

import math

import pytest
import torch
from problems import PROBLEMS, image_loss
from reference import clone, removal, rerun
from torch import nn

from selectflow.audit.influence import METHODS, influence, leave_one_out
from selectflow.audit.reruns import Removal, expand
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import look_ahead
from selectflow.core.passes import Objective
from selectflow.core.sweep import Window
from selectflow.core.torch_optim import OptimizerReader
from selectflow.offline.record import record

MLP, CNN, TRANSFORMER = PROBLEMS
IDS = [problem.name for problem in PROBLEMS]
SIZE = 6


def setting(problem=MLP, num=10, dtype=torch.float64, optimizer=torch.optim.AdamW, lr=3e-3):
    """A model, its optimizer, batches and queries; the originals stay at the start of the run."""
    model, make = problem.make(dtype)
    model.eval()  # reruns by hand are in scoring mode as the recording is
    options = {} if optimizer is torch.optim.SGD else {"betas": (0.9, 0.95)}
    optimizer = optimizer(model.parameters(), lr=lr, weight_decay=0.1, **options)
    return model, optimizer, [make(SIZE) for _ in range(num)], make(5)


def recorded(model, optimizer, problem, batches, **options):
    return record(*clone(model, optimizer), problem.loss_fn, batches, **options)


def keep_all(losses):
    return losses


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("problem", "num_parallel"), [(MLP, 1), (MLP, 4), (CNN, 4), (TRANSFORMER, 4)]
)
def test_leave_one_out_is_a_torch_rerun(problem, num_parallel):
    model, optimizer, batches, queries = setting(problem)
    args = model, optimizer, problem.loss_fn, batches, queries
    trajectory = recorded(*args[:2], problem, batches, max_grad_norm=0.5, spacing=4)
    pairs = [(9, 2), (0, 5), (3, 1), (3, 0), (7, 4), (0, 0)]
    how = {"max_grad_norm": 0.5, "reduce": keep_all}
    before = rerun(*args, **how)
    truth = torch.stack(
        [rerun(*args, weights=removal(*pair, SIZE), **how) - before for pair in pairs]
    )
    found = leave_one_out(trajectory, queries, pairs, num_parallel=num_parallel)
    assert found.shape == (6, 5)
    assert truth.abs().min() > 0
    assert (found - truth).abs().max() < 1e-9 * truth.abs().max()
    mean = leave_one_out(trajectory, queries, pairs, reduce="mean")
    assert relative(mean, truth.mean(1, keepdim=True)) < 1e-9


def test_finite_horizons_read_the_queries_earlier():
    model, optimizer, batches, queries = setting()
    trajectory = recorded(model, optimizer, MLP, batches)
    pairs = [(0, 3), (5, 2), (7, 1)]
    found = leave_one_out(trajectory, queries, pairs, horizon=3)
    predicted = influence(trajectory, queries, pairs, horizon=3)
    for row, (step, position) in enumerate(pairs):
        args = model, optimizer, image_loss, batches[: step + 3], queries

        def change(share, args=args, step=step, position=position):
            how = {"weights": removal(step, position, SIZE, share), "reduce": keep_all}
            return rerun(*args, **how)

        assert relative(found[row], change(1) - change(0)) < 1e-9
        slope = (change(1e-4) - change(-1e-4)) / 2e-4
        assert relative(predicted[row], slope) < 1e-6


@pytest.mark.parametrize(
    ("problem", "num"), [(MLP, 100), (TRANSFORMER, 40)], ids=["mlp", "transformer"]
)
def test_influence_is_the_derivative_of_a_whole_run(problem, num):
    model, optimizer, batches, queries = setting(problem, num=num)
    args = model, optimizer, problem.loss_fn, batches, queries
    trajectory = recorded(*args[:2], problem, batches, spacing=16)
    pairs = [(0, 1), (1, 0), (30, 2), (num * 5 // 8, 3), (num - 1, 5)]
    found = influence(trajectory, queries, pairs)
    for row, pair in enumerate(pairs):

        def change(share, pair=pair):
            return rerun(*args, weights=removal(*pair, SIZE, share), reduce=keep_all)

        slope = (change(1e-5) - change(-1e-5)) / 2e-5
        assert slope.norm() > 1e-6
        assert relative(found[row], slope) < 1e-5


@pytest.mark.parametrize(
    ("problem", "optimizer"),
    [
        (MLP, torch.optim.AdamW),
        (MLP, torch.optim.SGD),
        (CNN, torch.optim.SGD),
        (TRANSFORMER, torch.optim.AdamW),
    ],
)
def test_influence_is_the_derivative_of_a_whole_clipped_run(problem, optimizer):
    """A rerun clips again: the norm, and with it the factor, moves with the weights."""
    lr = 0.1 if optimizer is torch.optim.SGD else 3e-3
    model, optimizer, batches, queries = setting(problem, 12, optimizer=optimizer, lr=lr)
    args = model, optimizer, problem.loss_fn, batches, queries
    trajectory = recorded(*args[:2], problem, batches, max_grad_norm=0.5, spacing=5)
    pairs = [(0, 1), (7, 0), (11, 5)]
    found = influence(trajectory, queries, pairs)
    for row, pair in enumerate(pairs):

        def change(share, pair=pair):
            how = {"weights": removal(*pair, SIZE, share), "max_grad_norm": 0.5}
            return rerun(*args, reduce=keep_all, **how)

        slope = (change(1e-5) - change(-1e-5)) / 2e-5
        assert slope.norm() > 1e-6
        assert relative(found[row], slope) < 1e-5
    first, _ = expand(trajectory, queries, [Removal(*pair, 12) for pair in pairs])
    assert relative(first, found) < 1e-9


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_second_order_is_half_the_second_derivative(problem):
    model, optimizer, batches, queries = setting(problem)
    args = model, optimizer, problem.loss_fn, batches, queries
    trajectory = recorded(*args[:2], problem, batches)
    pairs = [(2, 1), (2, 4), (8, 3), (9, 0)]
    first, second = expand(trajectory, queries, [Removal(*pair, 10) for pair in pairs])
    for row, pair in enumerate(pairs):

        def read(share, pair=pair):
            return rerun(*args, weights=removal(*pair, SIZE, share), reduce=keep_all)

        bend = (read(1e-4) - 2 * read(0) + read(-1e-4)) / 1e-8
        assert relative(2 * second[row], bend) < 1e-3
    assert relative(first, influence(trajectory, queries, pairs)) < 1e-9
    both = influence(trajectory, queries, pairs, order=2, num_parallel=3)
    assert relative(both, first + second) < 1e-12
    truth = leave_one_out(trajectory, queries, pairs)
    late = slice(2, 4)
    assert (both - truth)[late].norm() < 0.7 * (first - truth)[late].norm()


@pytest.mark.parametrize("build", [torch.optim.Adam, torch.optim.SGD])
def test_second_order_of_other_optimizers(build):
    model, optimizer, batches, queries = setting(optimizer=build, lr=1e-2)
    trajectory = recorded(model, optimizer, MLP, batches)
    args = model, optimizer, image_loss, batches, queries
    first, second = expand(trajectory, queries, [Removal(3, 1, 10)])

    def read(share):
        return rerun(*args, weights=removal(3, 1, SIZE, share), reduce=keep_all)

    assert relative(first[0], (read(1e-4) - read(-1e-4)) / 2e-4) < 1e-6
    assert relative(2 * second[0], (read(1e-3) - 2 * read(0) + read(-1e-3)) / 1e-6) < 1e-3


def test_dead_inputs_have_no_second_moment_and_no_tangent():
    """Pixels that are always 0 leave v = 0, where the square root has no derivative."""
    model, optimizer, batches, queries = setting()
    for batch in batches:
        batch["image"][:, :, 0] = 0
    trajectory = recorded(model, optimizer, MLP, batches)
    assert (trajectory.state(10).exp_avg_sq["1.weight"] == 0).any()
    first, second = expand(trajectory, queries, [Removal(7, 1, 10)])
    assert relative(first, influence(trajectory, queries, [(7, 1)])) < 1e-9
    truth = leave_one_out(trajectory, queries, [(7, 1)])
    assert (first + second - truth).norm() < 0.5 * (first - truth).norm()


@pytest.mark.parametrize(
    ("problem", "curvature"),
    [(MLP, "exact"), (MLP, "fisher"), (MLP, "none"), (TRANSFORMER, "exact")],
)
def test_online_scores_with_all_steps_left_are_the_offline_scores(problem, curvature):
    model, optimizer, batches, queries = setting(problem, num=12)
    trajectory = recorded(model, optimizer, problem, batches, spacing=5)
    for step, batch in enumerate(batches):
        derivatives = Derivatives(Objective(model, problem.loss_fn), "exact")
        reader = OptimizerReader(model, optimizer)
        left = batches[step:]
        window = Window(
            derivatives, reader.updates(len(left)), lambda i, _, left=left: left[i], curvature
        )
        gamma = look_ahead(window, reader.state(), queries).sensitivities[0]
        _, slopes = derivatives.directional(reader.state().params, gamma, batch)
        online = (slopes.mean() - slopes) / (SIZE - 1)
        pairs = [(step, position) for position in range(SIZE)]
        offline = influence(trajectory, queries, pairs, curvature=curvature, reduce="mean")
        assert relative(offline[:, 0], online) < 1e-6
        optimizer.zero_grad()
        problem.loss_fn(model, batch).mean().backward()
        optimizer.step()


def test_sgd_on_an_sgd_run_is_the_recorded_optimizer():
    model, _, batches, queries = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trajectory = recorded(model, optimizer, MLP, batches)
    pairs = [(0, 1), (4, 4)]
    found = influence(trajectory, queries, pairs, method="sgd")
    assert relative(found, influence(trajectory, queries, pairs)) < 1e-12


def test_sgd_on_an_adamw_run_forgets_the_preconditioner():
    """Without curvature its prediction is -lr grad_query(end) . (g - g_z) / (B - 1)."""
    model, optimizer, batches, queries = setting()
    trajectory = recorded(model, optimizer, MLP, batches)
    found = influence(trajectory, queries, [(4, 2)], method="sgd", curvature="none")
    derivatives, state = trajectory.derivatives, trajectory.state(4)
    _, of_queries = derivatives.gradients(trajectory.state(10).params, queries, torch.eye(5))
    _, mean = derivatives.gradient(state.params, batches[4])
    alone = torch.zeros(SIZE)
    alone[2] = 1
    _, own = derivatives.gradients(state.params, batches[4], alone)
    change = (mean - own) / (SIZE - 1)
    expected = sum((of_queries[n] * change[n]).flatten(1).sum(1) for n in change) * -3e-3
    assert relative(found[0], expected) < 1e-10


def test_overlooked_schedule_and_decay_are_those_of_runs_without():
    """With a constant lr or without decay there is nothing to overlook; else there is."""
    model, optimizer, batches, queries = setting()
    trajectory = recorded(model, optimizer, MLP, batches)
    pairs = [(1, 1), (5, 0)]
    right = influence(trajectory, queries, pairs)
    assert relative(influence(trajectory, queries, pairs, method="constant_lr"), right) == 0
    assert relative(influence(trajectory, queries, pairs, method="no_decay"), right) > 1e-5
    model_copy, optimizer_copy = clone(model, optimizer)
    halve = torch.optim.lr_scheduler.StepLR(optimizer_copy, 3, 0.5)
    trajectory = record(model_copy, optimizer_copy, image_loss, batches, halve)
    right = influence(trajectory, queries, pairs)
    assert relative(influence(trajectory, queries, pairs, method="constant_lr"), right) > 0.1


def test_the_exact_response_of_the_own_update_is_that_of_torch():
    """At horizon 1 only the query loss is linearised: grad_query . (theta without - theta)."""
    model, optimizer, batches, queries = setting()
    trajectory = recorded(model, optimizer, MLP, batches)
    found = influence(trajectory, queries, [(0, 2)], horizon=1, own_update="exact")
    ends = []
    for share in (0, 1):
        model_copy, optimizer_copy = clone(model, optimizer)
        weight = torch.full((SIZE,), 1 / SIZE).double()
        for _, index, extra in removal(0, 2, SIZE, share):
            weight[index] += extra
        (image_loss(model_copy, batches[0]) * weight).sum().backward()
        optimizer_copy.step()
        ends.append({name: p.detach() for name, p in model_copy.named_parameters()})
    _, grads = trajectory.derivatives.gradients(trajectory.state(1).params, queries, torch.eye(5))
    expected = sum((grads[n] * (ends[1][n] - ends[0][n])).flatten(1).sum(1) for n in ends[0])
    assert relative(found[0], expected) < 1e-6
    linear = influence(trajectory, queries, [(0, 2)], horizon=1)
    truth = leave_one_out(trajectory, queries, [(0, 2)], horizon=1)
    assert (found - truth).norm() < 0.1 * (linear - truth).norm()


def test_the_own_update_of_sgd_is_linear_already():
    model, optimizer, batches, queries = setting(optimizer=torch.optim.SGD, lr=0.1)
    trajectory = recorded(model, optimizer, MLP, batches)
    linear = influence(trajectory, queries, [(2, 1), (5, 0)])
    exact = influence(trajectory, queries, [(2, 1), (5, 0)], own_update="exact")
    assert relative(exact, linear) < 1e-12


def test_the_own_update_moves_the_root_of_the_second_moment():
    """One weight, loss w x, two steps of Adam with beta1 = 0, by hand.

    The first batch is {2, 0}: g = 1 and v1 = 1/2; without the 2, g = 0 and v1 = 0. Step 2 has
    g = 1, so v2 = v1 / 2 + 1/2, and is predicted to first order in r1 = sqrt(v1).
    """
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, (0.0, 0.5), 1e-12, weight_decay=0)
    batches = [torch.tensor([[2.0], [0.0]]).double(), torch.ones(2, 1).double()]
    trajectory = record(model, optimizer, lambda model, x: model(x)[:, 0], batches)
    found = influence(
        trajectory, torch.ones(1, 1).double(), [(0, 0)], own_update="exact", horizon=2
    )
    # The own step: -0.1 with the example, 0 without. The next: -0.1 / sqrt(v2 / c2), with c2 = 3/4
    # and v2 = r1^2 / 2 + 1/2 = 3/4 at r1 = sqrt(1/2), changes by 0.1 (r1 / 2) / v2 dr, dr = -r1.
    assert found.item() == pytest.approx(0.1 - 0.1 * 0.25 / 0.75, rel=1e-6)


class TestRefusals:
    @pytest.fixture
    def run(self):
        model, optimizer, batches, queries = setting(num=4)
        record(model, optimizer, image_loss, batches)
        return record(model, optimizer, image_loss, batches), queries

    @pytest.mark.parametrize("measure", [leave_one_out, influence])
    @pytest.mark.parametrize(
        ("pair", "message"),
        [
            ((3, 0), r"steps in \[4, 7\], those recorded, got \(3, 0\)"),
            ((8, 0), r"steps in \[4, 7\], those recorded, got \(8, 0\)"),
            ((4, 6), r"positions in \[0, 5\] at step 4, got \(4, 6\)"),
            ((4, -1), r"positions in \[0, 5\] at step 4, got \(4, -1\)"),
        ],
    )
    def test_pairs_outside_the_recording(self, run, measure, pair, message):
        with pytest.raises(ValueError, match=message):
            measure(*run, [(5, 0), pair])

    @pytest.mark.parametrize("measure", [leave_one_out, influence])
    def test_horizons(self, run, measure):
        with pytest.raises(ValueError, match=r"at least horizon = 3 updates .* step 8, got \(6, 1"):
            measure(*run, [(6, 1)], horizon=3)
        for horizon in (0, 1.5, -1, math.nan):
            with pytest.raises(ValueError, match=r"integer >= 1 or math\.inf, got"):
                measure(*run, [(6, 1)], horizon=horizon)

    @pytest.mark.parametrize("measure", [leave_one_out, influence])
    def test_losses_of_queries_that_are_not_per_example(self, measure):
        model, optimizer, batches, queries = setting(num=3)

        def loss_fn(model, batch):
            losses = image_loss(model, batch)
            return losses if len(losses) == SIZE else losses.mean()

        trajectory = record(model, optimizer, loss_fn, batches)
        with pytest.raises(ValueError, match=r"one loss per example, shape \(5,\), got \(\)"):
            measure(trajectory, queries, [(0, 0)])

    def test_a_batch_of_one(self):
        model, optimizer, batches, queries = setting(num=1)
        one = {"image": batches[0]["image"][:1], "label": batches[0]["label"][:1]}
        trajectory = record(model, optimizer, image_loss, [one])
        with pytest.raises(ValueError, match="must keep an example, got only one at step 0"):
            influence(trajectory, queries, [(0, 0)])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "adam"}, f"one of {', '.join(METHODS)}, got 'adam'"),
            ({"curvature": "ggn"}, "curvature must be one of exact, fisher, none"),
            ({"order": 3}, "order must be one of 1, 2, got 3"),
            ({"reduce": "sum"}, "reduce must be 'none' or 'mean'"),
            ({"order": 2, "method": "sgd"}, "order 2 must go with method='adamw'"),
            ({"own_update": "exact", "method": "sgd"}, "must go with the recorded optimizer"),
        ],
    )
    def test_options(self, run, options, message):
        with pytest.raises(ValueError, match=message):
            influence(*run, [(4, 0)], **options)

    def test_batches_changed_since(self):
        model, optimizer, batches, queries = setting(num=6)
        trajectory = record(model, optimizer, image_loss, batches)
        with torch.no_grad():
            batches[4]["image"] += 1
        for measure in (leave_one_out, influence):
            with pytest.raises(RuntimeError, match="training is not deterministic"):
                measure(trajectory, queries, [(1, 1)])


def test_the_model_may_move_on():
    """A trajectory is about the recorded run, whatever the live model does since."""
    model, optimizer, batches, queries = setting(num=5)
    trajectory = record(model, optimizer, image_loss, batches, spacing=2)
    found = influence(trajectory, queries, [(0, 1), (3, 2)])
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    assert torch.equal(influence(trajectory, queries, [(0, 1), (3, 2)]), found)
