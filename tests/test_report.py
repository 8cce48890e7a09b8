"""Runs read from their directories, grouped and aligned."""

import math

import numpy as np
import pytest
from synthetic_runs import make_run

from selectflow.report.align import (
    binned,
    common_end,
    curve,
    end,
    first_reach,
    mean_curve,
    series,
    total,
    value_at,
)
from selectflow.report.groups import differences, groups, label, strategy
from selectflow.report.runs import ReportError, Run, find_runs, load_run, load_runs, wandb_path
from selectflow.run.directory import lock
from selectflow.run.tracker import Tracker


def test_a_run_is_read_back_as_it_was_tracked(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.75])
    assert (run.status, run.last_step, run.seed) == ("finished", 20, (0, 0))
    assert run.config["select"]["strategy"] == "influence"
    assert run.summary["test/accuracy"] == 0.75
    assert series(run, "test/accuracy") == [(10, 0.5), (20, 0.75)]
    assert series(run, "test/accuracy", over="perf/wall_s") == [(1.0, 0.5), (2.0, 0.75)]
    assert series(run, "train/loss") == []
    assert (end(run, "test/accuracy"), end(run, "train/loss")) == (0.75, None)


def test_the_status_says_how_a_run_ended(tmp_path):
    assert make_run(tmp_path / "a", [0.5], status="stopped by SIGTERM").status == "stopped"
    assert make_run(tmp_path / "b", [0.5], status="failed").status == "failed"
    assert make_run(tmp_path / "c", [0.5], status=None).status == "crashed"
    # a run holds its lock while it works, also one that was stopped before and goes on
    with lock(tmp_path / "a"):
        assert load_run(tmp_path / "a").status == "running"
    assert load_run(tmp_path / "a").status == "stopped"


def test_the_value_at_a_step_is_the_last_one_known_then(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.75, 0.25])
    found = [value_at(run, "test/accuracy", at) for at in (9, 10, 19.9, 20, 1000, None)]
    assert found == [None, 0.5, 0.5, 0.75, 0.25, None]
    assert value_at(run, "test/accuracy", 2.99, over="perf/wall_s") == 0.75


def test_a_loss_is_reached_at_the_first_evaluation_at_or_below_it(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.75, 0.25, 0.875])  # losses 0.5, 0.25, 0.75, 0.125
    assert first_reach(run, "test/loss", 0.25) == 20
    assert first_reach(run, "test/loss", 0.25, "perf/wall_s") == 2.0
    assert first_reach(run, "test/loss", 0.2) == 40
    assert first_reach(run, "test/loss", 0.1) is None


def test_null_values_are_not_known_values(tmp_path):
    run = make_run(tmp_path / "a", [0.5, float("nan")])
    assert end(run, "test/accuracy") == 0.5


def test_counts_begin_at_0_and_offline_scoring_is_counted():
    lines = [
        {"train/step": 0, "test/loss": 2.0},
        {"train/step": 5, "test/loss": 1.0, "data/samples_seen": 80, "data/samples_scored": 0},
    ]
    plain = Run("a", {}, lines)
    assert series(plain, "test/loss", "data/samples_seen") == [(0, 2.0), (80, 1.0)]
    offline = Run("a", {}, lines, offline={"samples_scored": 300})
    assert series(offline, "test/loss", "data/samples_scored") == [(300, 2.0), (300, 1.0)]
    assert (total(plain, "data/samples_scored"), total(offline, "data/samples_scored")) == (0, 300)
    # a run that stays at 0 does not say where the others are compared
    assert common_end([plain, offline], "data/samples_scored") == 300
    assert common_end([plain, offline], "data/tokens_seen") is None


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


def test_a_mean_line_interpolates_over_the_range_that_all_runs_cover():
    line = mean_curve([[(0, 0.0), (4, 0.4)], [(1, 0.5), (3, 0.7)]])
    assert line.x.tolist() == [1, 3]
    np.testing.assert_allclose(line.mean, [0.3, 0.5])
    np.testing.assert_allclose(line.sd, [0.4 / math.sqrt(2)] * 2)
    assert mean_curve([[(0, 0.0)], []]).x.size == 0
    assert mean_curve([[(x, 0.0) for x in range(999)]]).x.size == 200


def test_over_seconds_runs_are_averaged_at_equal_steps(tmp_path):
    # the second began after the first had ended: no second is common to both
    early = make_run(tmp_path / "a", [0.2, 0.4], step_s=0.1)
    late = make_run(tmp_path / "b", [0.6, 0.6], seed=1, step_s=0.3, upfront_s=10)
    line = curve([early, late], "test/accuracy", "perf/wall_s")
    np.testing.assert_allclose(line.x, [(1 + 13) / 2, (2 + 16) / 2])
    np.testing.assert_allclose(line.mean, [0.4, 0.5])
    np.testing.assert_allclose(line.sd, [0.4 / math.sqrt(2), 0.2 / math.sqrt(2)])
    assert curve([early, late], "test/accuracy", "data/tokens_seen").x.size == 0


def test_binning_averages_neighbours_and_keeps_their_mean():
    points = [(float(x), x % 2) for x in range(10)]
    assert binned(points, 5) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5), (8.5, 0.5)]
    assert binned(points, 100) == points
    assert binned([], 5) == []


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    make_run(tmp_path, [0.1, 0.2, 0.3], status=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 20, "test/accuracy": 0.9}\n')
        file.write('{"train/step": 25, "test/acc')  # still being written
    run = load_run(tmp_path)
    assert series(run, "test/accuracy") == [(10, 0.1), (20, 0.9)]
    assert end(run, "perf/wall_s") == 1.0


def test_a_resumed_run_says_so(tmp_path):
    first = Tracker(tmp_path, {}, name="a")
    first.log(10, {"test/loss": 2.0})
    saved = first.state_dict()
    first.log(20, {"test/loss": 1.5})  # lost with the process
    second = Tracker(tmp_path, {}, name="a")
    second.load_state_dict(saved)
    second.log(20, {"test/loss": 1.0})
    saved = second.state_dict()
    third = Tracker(tmp_path, {}, name="a")
    third.load_state_dict(saved)
    third.finish({"status": "finished"})
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    run = load_run(tmp_path)
    assert run.summary["resumed_at"] == [10, 20]
    assert series(run, "test/loss") == [(10, 2.0), (20, 1.0)]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"train/step": null}', '{"train/step": 3'])
def test_a_line_that_is_no_metrics_is_named(tmp_path, text):
    make_run(tmp_path, [0.1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 5 must be a JSON object with"):
        load_run(tmp_path)


def test_runs_are_found_by_path_and_glob_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        make_run(tmp_path / "runs" / name, [0.1])
    (tmp_path / "runs" / "notes").mkdir()
    assert [str(path) for path in find_runs(["runs/b", "runs/*"])] == ["runs/b", "runs/a"]


def test_a_path_at_wandb_is_told_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert wandb_path("team/project/abc123") == "team/project/abc123"
    assert wandb_path("runs/demo/a") is None  # mistyped, but here
    assert wandb_path("wandb:runs/demo/a") == "runs/demo/a"
    for local in ("runs", "runs/demo", "../runs/demo", "./runs/a", "runs/*/a", "/runs/demo/a"):
        assert wandb_path(local) is None
