"""W&B offline: axes, samples, artifacts and comparisons, read back by W&B's own reader."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow.parquet import read_table
from synthetic_runs import make_run
from wandb_log import offline_records

from selectflow.cli import main
from selectflow.report import runs
from selectflow.report.groups import label
from selectflow.report.runs import ReportError, fetch_run, series
from selectflow.run.log import Tracker
from selectflow.run.wandb import RemoteRun

ROOT = Path(__file__).parents[1]


def history(records):
    """Logged values by name, in order."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def artifacts(records):
    """Paths inside each artifact, by its type."""
    found = {}
    for record in records:
        if record["type"] == "artifact":
            artifact = record["artifact"]
            contents = artifact["manifest"]["contents"]
            found[artifact["type"]] = sorted(entry["path"] for entry in contents)
    return found


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory):
    """A short run of the vision trainer with offline selection, tracked by W&B offline."""
    root = tmp_path_factory.mktemp("run")
    options = {
        "root": root, "name": "a", "steps": 8, "eval_every": 4, "data.root": root / "data",
        "select.horizon": ".inf", "select.record_steps": 6, "num_threads": 1,
        "track.wandb": "offline", "track.group": "digits", "track.tags": "[short]",
    }  # fmt: skip
    trainer = runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"]
    overrides = [f"{key}={value}" for key, value in options.items()]
    assert trainer([str(ROOT / "configs" / "digits_offline.yaml"), *overrides]) == 0
    return root / "a", offline_records(root / "a")


def test_evaluations_are_drawn_over_steps_samples_and_seconds(offline_run):
    run_dir, records = offline_run
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    axes = {
        record["metric"]["name"]: record["metric"].get("step_metric")
        for record in records
        if record["type"] == "metric" and "name" in record["metric"]
    }
    for prefix, axis in {"by_samples": "data/samples_seen", "by_seconds": "perf/wall_s"}.items():
        assert axes[f"{prefix}/test/loss"] == axis
        logged = [
            (row[axis], row[f"{prefix}/test/loss"])
            for row in history(records)
            if f"{prefix}/test/loss" in row
        ]
        assert logged == [(line[axis], line["test/loss"]) for line in lines if axis in line]
        assert len(logged) >= 2


def test_the_highest_and_lowest_samples_are_media(offline_run):
    run_dir, records = offline_run
    scores = read_table(run_dir / "selected" / "scores.parquet").to_pydict()
    (logged,) = [row for row in history(records) if "samples/highest.captions" in row]
    assert len(logged["samples/highest.captions"]) == len(logged["samples/highest.filenames"]) == 16
    media = next(run_dir.glob("wandb/offline-run-*/files"))
    for end in ("highest", "lowest"):
        for name in logged[f"samples/{end}.filenames"]:
            assert (media / name).read_bytes().startswith(b"\x89PNG")
    (table,) = media.glob("media/table/samples/*.json")
    content = json.loads(table.read_text())
    keys = [row[content["columns"].index("key")] for row in content["data"]]
    assert keys[:16] == scores["key"][:16]  # best first, as the file has them
    assert set(keys[16:]) == set(scores["key"][-16:])


def test_ledger_and_manifest_are_artifacts(offline_run):
    run_dir, records = offline_run
    found = artifacts(records)
    assert found["ledger"] == [path.name for path in (run_dir / "selection").iterdir()]
    assert found["selected-shards"] == ["manifest.json", "offline.json", "scores.parquet"]
    # where W&B will upload them from
    for record in records:
        if record["type"] == "artifact" and record["artifact"]["type"] == "ledger":
            for entry in record["artifact"]["manifest"]["contents"]:
                assert Path(entry["local_path"]).is_file()


def test_a_run_that_is_to_be_resumed_sends_no_artifact(tmp_path):
    (tmp_path / "selection").mkdir()
    (tmp_path / "selection" / "part-00000001.parquet").write_bytes(b"half")
    tracker = Tracker(tmp_path, {}, name="a", mode="offline")
    tracker.log(1, {"test/loss": 1.0})
    tracker.finish({"status": "stopped by SIGTERM"})
    assert artifacts(offline_records(tmp_path)) == {}


