"""How a run computes its gradient: the same as plain torch, and no score depends on it."""

import json
import math
import runpy
from itertools import islice
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS
from test_resume import Killed, assert_same, outcome
from test_run import config, digits, task
from torch import nn

from selectflow import Selector
from selectflow.core.batches import MicroBatches, take
from selectflow.data import PoolStream
from selectflow.run.build import build_losses, update
from selectflow.run.config import ConfigError, RunConfig, load
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import train
from selectflow.run.replay import ReplayError
from selectflow.run.sections import TrainConfig

__all__ = ["digits"]  # the fixture

TRAINER = runpy.run_path(str(Path(__file__).parents[1] / "trainers/language.py"))
CPU = torch.device("cpu")
MLP, _, TRANSFORMER = PROBLEMS


def trained(model, batches, *, clip=None, accumulate=1, loss_fn=MLP.loss_fn, **options):
    """The losses of a few updates."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = build_losses(model, loss_fn, TrainConfig(**options), CPU)
    return [
        update(model, losses, batch, optimizer, step, max_grad_norm=clip, accumulate=accumulate)
        for step, batch in enumerate(batches)
    ]


def trained_plainly(model, batches, *, clip=None, loss_fn=MLP.loss_fn, autocast=False):
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_fn(model, batch).mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def made(num=10, problem=MLP, dtype=torch.float64):
    model, make = problem.make(dtype)
    start = [param.detach().clone() for param in model.parameters()]
    return model, [make(num) for _ in range(4)], start


def moved(model, start):
    """The way from the start: unchanged weights cannot hide an error."""
    pairs = zip(model.parameters(), start, strict=True)
    return torch.cat([(p.detach() - s).flatten() for p, s in pairs])


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3, 10, 99])
def test_micro_batches_have_the_gradient_of_the_whole(accumulate, clip):
    """10 examples in 4 + 4 + 2: weighted by their number, or the last two would count double."""
    model, batches, start = made()
    expected_losses = trained_plainly(model, batches, clip=clip)
    expected = moved(model, start)
    model, _, _ = made()
    losses = trained(model, batches, clip=clip, accumulate=accumulate)
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert torch.allclose(moved(model, start), expected, rtol=1e-8, atol=1e-12)
    assert (torch.equal(moved(model, start), expected)) or accumulate > 1


def test_pools_of_one_update_are_one_batch():
    model, batches, start = made()
    parts = [MicroBatches([take(b, slice(0, 3)), take(b, slice(3, 10))]) for b in batches]
    trained_plainly(model, batches)
    expected = moved(model, start)
    model, _, _ = made()
    trained(model, parts, accumulate=2)
    assert torch.allclose(moved(model, start), expected, rtol=1e-8, atol=1e-12)


def test_autocast_is_that_of_torch_and_its_losses_are_float32():
    model, batches, start = made(problem=TRANSFORMER, dtype=torch.float32)
    loss_fn = TRANSFORMER.loss_fn
    exact = trained_plainly(model, batches, loss_fn=loss_fn)
    model, _, _ = made(problem=TRANSFORMER, dtype=torch.float32)
    expected_losses = trained_plainly(model, batches, loss_fn=loss_fn, autocast=True)
    expected = moved(model, start)
    model, _, _ = made(problem=TRANSFORMER, dtype=torch.float32)
    losses = trained(model, batches, loss_fn=loss_fn, autocast="bf16")
    assert losses == expected_losses != exact
    assert losses == pytest.approx(exact, rel=0.02)
    assert torch.equal(moved(model, start), expected)
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    half = build_losses(model, lambda m, x: m(x).sum((1, 2)), TrainConfig(autocast="bf16"), CPU)
    assert half(batches[0]["tokens"][:, :-1]).dtype == torch.float32


def test_scoring_runs_in_the_precision_of_training(digits, tmp_path):
    seen = set()

    def loss_fn(model, batch):
        seen.add((model.training and torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return plain.loss_fn(model, batch)

    for name, options in {"off": {}, "on": {"autocast": "bf16"}}.items():
        plain = task(digits)
        spied = type(plain)(**{**vars(plain), "loss_fn": loss_fn})
        seen.clear()
        train(config(tmp_path, name=name, train=options, select={"horizon": 2}), spied)
        assert seen >= {(True, name == "on"), (False, name == "on")}  # the exact form beside


def metrics(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def kept(run_dir):
    rows = read_ledger(run_dir, ["step", "key", "kept"]).to_pylist()
    return [(row["step"], row["key"]) for row in rows if row["kept"]]


@pytest.mark.parametrize("select", [{"horizon": 2, "interval": 2}, {"horizon": "auto"}])
def test_micro_batches_change_no_selection(digits, tmp_path, select):
    whole, parts = task(digits), task(digits)
    ends = [
        train(config(tmp_path, name=name, select=select, train=options, steps=12), made)
        for name, options, made in (("a", {}, whole), ("b", {"accumulate": 3}, parts))
    ]
    assert kept(ends[0]) == kept(ends[1])
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def train_with_a_kill(whole, broken, digits, batches):
    """A run, and one killed in between and resumed, which ends the same; the task of the first."""
    first = task(digits)
    train(whole, first)
    with pytest.raises(Killed):
        train(broken, killed_in_micro_batch(batches, task(digits)))
    train(broken, task(digits))
    assert_same(outcome(whole.run_dir), outcome(broken.run_dir))
    return first


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"autocast": "bf16", "accumulate": 2}])
def test_a_run_resumes_and_replays_with_them(digits, tmp_path, options):
    settings = {"train": options, "resume": "auto", "checkpoint_every": 3}
    whole, broken, replayed = (config(tmp_path, name=name, **settings) for name in "abc")
    first = train_with_a_kill(whole, broken, digits, 12)
    again = task(digits)
    select = {"select": {"keep": 8, "replay": whole.run_dir}}
    train(RunConfig.model_validate(replayed.model_dump() | select), again)
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))


def killed_in_micro_batch(number, made):
    """The task, whose loss raises `Killed` in the training's micro-batch of this number."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled() and model.training
        if calls == number:
            raise Killed
        return made.loss_fn(model, batch)

    return type(made)(**{**vars(made), "loss_fn": loss_fn})


