"""The error budget: its arithmetic, its configuration, and the command that makes it."""

import csv
import json
import math

import pytest
import scipy.stats
import torch

from selectflow.audit import budget
from selectflow.audit.budget import read_results, run_audit, spearman
from selectflow.audit.influence import influence, leave_one_out
from selectflow.audit.problems import AuditedRun
from selectflow.audit.reruns import SparseTrajectory
from selectflow.audit.study import AuditConfig, CNNModel, MLPModel, load_audit
from selectflow.cli import main
from selectflow.fields import ConfigError
from selectflow.models.vision import image_losses, mlp

SMALL = AuditConfig(
    name="small",
    model=MLPModel(hidden=(8,), activation="gelu"),
    seeds=2,
    lrs=(1e-3,),
    horizons=(2,),
    steps=12,
    batch=8,
    num_queries=6,
    num_pairs=24,
)


def test_spearman_is_that_of_scipy():
    torch.manual_seed(0)
    scores = torch.randn(40, 3)
    truth = (scores + torch.randn(40, 3)).round()  # with ties
    expected = [scipy.stats.spearmanr(scores[:, q], truth[:, q]).statistic for q in range(3)]
    assert spearman(scores, truth) == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_faithful_influence_ranks_as_retraining_does_and_sgd_does_not():
    """A smooth model: what exact misses is its own update's nonlinearity, sgd misses more."""
    trajectory, queries = AuditedRun(SMALL, 0).record(1e-3), AuditedRun(SMALL, 0).queries()
    pairs = [(step, position) for step in range(2, 12) for position in range(8)]
    truth = leave_one_out(trajectory, queries, pairs)

    def rank(**options):
        return spearman(influence(trajectory, queries, pairs, **options), truth)

    assert rank(own_update="exact") > 0.99
    assert rank() > 0.95
    assert rank(method="sgd") < 0.93


@pytest.mark.parametrize("model", [SMALL.model, CNNModel(width=2)], ids=["mlp", "cnn"])
def test_precisions_train_the_same_model_on_the_same_data(model):
    config = SMALL.model_copy(update={"model": model})
    exact = AuditedRun(config, 1).record(1e-3).state(12).params
    single = AuditedRun(config, 1, torch.float32).record(1e-3).state(12).params
    assert max(float((exact[n] - single[n]).abs().max()) for n in exact) < 1e-5
    other = AuditedRun(config, 2).record(1e-3).state(12).params
    assert max(float((exact[n] - other[n]).abs().max()) for n in exact) > 1e-2


@pytest.mark.parametrize("hold", [False, True])
def test_sparse_states_are_exact_at_snapshots_and_guessed_between(hold):
    run = AuditedRun(SMALL, 0)
    dense, sparse = run.record(1e-3), SparseTrajectory.of(run.record(1e-3, 4), hold)
    for index in range(13):
        guess, state = sparse.guess(index), dense.state(index)
        gap = (guess.params - state.params).norm()
        assert gap < 1e-12 if index % 4 == 0 else 0 < gap < 0.1
        if hold:
            held = dense.state(index - index % 4)
            assert (guess.exp_avg - held.exp_avg).norm() < 1e-12
    middle = (dense.state(4).params + dense.state(8).params) / 2
    assert (sparse.guess(6).params - middle).norm() < 1e-12
    pairs, queries = [(5, 0), (9, 3)], run.queries()
    exact, guessed = influence(dense, queries, pairs), influence(sparse, queries, pairs)
    assert (exact - guessed).norm() / exact.norm() > 1e-3