def test_samples_are_not_asked_for_without_wandb(tmp_path):
    def fail():
        raise AssertionError

    Tracker(tmp_path, {}, name="a").show(fail)


def test_a_comparison_is_a_run_with_tables_charts_and_files(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path / f"i{seed}", [0.5, 0.75], seed=seed, track={"group": "digits"})
        options = {"strategy": "uniform", "seed": seed, "track": {"group": "digits"}}
        make_run(tmp_path / f"u{seed}", [0.25, 0.5, 0.5], **options)
    out = tmp_path / "out"
    assert main(["compare", str(tmp_path / "[iu]*"), "--out", str(out), "--wandb", "offline"]) == 0
    records = offline_records(out)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["job_type"], run["run_group"], run["tags"]) == ("compare", "digits", ["compare"])
    assert run["run_id"] in capsys.readouterr().out
    assert artifacts(records)["comparison"][:2] == ["compare.csv", "compare.html"]
    (logged,) = history(records)
    files = next(out.glob("wandb/offline-run-*/files"))
    table = json.loads((files / logged["summary.path"]).read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert rows["online H=1 K=1"]["quality_mean"] == 0.75
    assert rows["online H=1 K=1"]["at_equal_steps_mean"] == 0.25
    summary = {}
    for record in records:
        summary |= record["summary"]["update"] if record["type"] == "summary" else {}
    assert summary["uniform/quality_mean"] == 0.5
    (chart,) = (files / "media" / "table" / "over_wall_s").glob("test_accuracy_table*.json")
    points = {(row[1], row[0], row[2]) for row in json.loads(chart.read_text())["data"]}
    assert ("online H=1 K=1", 2.0, 75.0) in points
    assert (files / logged["page.path"]).read_bytes() == (out / "compare.html").read_bytes()
    assert "pictures/compare.path" in logged


def test_a_downloaded_run_is_read_as_the_one_on_disk(tmp_path, monkeypatch):
    """Rows as W&B's scan_history returns them: every key in each, None where it was not logged."""
    local = make_run(tmp_path / "a", [0.5, 0.75])
    names = {name for line in local.metrics for name in line}
    rows = [{name: line.get(name) for name in names} | {"_step": 1} for line in local.metrics]
    rows.append(dict.fromkeys(names) | {"samples/highest": {"_type": "images"}})
    found = RemoteRun(local.config, rows, {"status": "finished"}, "finished")
    monkeypatch.setattr(runs, "download_run", lambda path: found)
    run = fetch_run("team/project/abc")
    assert (run.where, run.folder, run.status) == ("team/project/abc", None, "finished")
    assert series(run, "test/accuracy", "perf/wall_s") == [(1.0, 0.5), (2.0, 0.75)]
    assert label(run) == label(local)
    monkeypatch.setattr(runs, "download_run", lambda path: RemoteRun({}, [], {}, "running"))
    with pytest.raises(ReportError, match="has no train/step at W&B yet"):
        fetch_run("team/project/abc")


CLOSED = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(scope="module", autouse=True)
def remote_reads(tmp_path_factory):
    """The command on a W&B path, without key and without network, in processes of their own.

    Begun before the first test: they mostly wait, and the other tests need not wait with them.
    """
    processes = {}
    for cause, env in {"no key": {}, "no network": CLOSED}.items():
        home = tmp_path_factory.mktemp("home")
        inherited = {key: os.environ[key] for key in os.environ if not key.startswith("WANDB_")}
        inherited |= {"HOME": str(home), "NETRC": str(home / "netrc")}
        processes[cause] = subprocess.Popen(
            [sys.executable, "-m", "selectflow", "compare", "team/project/abc123"],
            env=inherited | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("no key", "got no key; set WANDB_API_KEY"),
        ("no network", "check the path, the key and the network"),
    ],
)
def test_a_path_at_wandb_without_key_or_network_is_an_error(remote_reads, cause, reason):
    process = remote_reads[cause]
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "team/project/abc123" in line
    assert reason in line
    assert "Traceback" not in err
