"""What `tests/benchmarks/baselines.py` compares: data that do not leak, and how runs are read."""

import baselines
import pytest
import study_data
import torch
from baselines import Budget, Method, Point
from torch.optim.lr_scheduler import LambdaLR

DIGITS = ["noised", "imbalanced", "clean"]


def rows(batch):
    return {tuple(row) for row in batch["x"].tolist()}


@pytest.mark.parametrize("task", DIGITS)
def test_no_seed_trains_or_selects_by_what_another_one_tests_on(task):
    first, other = (study_data.draw(task, seed, 200) for seed in (0, 100))
    assert torch.equal(first.test["x"], other.test["x"])
    assert not torch.equal(first.target["x"], other.target["x"])
    for data in (first, other):
        assert not rows(data.target) & rows(data.test)
        assert not rows(data.train) & (rows(data.target) | rows(data.test))


def test_groups_are_not_torn_apart(monkeypatch):
    group, place = torch.arange(300) // 10, torch.arange(300.0)
    found = study_data.Examples(place[:, None], group, place % 3 == 0, group)
    monkeypatch.setitem(study_data.TASKS, "groups", lambda: found)
    monkeypatch.setitem(study_data.NUM_TEST, "groups", 20)
    data = study_data.draw("groups", 1, 10)
    groups = [{*batch["y"].tolist()} for batch in data]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert (data.test["x"] % 3 == 0).all()
    assert (data.target["x"] % 3 == 0).all()
    assert (data.train["x"] % 3 > 0).any()


def test_of_the_noised_stream_forty_percent_are_wrong():
    noised, clean = (study_data.draw(task, 0, 200).train["y"] for task in ("noised", "clean"))
    assert (noised != clean).float().mean() == pytest.approx(0.4, abs=0.05)


def test_a_run_is_read_where_the_held_out_loss_was_lowest_within_the_budget():
    points = [
        Point(20, 1.0, 3.0, 9.0, 0.1), Point(40, 2.0, 2.0, 1.0, 0.2), Point(60, 3.0, 4.0, 0.5, 0.3),
        Point(80, 4.0, 1.0, 8.0, 0.4),
    ]  # fmt: skip
    assert Budget("steps", steps=60).best(points).step == 40
    assert Budget("seconds", seconds=1.5).best(points).step == 20
    assert Budget("all").best(points).step == 80


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (Method(), 16),
        (Method(stream=4), 64),
        (Method(stream=0, mixed=1), 16),
        (Method(stream=0.75, mixed=0.25), 17),  # 64 in five parts: the first has 13
        (Method({"horizon": 0}, 0.75, 0.25), 16),
    ],
)
def test_what_a_step_trains_on(method, size):
    start = baselines.classifier("clean", 1e-3, 0, 200)
    (target,) = start.setting.target
    schedule = LambdaLR(start.setting.optimizer, lambda _: 1.0)
    batch = next(iter(baselines.batches(method, start, schedule, 0)))
    assert len(batch["y"]) == size
    of_target = rows(batch) & rows(target)
    assert len(of_target) == 16 * method.mixed
    if method.options is not None:  # the other half selects
        assert of_target <= rows({"x": target["x"][:80]})