def test_the_command_writes_the_budget(tmp_path, capsys):
    path = tmp_path / "audit.yaml"
    path.write_text("name: trial\nmodel: {hidden: [8]}\nlrs: [1e-3]\nhorizons: [2]\n")
    small = ["steps=8", "batch=8", "num_queries=4", "num_pairs=12", "seeds=2"]
    small.append("model.activation=gelu")
    assert main(["audit", str(path), *small, f"root={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "adamw/exact" in printed
    assert "measured lr 0.001, seed 1" in printed
    folder = tmp_path / "trial"
    content = json.loads((folder / "audit.json").read_text())
    assert content["config"]["steps"] == 8
    rows = content["results"]
    with (folder / "audit.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    at = {(row["row"], row["horizon"], row["seed"]): row for row in rows}
    assert {row["level"] for row in rows} == {"cost", "config", "algorithm", "system"}
    assert at["training", "inf", 0]["spearman"] is None
    for seed in (0, 1):
        assert at["float32", "inf", seed]["spearman"] == pytest.approx(
            at["adamw/exact", "inf", seed]["spearman"], abs=0.05
        )
        ours, sgd = at["adamw/exact", 2, seed], at["sgd", 2, seed]
        assert ours["relative_error"] < sgd["relative_error"]
    assert (folder / "scatter.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "spearman.png").read_bytes()[:4] == b"\x89PNG"


def test_an_audit_goes_on_behind_the_runs_that_it_holds(tmp_path):
    config = SMALL.model_copy(update={"root": tmp_path, "seeds": 1, "horizons": ()})
    said = []
    folder = run_audit(config, said.append)
    first = json.loads((folder / "audit.json").read_text())["results"]
    scatter = (folder / "scatter.png").stat().st_mtime_ns
    run_audit(config.model_copy(update={"seeds": 2}), said.append)
    content = json.loads((folder / "audit.json").read_text())
    assert said == [
        "measured lr 0.001, seed 0",
        "found lr 0.001, seed 0",
        "measured lr 0.001, seed 1",
    ]
    assert content["results"][: len(first)] == first  # seconds among them: not measured again
    assert {row["seed"] for row in content["results"]} == {0, 1}
    assert content["config"]["seeds"] == 2
    assert (folder / "scatter.png").stat().st_mtime_ns == scatter
    with pytest.raises(
        ConfigError, match=r"got steps 12, here 10; give another name, or overwrite"
    ):
        run_audit(config.model_copy(update={"steps": 10}))
    fresh = config.model_copy(update={"steps": 10, "overwrite": True})
    run_audit(fresh)
    assert json.loads((folder / "audit.json").read_text())["config"]["steps"] == 10


def test_a_killed_audit_loses_only_the_run_it_was_in(tmp_path, monkeypatch):
    config = SMALL.model_copy(update={"root": tmp_path, "horizons": ()})
    measure = budget.measure_budget

    def killed(run, lr):
        if run.seed == 1:
            raise KeyboardInterrupt
        return measure(run, lr)

    monkeypatch.setattr(budget, "measure_budget", killed)
    with pytest.raises(KeyboardInterrupt):
        run_audit(config)
    assert {r.seed for r in read_results(config)} == {0}


def test_more_examples_than_there_are(tmp_path):
    config = SMALL.model_copy(update={"root": tmp_path, "steps": 200, "warm_steps": 30})
    with pytest.raises(ConfigError, match=r"num_queries \+ \(steps \+ warm_steps\) .* got 1846"):
        run_audit(config)


def test_steps_before_the_recording_are_plain_training_on_other_examples():
    """The start of the recording is what a plain loop makes of the same examples."""
    config = SMALL.model_copy(update={"warm_steps": 3, "warm_lr": 1e-2})
    run = AuditedRun(config, 1, torch.float32)
    torch.manual_seed(1)
    model = mlp(64, 10, (8,), "gelu")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, (0.9, 0.95), 1e-8, 0.01)
    for step in range(12, 15):
        optimizer.zero_grad()
        image_losses(model, run.batch(step)).mean().backward()
        optimizer.step()
    start = run.record(1e-3).state(0)
    for name, param in model.named_parameters():
        assert torch.equal(start.params[name], param)
    assert not any(moment.any() for moment in start.exp_avg.values())
    seen = torch.cat([run.queries()["image"], *(run.batch(i)["image"] for i in range(15))])
    assert len(seen.flatten(1).unique(dim=0)) == len(seen) == 6 + 15 * 8


def test_everything_wrong_in_a_configuration_is_reported(tmp_path):
    path = tmp_path / "audit.yaml"
    path.write_text("name: trial\nmodel: {kind: cnn, widht: 3}\nseed: 3\nlrs: []\n")
    with pytest.raises(ConfigError) as caught:
        load_audit(path, ["batch=1", "spcing=2", "model.width=0", "model.hiden=[3]"])
    message = str(caught.value)
    for line in (
        "model.widht must be a known key, got 3; did you mean model.width?",
        "model.width must be an integer >= 1, got 0",
        "model.hiden must be a known key, got '[3]'; did you mean model.hidden?",
        "seed must be a known key, got 3; did you mean seeds?",
        "spcing must be a known key, got '2'; did you mean spacing?",
        "batch must be greater than or equal to 2, got 1",
        "lrs must be",
    ):
        assert line in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.kind=cmn"], r"model.kind must be one of mlp, cnn, gpt2, llama, got 'cmn'"),
        (["model=cnn"], r"model must be a mapping"),
        (["model.kind=gpt2", "model.hidden=[3]"], r"model.hidden must be a known key, got \[3\]"),
        (
            ["model.kind=gpt2", "model.pretrained=gpt2", "model.shape=124m"],
            r"model.shape must be left out with model.pretrained, got '124m'",
        ),
        (["steps=8"], r"horizons must be <= steps \(8\), got 16"),
    ],
)
def test_fields_that_disagree(tmp_path, overrides, message):
    path = tmp_path / "audit.yaml"
    path.write_text("name: trial\n")
    with pytest.raises(ConfigError, match=message):
        load_audit(path, overrides)


@pytest.mark.parametrize("name", ["audit_mlp", "audit_cnn", "audit_gpt2", "audit_llama"])
def test_shipped_configurations_load(name, request):
    config = load_audit(request.config.rootpath / "configs" / f"{name}.yaml")
    assert config.name == name
    assert config.seeds >= 3
    assert math.inf not in config.horizons
