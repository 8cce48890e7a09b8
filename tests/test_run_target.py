"""Runs that train on the target set, alone or beside what is kept, and early stopping."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_resume import Killed, assert_same, outcome
from test_run import config, digits, loss_fn, read_lines, task
from torch import nn

from selectflow import Selector
from selectflow.core.batches import take
from selectflow.data import PoolStream
from selectflow.distributed import ALONE
from selectflow.run.config import ConfigError, load
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import RunError, train
from selectflow.run.patience import Patience
from selectflow.run.target import TargetPools, divided

__all__ = ["digits"]  # the fixture

VISION = Path(__file__).parents[1] / "trainers/vision.py"
CPU = torch.device("cpu")


def set_of(num):
    return {"image": torch.arange(float(num)), "key": [str(place) for place in range(num)]}


def keys_of(batches):
    return [key for batch in batches for key in batch["key"]]


def test_every_epoch_has_every_example_once_in_another_order():
    pools = TargetPools(set_of(10), 4, seed=3)
    keys = keys_of(pools.at(place) for place in range(5))
    assert sorted(keys[:10]) == sorted(keys[10:]) == sorted(set_of(10)["key"])
    assert keys[:10] != keys[10:]
    assert keys_of([TargetPools(set_of(10), 4, seed=4).at(0)]) != keys[:4]


def test_processes_draw_together_what_one_draws():
    one = TargetPools(set_of(30), 9, seed=0)
    three = [TargetPools(set_of(30), 3, seed=0, rank=rank, size=3) for rank in range(3)]
    for place in range(5):
        assert keys_of(pools.at(place) for pools in three) == one.at(place)["key"]


def test_the_target_set_is_divided_without_rest(digits, tmp_path):
    made = task(digits)
    whole = sorted(keys_of(made.target))
    options = config(tmp_path, data={"target_share": 0.25, "target_held_out": 0.3})
    held_out, mixed = divided(options, made, ALONE, CPU)
    trained_on = keys_of(mixed.at(place) for place in range(47))  # 3 beside 8 that are kept
    assert (len(trained_on), len({*trained_on}), len(keys_of(held_out.target))) == (141, 140, 60)
    assert sorted({*trained_on, *keys_of(held_out.target)}) == whole
    assert held_out.pools is made.pools
    options = config(tmp_path, data={"target_share": 1.0, "pool": 32})
    alone, mixed = divided(options, made, ALONE, CPU)
    assert mixed is None
    first = next(iter(alone.pools))["key"]
    assert len(first) == 32
    assert not {*first} & {*keys_of(alone.target)}


@pytest.mark.parametrize("select", [{"strategy": "uniform"}, {"horizon": 0}, {"horizon": 2}])
def test_a_mixed_run_is_torchs_own_on_what_was_kept_and_mixed_in(digits, tmp_path, select):
    options = config(tmp_path, data={"target_share": 0.25}, select=select, eval_every=1)
    run_dir = train(options, task(digits))
    rows = read_ledger(run_dir).to_pylist()
    assert len(rows) == 7 * 32  # what was mixed in was no candidate
    held_out, mixed = divided(options, task(digits), ALONE, CPU)
    model = task(digits).model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    lines = read_lines(run_dir / "metrics.jsonl")
    for step, pool in zip(range(7), PoolStream(digits, pool=32, seed=0), strict=False):
        kept = {row["key"] for row in rows if row["kept"] and row["step"] == step + 1}
        places = torch.tensor([i for i, key in enumerate(pool["key"]) if key in kept])
        batches = [take(pool, places), mixed.at(step)]
        loss = torch.cat([loss_fn(model, batch) for batch in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            target_loss = sum(float(loss_fn(model, b).sum()) for b in held_out.target)
        line = lines[step + 1]
        assert line["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert line["target/loss"] == pytest.approx(target_loss, rel=1e-5)
    assert line["data/samples_seen"] == 7 * (8 + 3)
    assert line["data/target_samples_seen"] == 7 * 3
    for name, param in outcome(run_dir)[0].items():
        torch.testing.assert_close(param, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_what_is_mixed_in_selects(digits, tmp_path):
    options = config(tmp_path, data={"target_share": 0.25}, select={"horizon": 0}, steps=1)
    rows = read_ledger(train(options, task(digits)))
    made = task(digits)
    _, mixed = divided(options, made, ALONE, CPU)
    optimizer = torch.optim.AdamW(made.model.parameters(), 3e-3, weight_decay=0.01)
    for by, is_right in ((mixed.examples, True), (made.target[0], False)):
        selector = Selector(made.model, optimizer, loss_fn, [by], 8, horizon=0)
        selector.select(next(iter(PoolStream(digits, pool=32, seed=0))))
        same = selector.last.scores.tolist() == pytest.approx(rows["score"].to_pylist())
        assert same == is_right


def test_a_run_on_the_target_alone_leaves_the_stream_alone(digits, tmp_path):
    made = task(digits, pools=())  # nothing comes from there
    options = config(tmp_path, data={"target_share": 1.0, "pool": 32}, select={"horizon": 0})
    rows = read_ledger(train(options, made)).to_pylist()
    held_out, _ = divided(options, made, ALONE, CPU)
    assert {row["key"] for row in rows} <= {*keys_of(made.target)} - {*keys_of(held_out.target)}
    assert sum(row["kept"] for row in rows) == 7 * 8
    lines = read_lines(tmp_path / "trial" / "metrics.jsonl")
    assert not any("select/kept_altered" in line for line in lines)


def test_the_vision_trainer_trains_on_the_target_alone(digits, tmp_path):
    data = {"name": "shards", "root": digits, "target_share": 1.0, "target_held_out": 0.5}
    options = config(tmp_path, data=data, select={"strategy": "uniform", "keep": 1.0}, patience=2)
    run_dir = train(options, runpy.run_path(str(VISION))["build_task"](options))
    keys = read_ledger(run_dir)["key"].to_pylist()
    assert len(keys) == 7 * 64
    assert len({*keys}) == 100
    last = read_lines(run_dir / "metrics.jsonl")[-1]
    assert last["data/samples_seen"] == 7 * 64
    assert last["target/accuracy"] * 100 == pytest.approx(round(last["target/accuracy"] * 100))


USES = [
    {"data": {"target_share": 0.25}},
    {"data": {"target_share": 1.0, "pool": 32}},
    {"data": {"target_share": 0.25}, "patience": 4, "optimizer": {"lr": 0.1}},
]


@pytest.mark.parametrize("use", USES)
def test_killed_and_resumed_it_equals_one_that_was_not(digits, tmp_path, use):
    values = {"steps": 24, "checkpoint_every": 4, "eval_every": 2, "resume": "auto"} | use
    select = {"horizon": 1}
    whole, killed = (config(tmp_path, name=n, select=select, **values) for n in ("whole", "killed"))
    train(whole, task(digits))
    made, calls = task(digits), 0

    def losses(model, batch):
        nonlocal calls
        calls += model.training and torch.is_grad_enabled() and len(batch["key"]) == 8
        if calls == 6:
            raise Killed
        return loss_fn(model, batch)

    with pytest.raises(Killed):
        train(killed, replace(made, loss_fn=losses))
    train(killed, task(digits))
    assert_same(outcome(whole.run_dir), outcome(killed.run_dir))
    first, second = (
        json.loads((each.run_dir / "summary.json").read_text()) for each in (whole, killed)
    )
    for name in ("steps", "lowest_target_loss_at"):
        assert first.get(name) == second.get(name)


def test_patience_ends_a_run_with_the_weights_of_the_lowest_target_loss(digits, tmp_path):
    saved = {}

    def save(folder, weights):
        saved.update({name: value.clone() for name, value in weights.items()})

    made = task(digits)
    values = {"steps": 200, "eval_every": 1, "patience": 3, "optimizer": {"lr": 0.03}}
    run_dir = train(config(tmp_path, select={"horizon": 0}, **values), replace(made, save=save))
    losses = [line["target/loss"] for line in read_lines(run_dir / "metrics.jsonl")]
    lowest = losses.index(min(losses))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["lowest_target_loss_at"]) == (len(losses) - 1, lowest)
    assert 0 < lowest == len(losses) - 1 - 3 < 197
    made.model.load_state_dict(saved)
    with torch.no_grad():
        loss = sum(float(loss_fn(made.model, batch).sum()) for batch in made.target)
    assert loss == pytest.approx(losses[lowest], rel=1e-6)


def test_patience_counts_evaluations_in_a_row():
    model, patience = nn.Linear(1, 1), Patience(2)
    for step, (loss, is_over) in enumerate([
        (3.0, False), (math.nan, False), (2.0, False), (2.0, False), (2.5, True),
    ]):  # fmt: skip
        patience.add(step, loss, model)
        assert patience.is_over == is_over
        nn.init.constant_(model.weight, step + 1)
    assert patience.step == 2
    patience.put_back(model)
    assert model.weight.item() == 2


def test_too_small_a_target_set_is_refused(digits, tmp_path):
    made = task(digits)
    few = replace(made, target=[take(made.target[0], slice(3))])
    for share, key in ((0.8, "data.target_share"), (1.0, "data.pool")):
        with pytest.raises(RunError, match=f"lower {key}"):
            train(config(tmp_path, data={"target_share": share}), few)
    one = replace(made, target=[take(made.target[0], slice(1))])
    with pytest.raises(RunError, match="at least 2 examples"):
        train(config(tmp_path, data={"target_share": 0.5}), one)


@pytest.mark.parametrize(
    ("share", "select"),
    [
        (0.5, {"horizon": "auto"}),
        (0.5, {"lr": "auto"}),
        (0.5, {"scope": "global"}),
        (0.5, {"horizon": ".inf"}),
        (1.0, {"horizon": ".inf"}),
    ],
)
def test_what_would_not_see_the_mixed_in_examples_is_refused(tmp_path, share, select):
    (key, value) = next(iter(select.items()))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"name: x\ndata: {{target_share: {share}}}\nselect: {{keep: 8, {key}: {value}}}\n"
    )
    with pytest.raises(
        ConfigError, match=f"select.{key} must be .*, got {value.lstrip('.')}, which does not"
    ):
        load(path)
    assert load(path, ["data.target_share=0"]).data.target_share == 0
