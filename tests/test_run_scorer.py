"""Runs in which a small model scores: their metrics, resumption, and what both trainers make."""

import runpy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_language_trainer import KINDS, TRAINER, configured, data
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import config, digits, read_lines, task

import selectflow.control.worth
from selectflow import Scorer, Selector
from selectflow.core.batches import to_device
from selectflow.fields import ConfigError
from selectflow.models.vision import mlp
from selectflow.run import metrics
from selectflow.run.build import build_optimizer, build_schedule
from selectflow.run.config import load
from selectflow.run.directory import Checkpoints
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import RunError, train

__all__ = ["data", "digits"]  # the fixtures

ROOT = Path(__file__).parents[1]
TRAINED, FROZEN = {"optimizer": {"lr": 1e-2, "max_grad_norm": 0.5}}, {"optimizer": None}


def scored(root):
    """The task with a scorer, the same at each call."""
    made = task(root)
    torch.manual_seed(7)
    return replace(made, scorer=mlp(64, 10, (5,)))


def made(tmp_path, scorer=None, **options):
    return config(tmp_path, **OPTIONS | {"scorer": scorer or TRAINED} | options)


def checked_at(monkeypatch, step, gap):
    """Let runs measure what their scorer is worth so early."""
    begin = selectflow.control.worth.WorthState
    monkeypatch.setattr("selectflow.options.WorthState", lambda: begin(next_at=step, gap=gap))


@pytest.mark.parametrize(
    ("scorer", "horizon"),
    [(TRAINED, 0), (TRAINED, 2), (FROZEN, 0)],
    ids=["trained", "ahead", "frozen"],
)
def test_a_run_is_the_loop_that_one_would_write(digits, tmp_path, scorer, horizon):
    given = made(tmp_path, scorer, select={"horizon": horizon}, schedule={"warmup_steps": 5})
    run_dir = train(given, scored(digits))
    alone = scored(digits)
    optimizer = build_optimizer(alone.model, given.optimizer)
    schedule = build_schedule(optimizer, given.schedule, given.steps)
    beside = Scorer(alone.scorer)
    if scorer is TRAINED:
        own = build_optimizer(alone.scorer, given.scorer.optimizer)
        after = build_schedule(own, given.schedule, given.steps)
        beside = Scorer(alone.scorer, own, lr_scheduler=after, max_grad_norm=0.5)
    before = [param.detach().clone() for param in alone.scorer.parameters()]
    selector = Selector(
        alone.model, optimizer, alone.loss_fn, alone.target, given.select.keep, horizon,
        lr_scheduler=schedule, seed=given.seed, scorer=beside,
    )  # fmt: skip
    scores = []
    for batch in islice(selector.stream(alone.pools), given.steps):
        scores += selector.last.scores.tolist()
        optimizer.zero_grad()
        alone.loss_fn(alone.model, batch).mean().backward()
        optimizer.step()
        schedule.step()
    newest = Checkpoints(run_dir / "checkpoints").newest()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(newest["model"][name], value)
    for name, value in alone.scorer.state_dict().items():
        assert torch.equal(newest["selector"]["scorer"]["model"][name], value)
    is_as_before = all(map(torch.equal, alone.scorer.parameters(), before))
    assert is_as_before == (scorer is FROZEN)
    assert read_ledger(run_dir)["score"].to_pylist() == scores


@pytest.mark.parametrize("at", [11, 21])  # training losses, also the scorer's: before and after
@pytest.mark.parametrize(
    ("scorer", "select"),
    [
        (TRAINED, {"horizon": 0}),
        (TRAINED, {"horizon": 2, "pools_per_update": 2}),
        (TRAINED, {"horizon": "auto", "lr": "auto"}),
        (FROZEN, {"horizon": 0}),
    ],
    ids=["trained", "ahead", "auto", "frozen"],
)
def test_a_killed_run_resumes_to_the_same_end(digits, tmp_path, monkeypatch, scorer, select, at):
    checked_at(monkeypatch, 7, 8)  # while pools are peeked at, and again later
    train(made(tmp_path, scorer, name="whole", select=select), scored(digits))
    killed = made(tmp_path, scorer, name="killed", select=select)
    with pytest.raises(Killed):
        train(killed, killed_at(at, scored(digits)))
    train(killed, scored(digits))
    whole = outcome(tmp_path / "whole")
    assert_same(whole, outcome(tmp_path / "killed"))
    assert sum(metrics.SCORER_GAIN in line for line in whole[2]) == 2 * (
        select["horizon"] != "auto"
    )
    first, second = (
        Checkpoints(tmp_path / name / "checkpoints").newest()["selector"]["scorer"]["model"]
        for name in ("whole", "killed")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_its_loss_and_what_it_is_worth_are_metrics(digits, tmp_path, monkeypatch):
    checked_at(monkeypatch, 3, 40)
    lines = read_lines(train(made(tmp_path), scored(digits)) / "metrics.jsonl")
    assert all(line[metrics.SCORER_LOSS] > 0 for line in lines[1:])
    assert [metrics.SCORER_GAIN in line for line in lines[1:]] == [
        True,
        *[False] * (len(lines) - 2),
    ]
    assert -1 <= lines[1][metrics.SCORER_GAIN] <= 1
    frozen = train(made(tmp_path, FROZEN, name="frozen", select={"horizon": 0}), scored(digits))
    lines = read_lines(frozen / "metrics.jsonl")
    assert not any(metrics.SCORER_LOSS in line for line in lines)
    assert metrics.SCORER_GAIN in lines[1]


def test_a_task_without_one_is_refused(digits, tmp_path):
    with pytest.raises(RunError, match="scorer must be null for a task that has none"):
        train(made(tmp_path), task(digits))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["select.replay=runs/x"], "scorer must be null when select.replay is given"),
        (["select.horizon=.inf"], "scorer must be null when select.horizon is .inf"),
        (
            ["scorer.optimizer=null"],
            "select.horizon must be 0 when scorer.optimizer is null, got 1",
        ),
        (
            ["scorer.optimizer=null", "select.horizon=auto"],
            "select.largest_horizon must be 0 when scorer.optimizer is null, got 8",
        ),
    ],
)
def test_where_it_can_do_nothing_it_is_refused(overrides, message):
    given = ["select.horizon=1", "scorer={}", *overrides]
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs/digits_online.yaml", given)


