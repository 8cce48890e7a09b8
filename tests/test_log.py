"""The run directory and W&B: what is written, what fails loudly and what must not."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from wandb_log import offline_records

from selectflow.control.rules import Decision
from selectflow.run.log import DecisionLog, Tracker, read_decisions


def lines(run_dir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_line_is_on_disk_when_log_returns(tmp_path):
    tracker = Tracker(tmp_path / "run", {}, name="a")
    tracker.log(1, {"train/loss": 0.5, "data/samples_seen": 16})
    tracker.log(2, {"train/loss": 0.25})
    assert lines(tmp_path / "run") == [
        {"train/step": 1, "train/loss": 0.5, "data/samples_seen": 16},
        {"train/step": 2, "train/loss": 0.25},
    ]
    assert tracker.run_id is None


def test_values_that_are_not_finite_are_named_as_json_can(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a")
    tracker.log(1, {"a": float("nan"), "b": float("inf"), "c": 1e-300})
    tracker.finish({"d": float("-inf"), "status": "finished"})
    assert lines(tmp_path) == [{"train/step": 1, "a": "NaN", "b": "Infinity", "c": 1e-300}]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["a"], summary["d"]) == ("NaN", "-Infinity")


def test_a_checkpoint_of_an_earlier_version_has_null_for_them(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a")
    tracker.log(1, {"a": 1.0})
    tracker.load_state_dict(tracker.state_dict() | {"last": {"train/step": 1, "a": None}})
    tracker.finish({"status": "finished"})
    assert json.loads((tmp_path / "summary.json").read_text())["a"] == "NaN"


def test_a_decision_keeps_measures_that_are_not_finite(tmp_path):
    log = DecisionLog(tmp_path)
    log.add(Decision("horizon", 1, 2, "why", {"relative_error": math.inf, "loss": 0.5}, 3))
    log.add(Decision("horizon", 2, 2, "why", {"trust_ratio": math.nan}, 4))
    first, second = read_decisions(tmp_path)
    assert first.measures == {"relative_error": math.inf, "loss": 0.5}
    assert math.isnan(second.measures["trust_ratio"])
    assert "relative_error" not in second.measures  # not measured
    assert log.measured["select/relative_error"] == math.inf


def test_a_metric_that_is_no_number_is_named(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a")
    with pytest.raises(TypeError, match=r"metric train/loss must be a number, got 'high'"):
        tracker.log(1, {"train/loss": "high"})  # type: ignore[dict-item]


def test_summary_has_the_last_value_of_every_metric(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a")
    tracker.log(10, {"test/accuracy": 0.5, "train/loss": 2.0})
    tracker.log(20, {"train/loss": 1.0})
    tracker.finish({"status": "finished", "steps": 20})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "train/step": 20,
        "test/accuracy": 0.5,
        "train/loss": 1.0,
        "status": "finished",
        "steps": 20,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]


def test_continuing_keeps_whole_lines_and_drops_a_torn_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"train/step": 2, "train/lo')
    Tracker(tmp_path, {}, name="a").log(2, {"train/loss": 1.0})
    assert lines(tmp_path) == [{"train/step": 1}, {"train/step": 2, "train/loss": 1.0}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_raises_and_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / f".summary.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    tracker = Tracker(tmp_path, {}, name="a")
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        tracker.log(1, {"train/loss": 1.0})
    with pytest.raises(OSError, match=r"No space left on device.*summary\.json"):
        tracker.finish({})
    assert not (tmp_path / "summary.json").exists()


def test_wandb_offline_holds_what_was_logged(tmp_path, capfd):
    tracker = Tracker(
        tmp_path,
        {"select": {"horizon": 2}, "seed": 3},
        name="digits-s3",
        mode="offline",
        project="project",
        group="digits",
        job_type="influence",
        tags=["noise", "mlp"],
    )
    tracker.log(50, {"test/accuracy": 0.5, "train/loss": float("nan")})
    tracker.log(100, {"test/accuracy": 0.75})
    tracker.finish({"status": "finished", "steps": 100})
    assert capfd.readouterr() == ("", "")
    records = offline_records(tmp_path)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_id"], run["display_name"]) == (tracker.run_id, "digits-s3")
    assert (run["project"], run["run_group"], run["job_type"]) == ("project", "digits", "influence")
    assert run["tags"] == ["noise", "mlp"]
    assert run["config"]["update"] | {"_wandb": {}} == {
        "select": {"horizon": 2},
        "seed": 3,
        "_wandb": {},
    }
    axis = next(record["metric"] for record in records if "glob_name" in record.get("metric", {}))
    assert (axis["glob_name"], axis["step_metric"]) == ("*", "train/step")
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    logged = [{key: row[key] for key in row if not key.startswith("_")} for row in history]
    assert logged == [
        {"train/step": 50, "test/accuracy": 0.5, "train/loss": "NaN"},
        {"train/step": 100, "test/accuracy": 0.75},
    ]
    summary = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert any(update.get("status") == "finished" for update in summary)


def test_wandb_continues_under_the_id_it_is_given(tmp_path):
    Tracker(tmp_path, {}, name="a", mode="offline", run_id="abcd1234").finish({})
    run = next(record["run"] for record in offline_records(tmp_path) if record["type"] == "run")
    assert run["run_id"] == "abcd1234"


def test_wandb_that_fails_later_is_switched_off_with_one_warning(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a", mode="offline")
    tracker._sinks.open["W&B"][1].finish()  # W&B now refuses whatever is sent to it
    with pytest.warns(UserWarning, match="W&B failed and is switched off"):
        tracker.log(1, {"train/loss": 2.0})
    with warnings.catch_warnings(action="error"):
        tracker.log(2, {"train/loss": 1.0})
        tracker.finish({"status": "finished"})
    assert [line["train/loss"] for line in lines(tmp_path)] == [2.0, 1.0]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


ONLINE = """
import sys, warnings
from pathlib import Path
from selectflow.run.log import Tracker
Tracker(Path(sys.argv[1]) / "plain", {}, name="a").log(1, {})
assert "wandb" not in sys.modules, "a run without W&B must not pay for its import"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tracker = Tracker(Path(sys.argv[1]), {"seed": 0}, name="a", mode="online", timeout_s=1)
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish({"status": "finished"})
print(*(warning.message for warning in caught), sep="\\n")
"""


# Port 9 of this machine: nothing listens there, so the connection is refused at once.
CLOSED = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}


@pytest.fixture(scope="module", autouse=True)
def online_runs(tmp_path_factory):
    """Two runs in processes of their own, because wandb reads its environment once.

    Begun before the first test: they mostly wait, and the other tests need not wait with them.
    """
    runs = {}
    for cause, env in {"no key": {}, "no network": CLOSED}.items():
        path = tmp_path_factory.mktemp("online")
        inherited = {key: os.environ[key] for key in os.environ if not key.startswith("WANDB_")}
        inherited |= {"HOME": str(path), "NETRC": str(path / "netrc")}
        runs[cause] = (
            path,
            subprocess.Popen(
                [sys.executable, "-c", ONLINE, path],
                env=inherited | env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            ),
        )
    yield runs
    for _, process in runs.values():
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("cause", "reason"),
    [("no key", "no login found; set WANDB_API_KEY"), ("no network", "Timed out")],
)
def test_wandb_online_falls_back_to_offline(online_runs, cause, reason):
    path, process = online_runs[cause]
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (warning,) = out.splitlines()
    assert warning.startswith("W&B cannot be reached, the run is tracked offline")
    assert reason in warning
    history = [record for record in offline_records(path) if record["type"] == "history"]
    assert [record["history"]["item"]["train/loss"] for record in history] == [1.0]
    assert lines(path) == [{"train/step": 1, "train/loss": 1.0}]
