"""W&B's environment variables: before our defaults, after what is configured, and an off over all.

Each in a process of its own, because wandb reads its environment once.
"""

import os

import pytest
from processes import execute
from wandb_log import offline_records

from selectflow.run.config import TrackConfig, json_schema
from selectflow.run.wandb import mode_of
from selectflow.tune.space import TuneError
from selectflow.tune.wandb import serve

TRACK = """
import sys
from pathlib import Path
from selectflow.run.config import RunConfig, TrackConfig
from selectflow.run.loop import _tracker
track = TrackConfig(**eval(sys.argv[2]))
tracker = _tracker(RunConfig(name="a", root=Path(sys.argv[1]), track=track), None)
tracker.log(1, {"test/loss": 1.0})
tracker.finish({"status": "finished"})
assert tracker.run_id or sys.argv[3] == "True" or "wandb" not in sys.modules, "off costs no import"
"""


def tracked(tmp_path, track, can_import=False, **env):
    """The W&B run that a configuration makes in an environment, None without; and where it is."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    known |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    assert execute(TRACK, [str(tmp_path), repr(track), str(can_import)], known | env, tmp_path) == 0
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == '{"train/step": 1, "test/loss": 1.0}\n'
    logs = list(tmp_path.rglob("run-*.wandb"))
    if not logs:
        return None, None
    (log,) = logs
    folder = log.parents[2]
    run = next(record["run"] for record in offline_records(folder) if record["type"] == "run")
    return run, folder


@pytest.mark.parametrize(
    ("track", "env"),
    [
        ({"wandb": "offline"}, {"WANDB_MODE": "disabled"}),
        ({"wandb": "online"}, {"WANDB_MODE": "Disabled", "WANDB_API_KEY": "0" * 40}),
        ({"wandb": "disabled"}, {"WANDB_MODE": "online"}),
        ({}, {}),
    ],
)
def test_an_off_goes_before_everything(tmp_path, track, env):
    assert tracked(tmp_path, track, **env) == (None, None)


def test_offline_goes_before_online_and_without_a_login(tmp_path):
    run, folder = tracked(tmp_path, {"wandb": "online"}, WANDB_MODE="offline")
    assert (run["project"], folder) == ("selectflow", tmp_path / "a")


def test_the_environment_goes_before_our_defaults(tmp_path):
    (tmp_path / "x").mkdir()
    env = {
        "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "x"), "WANDB_PROJECT": "mine",
        "WANDB_RUN_GROUP": "ours", "WANDB_JOB_TYPE": "study", "WANDB_TAGS": "one,two",
    }  # fmt: skip
    run, folder = tracked(tmp_path, {}, **env)
    assert folder == tmp_path / "x"
    assert (run["project"], run["run_group"], run["job_type"]) == ("mine", "ours", "study")
    assert run["tags"] == ["one", "two"]


def test_what_is_configured_goes_before_the_environment(tmp_path):
    track = {"project": "p", "group": "g", "job_type": "j", "tags": ("t",), "wandb": "offline"}
    env = {
        "WANDB_MODE": "online", "WANDB_PROJECT": "mine", "WANDB_RUN_GROUP": "ours",
        "WANDB_JOB_TYPE": "study", "WANDB_TAGS": "one,two",
    }  # fmt: skip
    run, _ = tracked(tmp_path, track, **env)
    assert (run["project"], run["run_group"], run["job_type"]) == ("p", "g", "j")
    assert run["tags"] == ["t"]


def test_what_wandb_offline_wrote_counts_too(tmp_path):
    """`wandb disabled` and `wandb init` leave a settings file beside the program."""
    (tmp_path / "wandb").mkdir()
    settings = tmp_path / "wandb" / "settings"
    settings.write_text("[default]\nmode = offline\nproject = theirs\n")
    run, _ = tracked(tmp_path, {"wandb": "online"})
    assert run["project"] == "theirs"
    off = tmp_path / "off"
    (off / "wandb").mkdir(parents=True)
    (off / "wandb" / "settings").write_text("[default]\nmode = disabled\n")
    assert tracked(off, {"wandb": "offline"}, can_import=True) == (None, None)


def test_a_mode_that_wandb_does_not_know_is_said(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.warns(UserWarning, match="WANDB_MODE must be one of disabled, .*, got 'of'"):
        assert mode_of("online") == "disabled"
    for text, expected in {"": "online", "dryrun": "offline", "run": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", text)
        assert mode_of("online") == expected


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_sweep_on_the_server_is_not_made_against_the_environment(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(TuneError, match=f"must be online, got WANDB_MODE={mode}; unset it"):
        serve(None)  # nothing is looked at


def test_the_order_is_written_where_the_keys_are():
    assert "WANDB_MODE=disabled always switches W&B off" in json_schema()
    assert TrackConfig().project is None
