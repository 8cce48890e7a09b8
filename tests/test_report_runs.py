"""Runs read from their directories, and the values of their metrics."""

import pytest
from synthetic_runs import make_run

from selectflow.report.runs import (
    ReportError,
    Run,
    common_end,
    end,
    find_runs,
    first_reach,
    load_run,
    series,
    total,
    value_at,
    wandb_path,
)
from selectflow.run.directory import lock
from selectflow.run.log import Tracker


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
