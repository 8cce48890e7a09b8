"""Offline scores are those of the look-ahead over a whole run; what is kept is what ranks best."""

import dataclasses

import pytest
import torch
from problems import PROBLEMS, image_loss
from reference import clone

from selectflow import Selector
from selectflow.audit.influence import influence
from selectflow.core.derivatives import Derivatives
from selectflow.offline.record import record
from selectflow.offline.score import score_samples

MLP, CNN, TRANSFORMER = PROBLEMS
SIZE, NUM = 6, 8


def keyed(batch, step):
    """The batch, its examples named apart from those of other steps."""
    num = len(next(iter(batch.values())))
    return batch | {"key": [f"{step}-{position}" for position in range(num)]}


def setting(problem=MLP, num=NUM):
    """A model at its start, its optimizer, batches and target."""
    model, make = problem.make(torch.float64)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1)
    return model, optimizer, [keyed(make(SIZE), step) for step in range(num)], make(5)


def recorded(model, optimizer, batches, problem=MLP, **options):
    return record(*clone(model, optimizer), problem.loss_fn, batches, **options)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("curvature", ["exact", "fisher", "none"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_scores_predict_the_removals_of_the_audit(problem, curvature):
    """A removal gives the example's weight to the others; a score leaves theirs as they are."""
    model, optimizer, batches, target = setting(problem)
    options = {"max_grad_norm": 0.5, "spacing": 3}
    trajectory = recorded(model, optimizer, batches, problem, **options)
    scores = score_samples(trajectory, [target], curvature=curvature)
    assert scores.keys == [key for batch in batches for key in batch["key"]]
    each = scores.score.view(NUM, SIZE)
    predicted = (SIZE * each - each.sum(1, keepdim=True)) / (SIZE - 1)
    pairs = [(step, position) for step in range(NUM) for position in range(SIZE)]
    removed = influence(trajectory, target, pairs, curvature=curvature, reduce="mean")
    assert relative(predicted.view(-1, 1), removed) < 1e-9


@pytest.mark.parametrize("problem", [MLP, TRANSFORMER], ids=lambda problem: problem.name)
def test_online_scores_with_the_rest_of_the_run_as_horizon_are_the_offline_ones(problem):
    model, optimizer, batches, target = setting(problem)
    scores = score_samples(recorded(model, optimizer, batches, problem), [target])
    for step, batch in enumerate(batches):
        selector = Selector(
            model, optimizer, problem.loss_fn, [target], 1.0, NUM - step, derivative="exact"
        )
        selector.select(batch, batches[step + 1 :])
        offline = SIZE * scores.score[step * SIZE : (step + 1) * SIZE]
        assert relative(selector.last.scores, offline) < 1e-6
        optimizer.zero_grad()
        problem.loss_fn(model, batch).mean().backward()
        optimizer.step()


def test_a_score_is_the_slope_of_the_target_loss_in_a_samples_weight():
    """By really training with the sample a little heavier and lighter, wherever it occurs."""
    model, optimizer, batches, target = setting()
    run = [*batches[:3], *batches[:2], batches[0]]
    scores = score_samples(recorded(model, optimizer, run), [target])
    assert scores.occurrences.tolist() == [3] * SIZE + [2] * SIZE + [1] * SIZE

    def final_loss(key, change):
        twin, its = clone(model, optimizer)
        for batch in run:
            weight = [1 + change * (name == key) for name in batch["key"]]
            weight = torch.tensor(weight, dtype=torch.float64)
            its.zero_grad()
            (weight * image_loss(twin, batch)).mean().backward()
            its.step()
        return image_loss(twin, target).mean().item()

    for key in ("0-2", "1-0", "2-5"):
        slope = (final_loss(key, 1e-4) - final_loss(key, -1e-4)) / 2e-4
        assert float(scores.score[scores.keys.index(key)]) == pytest.approx(-slope, rel=1e-5)


@pytest.mark.parametrize("curvature", ["exact", "fisher"])
def test_inputs_that_come_on_late_leave_central_differences_their_step(curvature):
    """Before they come on, their weights' sensitivity is lr / eps, and no part of any product."""
    model, optimizer, batches, target = setting()
    for batch in batches[: NUM - 2]:
        batch["image"][:, :, :3] = 0
    trajectory = recorded(model, optimizer, batches)
    exact = score_samples(trajectory, [target], curvature=curvature)
    objective = trajectory.derivatives.objective
    central = dataclasses.replace(trajectory, derivatives=Derivatives(objective, "central"))
    found = score_samples(central, [target], curvature=curvature)
    assert relative(found.score, exact.score) < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 2e-2)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_central_differences_give_the_exact_scores_of_a_whole_run(problem, dtype, most):
    model, make = problem.make(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1)
    batches, target = [keyed(make(SIZE), step) for step in range(30)], make(5)
    trajectory = recorded(model, optimizer, batches, problem)
    exact = score_samples(trajectory, [target], derivative="exact")
    for form in ("central", "auto"):
        found = score_samples(trajectory, [target], derivative=form)
        assert relative(found.score, exact.score) < most


def test_occurrences_add_up():
    """The same run with its second epoch under other names: the two scores have the same sum."""
    model, optimizer, batches, target = setting(num=4)
    other = [{**batch, "key": [f"again-{key}" for key in batch["key"]]} for batch in batches]
    joined = score_samples(recorded(model, optimizer, batches * 2), [target])
    apart = score_samples(recorded(model, optimizer, batches + other), [target])
    first, second = apart.score.view(2, -1)
    assert relative(joined.score, first + second) < 1e-12
    assert joined.keys == apart.keys[: 4 * SIZE]
    assert joined.occurrences.tolist() == [2] * 4 * SIZE


def test_the_target_loss_is_the_mean_over_all_examples_of_all_batches():
    model, optimizer, batches, target = setting()
    trajectory = recorded(model, optimizer, batches)
    parts = [
        {name: leaf[part] for name, leaf in target.items()} for part in (slice(2), slice(2, 5))
    ]
    whole, split = (score_samples(trajectory, each) for each in ([target], parts))
    assert relative(split.score, whole.score) < 1e-12


def test_neither_snapshots_nor_the_memory_limit_change_the_scores():
    model, optimizer, batches, target = setting()
    full = score_samples(recorded(model, optimizer, batches), [target])
    size = 4 * 8 * sum(p.numel() for p in model.parameters())
    sparse = recorded(model, optimizer, batches, spacing=100)
    tight = score_samples(sparse, [target], memory_gib=5.5 * size / 2**30)
    assert relative(tight.score, full.score) < 1e-9


def test_batches_without_keys_are_refused():
    model, optimizer, batches, target = setting()
    for spoilt, named in (
        ({name: batches[3][name] for name in ("image", "label")}, "dict"),
        (batches[3] | {"key": batches[3]["key"][:-1]}, "list"),
    ):
        trajectory = recorded(model, optimizer, [*batches[:3], spoilt])
        with pytest.raises(
            ValueError, match=rf"list 'key' .*got {named} at update 3; .*PoolStream"
        ):
            score_samples(trajectory, [target])
    with pytest.raises(ValueError, match="target must yield at least one batch, got none"):
        score_samples(recorded(model, optimizer, batches), [])
