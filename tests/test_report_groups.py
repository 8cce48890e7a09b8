"""Runs grouped by strategy: labels, what divides a group, and what is refused."""

import math

import pytest
from synthetic_runs import make_run

from selectflow.report.groups import differences, groups, label, strategy
from selectflow.report.runs import ReportError, Run, load_runs


def test_a_label_says_what_decides_the_result():
    def of(**select: object) -> str:
        return label(Run("a", {"select": select}, []))

    assert of(strategy="influence", horizon=4, interval=8) == "online H=4 K=8"
    assert of(strategy="uniform", horizon=4, interval=8) == "uniform"
    assert of(strategy="loss", horizon=1, interval=1) == "loss"
    assert of(strategy="influence", horizon="auto", interval=2) == "adaptive"
    linear = {"name": "linear", "final": 0}
    changing = of(strategy="influence", horizon=4, interval=1, horizon_schedule=linear)
    assert changing == "online H=4 (linear) K=1"


def test_a_replay_says_whose_choices_it_trains_on(tmp_path):
    first = make_run(tmp_path / "first", [0.5])
    again = {"strategy": "influence", "horizon": 1, "replay": str(first.folder)}
    assert label(make_run(tmp_path / "again", [0.5], select=again)) == "replay of online H=1 K=1"
    gone = again | {"replay": str(tmp_path / "gone")}
    assert label(make_run(tmp_path / "other", [0.5], select=gone)) == "replay"


@pytest.mark.parametrize("horizon", [math.inf, "Infinity"])  # from YAML, and from W&B
def test_an_infinite_horizon_is_offline(horizon):
    assert strategy(Run("a", {"select": {"strategy": "influence", "horizon": horizon}}, [])) == (
        "offline"
    )


def test_an_option_that_differs_within_a_label_divides_the_group(tmp_path):
    runs = [
        make_run(tmp_path / "a0", [0.1], seed=0, optimizer={"lr": 1e-3}),
        make_run(tmp_path / "a1", [0.2], seed=1, optimizer={"lr": 1e-3}),
        make_run(tmp_path / "b0", [0.3], seed=0, optimizer={"lr": 3e-3}),
        make_run(tmp_path / "c0", [0.4], seed=0, strategy="loss", optimizer={"lr": 3e-3}),
    ]
    found = groups(runs)
    assert {name: [run.folder.name for run in members] for name, members in found.items()} == {
        "online H=1 K=1 lr=0.001": ["a0", "a1"],
        "online H=1 K=1 lr=0.003": ["b0"],
        "loss": ["c0"],
    }
    assert differences(found) == [
        "groups differ in optimizer.lr: 0.001 in online H=1 K=1 lr=0.001; "
        "0.003 in online H=1 K=1 lr=0.003, loss"
    ]


def test_what_a_run_does_not_use_does_not_divide_its_group(tmp_path):
    for seed, horizon in enumerate((0, 4)):
        more = {"steps": 100 * (1 + seed), "eval_every": 1 + seed, "data": {"seed": seed}}
        make_run(
            tmp_path / f"u{seed}", [0.1], strategy="uniform", horizon=horizon, seed=seed, **more
        )
    runs = load_runs([str(tmp_path / "u*")])
    assert list(groups(runs)) == ["uniform"]
    for run in runs:  # the length matters where the learning rate depends on it
        run.config["schedule"] = {"name": "cosine"}
    assert list(groups(runs)) == ["uniform steps=100", "uniform steps=200"]


def test_a_seed_counted_twice_is_refused(tmp_path):
    runs = [make_run(tmp_path / name, [0.1], seed=3) for name in ("a", "again")]
    with pytest.raises(ReportError, match=r"must differ in their seeds, got seed 3 twice.*again"):
        groups(runs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"data": {"name": "digits", "label_noise": 0.0}},
            r"data\.label_noise 0\.4 .* and 0\.0",
        ),
        ({"model": {"name": "cnn"}}, r"model\.name 'mlp' in .*one and 'cnn' in .*other"),
        ({"target": {"size": 100}}, r"target\.size 200 in .* and 100 in"),
    ],
)
def test_runs_of_different_tasks_are_refused_with_the_difference(tmp_path, change, named):
    task = {"model": {"name": "mlp"}, "target": {"size": 200}}
    one = make_run(tmp_path / "one", [0.1], **task)
    other = make_run(tmp_path / "other", [0.1], **(task | change))
    with pytest.raises(ReportError, match=named):
        groups([one, other])


def test_other_shards_are_another_task(tmp_path):
    roots = [{"name": "shards", "root": str(tmp_path / name)} for name in "ab"]
    runs = [make_run(tmp_path / root["root"][-1], [0.1], data=root) for root in roots]
    with pytest.raises(ReportError, match=r"one task, got data\.shards '.*/a' in"):
        groups(runs)