@pytest.mark.parametrize("horizon", ["0", "auto"])
def test_a_frozen_one_scores_at_horizon_0_and_in_contests(horizon):
    given = ["scorer.optimizer=null", f"select.horizon={horizon}", "select.largest_horizon=0"]
    assert load(ROOT / "configs/digits_online.yaml", given).scorer.optimizer is None


# --- the trainers ---------------------------------------------------------------------------------


def built(trainer, name, tmp_path, *overrides):
    given = load(ROOT / f"configs/{name}.yaml", [f"root={tmp_path}", *overrides])
    return runpy.run_path(str(ROOT / f"trainers/{trainer}.py"))["build_task"](given)


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where data are written
    return tmp_path


def test_images_may_be_scored_at_a_lower_resolution(cwd):
    scorer = "scorer={downscale: 2, model: {hidden: [4]}}"
    found = built("vision", "digits_online", cwd, scorer, "model.hidden=[6]")
    batch = found.target[0]
    image = found.scorer_view(batch)["image"]
    assert torch.equal(image[..., 0, 0], batch["image"][..., :2, :2].mean((-1, -2)))
    assert found.loss_fn(found.scorer, found.scorer_view(batch)).shape == batch["label"].shape
    assert next(found.scorer.parameters()).shape[-1] == 16
    with pytest.raises(ConfigError, match=r"must divide the images' height and width, \(8, 8\)"):
        built("vision", "digits_online", cwd, "scorer={downscale: 3}")
    with pytest.raises(ConfigError, match=r"scorer\.model\.name must be one of mlp, cnn, resnet18"):
        built("vision", "digits_online", cwd, "scorer={model: {name: gpt2}}")
    with pytest.raises(ConfigError, match=r"num_classes must be those of the model, 10, got 3"):
        built("vision", "digits_online", cwd, "scorer={model: {num_classes: 3}}")


def test_a_scorer_leaves_the_trained_model_as_it_is(cwd):
    plain = built("vision", "digits_online", cwd)
    found = built("vision", "digits_online", cwd, "scorer={}")
    assert plain.scorer is None
    for one, other in zip(plain.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(one, other)


TINY = ["data.text.block=16", "data.text.num_train=400", "data.text.num_target=32",
        "data.text.num_test=16", "model.width=16", "model.layers=1", "model.heads=2"]  # fmt: skip


def test_a_smaller_language_model_scores_for_adapters(cwd):
    pytest.importorskip("peft")
    scorer = "scorer={model: {name: gpt2, layers: 1, width: 8, heads: 2}}"
    found = built("language", "text_online", cwd, *TINY, scorer, "model.lora_rank=2")
    batch = to_device(found.target[0], torch.device("cpu"))
    small = sum(param.numel() for param in found.scorer.parameters())
    assert small < sum(param.numel() for param in found.model.parameters())
    optimizer = torch.optim.AdamW([p for p in found.model.parameters() if p.requires_grad], 1e-3)
    scorer = Scorer(found.scorer, torch.optim.AdamW(found.scorer.parameters(), 1e-3))
    selector = Selector(found.model, optimizer, found.loss_fn, [batch], 4, 0, scorer=scorer)
    kept = selector.select(next(iter(found.pools)))
    assert len(kept["key"]) == 4
    assert selector.last.scorer_loss > 0
    with pytest.raises(ConfigError, match=r"scorer\.downscale must be 1 for text"):
        built("language", "text_online", cwd, *TINY, "scorer={downscale: 2, model: {name: gpt2}}")
    with pytest.raises(ConfigError, match=r"scorer\.model\.name must be one of gpt2, llama"):
        built("language", "text_online", cwd, *TINY, "scorer={}")


def test_text_is_scored_by_a_smaller_model_and_resumed(tmp_path, data):
    """Adapters of a Llama train; a GPT-2 of its own reads the same tokens, and learns whole."""
    scorer = {"model": KINDS["gpt2"] | {"width": 8}, "optimizer": {"lr": 1e-2}}
    whole, killed = (
        configured(tmp_path / name, data, KINDS["llama"], scorer=scorer)
        for name in ("whole", "killed")
    )
    made = TRAINER["build_task"](whole)
    before = {name: value.clone() for name, value in made.scorer.state_dict().items()}
    train(whole, made)
    with pytest.raises(Killed):
        train(killed, killed_at(9, TRAINER["build_task"](killed)))
    train(killed, TRAINER["build_task"](killed))
    assert_same(outcome(whole.run_dir), outcome(killed.run_dir))
    saved = Checkpoints(whole.run_dir / "checkpoints").newest()["selector"]["scorer"]["model"]
    assert any(not torch.equal(value, before[name]) for name, value in saved.items())
    base = {n: p for n, p in made.model.named_parameters() if not p.requires_grad}
    again = dict(TRAINER["build_task"](whole).model.named_parameters())
    assert all(torch.equal(param, again[name]) for name, param in base.items())