def test_a_nan_in_a_micro_batch_names_the_step_and_its_samples(digits, tmp_path):
    def pools():
        for index, pool in enumerate(PoolStream(digits, pool=8, seed=0)):
            if index == 4:
                pool["image"][3] = math.nan
            yield pool

    options = {"train": {"accumulate": 4}, "select": {"strategy": "uniform"}}
    with pytest.raises(FloatingPointError, match=r"norm nan at optimizer step 4 on keys digit-"):
        train(config(tmp_path, **options), task(digits, pools()))


# --- several pools to an update --------------------------------------------------------------


def test_pools_of_one_update_are_trained_on_together(digits, tmp_path):
    """As the documented loop does with a Selector of the same options."""
    select = {"horizon": 2, "pools_per_update": 2}
    made = task(digits)
    run_dir = train(config(tmp_path, select=select, train={"accumulate": 3}), made)
    assert metrics(run_dir)["data/samples_seen"] == 7 * 2 * 8
    ledger = read_ledger(run_dir).to_pylist()
    assert [row["step"] for row in ledger] == [n for n in range(1, 8) for _ in range(2 * 32)]

    plain = task(digits)
    optimizer = torch.optim.AdamW(plain.model.parameters(), 3e-3, weight_decay=0.01)
    arguments = plain.model, optimizer, plain.loss_fn, plain.target
    selector = Selector(*arguments, keep=8, horizon=2, pools_per_update=2)
    batches, seen = [], []
    for batch in islice(selector.stream(plain.pools), 14):
        batches.append(batch)
        seen += batch["key"]
        if len(batches) == 2:
            optimizer.zero_grad()
            sum(plain.loss_fn(plain.model, each).sum() / 16 for each in batches).backward()
            optimizer.step()
            batches = []
    assert {row["key"] for row in ledger if row["kept"]} == set(seen)
    for one, other in zip(made.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_run_with_several_pools_resumes_and_replays(digits, tmp_path):
    select = {"horizon": 2, "interval": 2, "pools_per_update": 3, "lr": "auto"}
    settings = {"select": select, "resume": "auto", "checkpoint_every": 3}
    whole, broken = (config(tmp_path, name=name, **settings) for name in "ab")
    first = train_with_a_kill(whole, broken, digits, 14)
    again, replay = task(digits), {"replay": whole.run_dir}
    train(config(tmp_path, name="c", select=replay | {"pools_per_update": 3}), again)
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))
    with pytest.raises(ReplayError, match=r"pools_per_update must be that of the run .* got 5"):
        train(config(tmp_path, name="d", select=replay | {"pools_per_update": 5}), task(digits))


def test_options_that_offline_selection_does_not_have(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nselect: {horizon: .inf, pools_per_update: 2, score_view: 4}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "select.score_view must be null when select.horizon is .inf, got 4" in str(caught.value)
    assert "select.pools_per_update must be 1 when select.horizon is .inf" in str(caught.value)
