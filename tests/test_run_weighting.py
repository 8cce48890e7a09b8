"""Weighted runs: what they train, report, resume and replay, and where weights are refused."""

from itertools import islice

import pytest
import torch
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import config, digits, read_lines, task
from torch import nn

from selectflow import Selector
from selectflow.core.batches import as_one, weighted
from selectflow.fields import ConfigError
from selectflow.integrations.huggingface import SelectTrainerMixin
from selectflow.integrations.lightning import SelectCallback
from selectflow.options import refuse_weights
from selectflow.run import metrics
from selectflow.run.build import build_optimizer, update
from selectflow.run.config import load
from selectflow.run.directory import Checkpoints
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import train

__all__ = ["digits"]  # the fixture

WEIGHTED = {"keep": 1.0, "horizon": 0, "weighting": "relu"}


def test_a_run_is_the_loop_that_one_would_write(digits, tmp_path):
    given = config(tmp_path, select=WEIGHTED, eval_every=1)
    run_dir, alone = train(given, task(digits)), task(digits)
    altered, wrong = alone.kinds["altered"], []
    optimizer = build_optimizer(alone.model, given.optimizer)
    selector = Selector(
        alone.model, optimizer, alone.loss_fn, alone.target, 1.0, 0, seed=given.seed,
        weighting="relu",
    )  # fmt: skip
    found = []
    for batch in islice(selector.stream(alone.pools), given.steps):
        weights = selector.last.weights
        found.append(weights)
        is_altered = torch.tensor([key in altered for key in batch["key"]])
        wrong.append(float(weights[is_altered].sum() / len(weights)))
        optimizer.zero_grad()
        (weights * alone.loss_fn(alone.model, batch)).mean().backward()
        optimizer.step()
    newest = Checkpoints(run_dir / "checkpoints").newest()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(newest["model"][name], value)
    lines = read_lines(run_dir / "metrics.jsonl")[1:]
    assert max(wrong) > 0
    for line, weights, share in zip(lines, found, wrong, strict=True):
        assert line[metrics.kept_share("altered")] == pytest.approx(share)
        assert line[metrics.POSITIVE_WEIGHTS] == (weights > 0).double().mean()
        size = float(weights.sum() ** 2 / (weights**2).sum())
        assert line[metrics.EFFECTIVE_SIZE] == pytest.approx(size)
        assert 1 <= size < 32


def test_accumulated_parts_have_their_own_weights(digits):
    """In micro-batches a step is that of the whole, in float64."""
    ends = []
    for accumulate in (1, 3):
        made = task(digits)
        model = made.model.double()
        pools = [pool | {"image": pool["image"].double()} for pool in islice(made.pools, 2)]
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        target = [batch | {"image": batch["image"].double()} for batch in made.target]
        selector = Selector(
            model, optimizer, made.loss_fn, target, 8, 0, weighting="relu", pools_per_update=2
        )
        batch = as_one([weighted(selector.select(pool), selector.last.weights) for pool in pools])

        def losses(batch, model=model, made=made):
            return made.loss_fn(model, batch)

        update(model, losses, batch, optimizer, 0, accumulate=accumulate)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "select", [{}, {"keep": 8, "horizon": 1, "lr": "auto", "pools_per_update": 2}]
)
def test_a_killed_run_resumes_to_the_same_end(digits, tmp_path, select):
    select = WEIGHTED | {"keep": 8} | select
    train(config(tmp_path, name="whole", select=select, **OPTIONS), task(digits))
    killed = config(tmp_path, name="killed", select=select, **OPTIONS)
    with pytest.raises(Killed):
        train(killed, killed_at(14, task(digits)))
    train(killed, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_a_replay_trains_with_the_weights_of_the_run(digits, tmp_path, monkeypatch):
    options = {"steps": 12, "eval_every": 5}
    train(config(tmp_path, name="recorded", select=WEIGHTED, **options), task(digits))
    monkeypatch.setattr(Selector, "select", None)  # nothing may be scored
    replay = {"replay": tmp_path / "recorded"}
    run_dir = train(config(tmp_path, name="again", select=replay, **options), task(digits))
    first, second = outcome(tmp_path / "recorded"), outcome(run_dir)
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    columns = ["step", "key", "score", "kept"]
    assert read_ledger(run_dir, columns).equals(read_ledger(tmp_path / "recorded", columns))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("select.strategy=el2n", r"select\.strategy must be one of influence"),
        ("select.scope=global", r"select\.scope must be local when weighting is relu"),
        ("select.nominal=policy", r"select\.nominal must be random when weighting is relu"),
        ("select.horizon=.inf", r"select\.weighting must be none when select\.horizon is \.inf"),
    ],
)
def test_what_cannot_be_weighted_is_refused(tmp_path, override, says):
    path = tmp_path / "config.yaml"
    path.write_text("name: trial\nselect: {weighting: relu}\n")
    with pytest.raises(ConfigError, match=says):
        load(path, [override])


def test_trainers_whose_loss_has_no_weights_are_refused():
    refuse_weights({}, "the Trainer")
    refuse_weights({"weighting": "none"}, "the Trainer")
    says = "weighting must be 'none' in {}, whose loss has no weights .*, got 'relu'; train in your"
    with pytest.raises(ValueError, match=says.format("Lightning")):
        SelectCallback(None, target=[], keep=4, weighting="relu")
    with pytest.raises(ValueError, match=says.format("the Trainer")):
        SelectTrainerMixin(target=[], keep=4, select_options={"weighting": "relu"})
