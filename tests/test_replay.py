"""A replay trains on exactly what was recorded, scores nothing, and needs the same pools."""

import pytest
import torch
from small_datasets import make_small
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import config, digits, read_lines, task
from torch import nn

from selectflow.data import PoolStream
from selectflow.run.config import ConfigError, load
from selectflow.run.ledger import read_ledger
from selectflow.run.log import read_decisions
from selectflow.run.loop import RunError, train
from selectflow.run.replay import ReplayError, read_choices
from selectflow.selector import Selector

__all__ = ["digits"]  # the fixture


def noisy(root):
    """The task with a model whose dropout draws from the generator that a run carries on."""
    made = task(root)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.2), nn.Linear(32, 10))
    return type(made)(**{**vars(made), "model": model})


SELECT = [
    {"horizon": 0, "interval": 4},
    {"horizon": 2, "interval": 3},
    {"horizon": 1, "score_every": 3},
    {"strategy": "loss"},
    {"strategy": "uniform", "keep": 0.3},
]


@pytest.mark.parametrize("select", SELECT)
def test_a_replay_ends_in_the_weights_of_the_recorded_run(digits, tmp_path, select, monkeypatch):
    options = {"steps": 24, "eval_every": 5}
    train(config(tmp_path, name="recorded", select=select, **options), noisy(digits))
    monkeypatch.setattr(Selector, "select", None)  # nothing may be scored
    replay = {"replay": tmp_path / "recorded"}
    run_dir = train(config(tmp_path, name="again", select=replay, **options), noisy(digits))
    first, second = outcome(tmp_path / "recorded"), outcome(run_dir)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    for index, state in first[1]["state"].items():
        assert all(torch.equal(state[name], second[1]["state"][index][name]) for name in state)
    for ours, theirs in zip(second[2], first[2], strict=True):
        same = [name for name in ours if name.startswith(("test/", "target/", "train/"))]
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert read_lines(run_dir / "metrics.jsonl")[-1]["data/samples_scored"] == 0
    columns = ["step", "epoch", "key", "score", "kept"]
    assert read_ledger(run_dir, columns).equals(read_ledger(tmp_path / "recorded", columns))


def test_a_replay_may_be_shorter_and_resumes(digits, tmp_path):
    train(config(tmp_path, name="recorded", **OPTIONS), task(digits))
    replay = {"select": {"replay": tmp_path / "recorded"}} | OPTIONS | {"steps": 19}
    whole, killed = (config(tmp_path, name=name, **replay) for name in ("whole", "killed"))
    train(whole, task(digits))
    with pytest.raises(Killed):
        train(killed, killed_at(11, task(digits)))
    train(killed, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))
    longer = config(tmp_path, name="longer", **replay | {"steps": 25})
    with pytest.raises(ReplayError, match=r"steps must be <= 24, the steps recorded in .*got 25"):
        train(longer, task(digits))


@pytest.mark.parametrize(
    ("stream", "difference"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"pool": 16}, "pool: 32 there, 16 here"),
        ({"buffer": 100}, "buffer: 4096 there, 100 here"),
    ],
)
def test_other_pools_are_refused_with_the_difference(digits, tmp_path, stream, difference):
    train(config(tmp_path, name="recorded"), task(digits))
    replay = config(tmp_path, name="again", select={"replay": tmp_path / "recorded"})
    pools = PoolStream(digits, **{"pool": 32, "seed": 0} | stream)
    with pytest.raises(ReplayError, match=f"must have the pools of the run in .*{difference}"):
        train(replay, task(digits, pools))


def test_another_dataset_is_refused(digits, tmp_path):
    train(config(tmp_path, name="recorded"), task(digits))
    replay = config(tmp_path, name="again", select={"replay": tmp_path / "recorded"})
    make_small(tmp_path / "other", count=40)
    other = PoolStream(tmp_path / "other", pool=32, seed=0)
    with pytest.raises(ReplayError, match=r"fingerprint: '.*' there, '.*' here; use its"):
        train(replay, task(digits, other))
    # pools that do not say where they come from are compared key by key
    with pytest.raises(ReplayError, match=r"pool of step 1 must be .* got 's.*' instead of 'digit"):
        train(replay, task(digits, [next(other)]))
    replay = replay.model_copy(update={"overwrite": True})
    with pytest.raises(ReplayError, match="got 31 candidates instead of 32"):
        train(replay, task(digits, [next(PoolStream(digits, pool=31, seed=0, shuffle=True))]))


def test_a_run_is_not_replayed_over_itself(digits, tmp_path):
    train(config(tmp_path), task(digits))
    itself = config(tmp_path, overwrite=True, select={"replay": tmp_path / "trial"})
    with pytest.raises(RunError, match=r"select\.replay must be another run than this one"):
        train(itself, task(digits))
    assert len(read_ledger(tmp_path / "trial")) == 7 * 32


def test_a_replay_of_what_is_selected_offline_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nselect: {horizon: .inf, replay: runs/b}\n")
    with pytest.raises(ConfigError, match=r"select\.replay must be null when select\.horizon"):
        load(path)


def test_decisions_keep_the_order_in_which_they_were_trained_on(digits, tmp_path):
    made, seen = task(digits), []

    def loss_fn(model, batch):
        if torch.is_grad_enabled() and model.training and len(batch["key"]) == 8:
            seen.append(batch["key"])
        return made.loss_fn(model, batch)

    run_dir = train(config(tmp_path), type(made)(**{**vars(made), "loss_fn": loss_fn}))
    decisions = list(read_choices(run_dir))
    assert [decision.step for decision in decisions] == list(range(1, 8))
    assert [[d.keys[i] for i in d.indices.tolist()] for d in decisions] == seen
    assert [decision.step for decision in read_choices(run_dir, after=4)] == [5, 6, 7]


def test_a_run_under_rate_control_is_replayed_with_a_warning(digits, tmp_path):
    """Same samples, each step; the controller's learning rates are not part of the ledger."""
    select = {"horizon": "auto", "lr": "auto"}
    train(config(tmp_path, name="recorded", select=select, steps=24), task(digits))
    decided = list(read_decisions(tmp_path / "recorded"))
    assert any(decision.what == "lr_multiplier" and decision.moved for decision in decided)
    replay = {"replay": tmp_path / "recorded"}
    with pytest.warns(UserWarning, match="changed the learning rate"):
        run_dir = train(config(tmp_path, name="again", select=replay, steps=24), task(digits))
    columns = ["step", "key", "kept"]
    assert read_ledger(run_dir, columns).equals(read_ledger(tmp_path / "recorded", columns))
