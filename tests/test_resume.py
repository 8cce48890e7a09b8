"""A run that is killed and resumed equals one that was not, bit for bit."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_run import config, digits, read_lines, task

from selectflow.data import PoolStream
from selectflow.run.directory import Checkpoints, lock, wait_until_free
from selectflow.run.log import DECISIONS
from selectflow.run.loop import RunError, train

__all__ = ["digits"]  # the fixture

OPTIONS = {"steps": 24, "checkpoint_every": 4, "eval_every": 5, "resume": "auto"}


class Killed(BaseException):
    """As SIGKILL: nothing of ours runs after it."""


def killed_at(step, made):
    """The task, whose loss raises `Killed` in the training step number `step` from here."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        if torch.is_grad_enabled() and model.training and len(batch["key"]) == 8:
            calls += 1
            if calls == step:
                raise Killed
        return made.loss_fn(model, batch)

    return type(made)(**{**vars(made), "loss_fn": loss_fn})


def outcome(run_dir):
    """All that a run must reproduce: weights, metrics and decisions without times, the ledger."""
    newest = Checkpoints(run_dir / "checkpoints").newest()
    metrics = [
        {key: value for key, value in line.items() if not key.startswith("perf/")}
        for line in read_lines(run_dir / "metrics.jsonl")
    ]
    return newest["model"], newest["optimizer"], metrics, ledger_files(run_dir), decisions(run_dir)


def decisions(run_dir):
    """What was decided and from what; the reason in words also names seconds."""
    path = run_dir / DECISIONS
    lines = read_lines(path) if path.exists() else []
    return [{key: value for key, value in line.items() if key != "reason"} for line in lines]


def ledger_files(run_dir):
    """The ledger byte by byte: also where its parts end must not depend on kills."""
    return {path.name: path.read_bytes() for path in (run_dir / "selection").iterdir()}


def assert_same(first, second):
    assert first[2] == second[2]
    assert first[3] == second[3]
    assert first[4] == second[4]
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    for index, state in first[1]["state"].items():
        assert all(torch.equal(state[name], second[1]["state"][index][name]) for name in state)


AUTO = {"horizon": "auto", "lr": "auto"}
FALLING = {"horizon": 4, "horizon_schedule": {"name": "linear"}, "interval": 2}


SELECT = [
    {},
    {"horizon": 3, "interval": 2},
    FALLING,
    AUTO,
    {"strategy": "uniform"},
    {"strategy": "rho"},
    {"strategy": "opus"},
]


@pytest.fixture(scope="module")
def wholes(digits, tmp_path_factory):
    """What each of `SELECT` leads to without an interruption, trained when it is asked for."""
    root = tmp_path_factory.mktemp("wholes")

    @functools.cache
    def whole(index):
        name = f"whole-{index}"
        train(config(root, name=name, select=SELECT[index], **OPTIONS), task(digits))
        return outcome(root / name)

    return whole


@pytest.mark.parametrize("index", range(len(SELECT)), ids=map(str, SELECT))
@pytest.mark.parametrize("at", [1, 4, 5, 11, 24])
def test_a_killed_run_resumes_to_the_same_end(digits, tmp_path, wholes, index, at):
    killed = config(tmp_path, name="killed", select=SELECT[index], **OPTIONS)
    with pytest.raises(Killed):
        train(killed, killed_at(at, task(digits)))
    train(killed, task(digits))
    assert_same(wholes(index), outcome(tmp_path / "killed"))


def test_decisions_of_a_run_killed_before_its_first_checkpoint_are_not_kept(digits, tmp_path):
    options = OPTIONS | {"checkpoint_every": 100}
    train(config(tmp_path, name="whole", select=AUTO, **options), task(digits))
    killed = config(tmp_path, name="killed", select=AUTO, **options)
    with pytest.raises(Killed):
        train(killed, killed_at(20, task(digits)))
    assert decisions(tmp_path / "killed")
    train(killed, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_a_run_killed_while_it_writes_its_configuration_can_be_resumed(
    digits, tmp_path, monkeypatch
):
    whole, killed = (config(tmp_path, name=name, **OPTIONS) for name in ("whole", "killed"))
    train(whole, task(digits))
    with pytest.raises(Killed):
        train(killed, killed_at(11, task(digits)))

    real = os.replace

    def replace(written, path):
        if path.name == "config.yaml":
            os.truncate(written, 20)
            shutil.copy(written, written.with_suffix(".left"))  # SIGKILL would not clean up
            raise Killed
        real(written, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(killed, task(digits))
    train(killed, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_a_run_killed_while_it_replaces_another_is_a_new_one(digits, tmp_path, monkeypatch):
    options = config(tmp_path, name="run", **OPTIONS)
    train(options, task(digits))
    expected = outcome(options.run_dir)

    def remove_some(path, **_):
        if path.exists():
            (path / "metrics.jsonl").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_some)
        with pytest.raises(Killed):
            train(options.model_copy(update={"overwrite": True}), task(digits))
    with pytest.raises(Killed):
        train(options, killed_at(3, task(digits)))  # before it has a checkpoint of its own
    train(options, task(digits))
    assert_same(expected, outcome(options.run_dir))
    train(options.model_copy(update={"overwrite": True}), task(digits))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(digits, tmp_path):
    whole, killed = (config(tmp_path, name=name, **OPTIONS) for name in ("whole", "killed"))
    train(whole, task(digits))
    with pytest.raises(Killed):
        train(killed, killed_at(15, task(digits)))
    paths = Checkpoints(tmp_path / "killed" / "checkpoints").paths()
    assert [path.name for path in paths] == ["step-00000008.pt", "step-00000012.pt"]
    paths[-1].write_bytes(paths[-1].read_bytes()[:-1000])
    with (
        pytest.warns(UserWarning, match=r"step-00000012.pt is damaged and is passed over"),
        pytest.raises(Killed),
    ):
        train(killed, killed_at(6, task(digits)))
    assert Checkpoints(paths[-1].parent).newest()["step"] == 12
    train(killed, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_stops(digits, tmp_path, number):
    whole, stopped = (config(tmp_path, name=name, **OPTIONS) for name in ("whole", "stopped"))
    train(whole, task(digits))
    made, calls = task(digits), []

    def loss_fn(model, batch):
        calls.append(None)
        if len(calls) == 30:
            os.kill(os.getpid(), number)
        return made.loss_fn(model, batch)

    train(stopped, type(made)(**{**vars(made), "loss_fn": loss_fn}))
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == f"stopped by {number.name}"
    assert 0 < summary["steps"] < 24
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(stopped, task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "stopped"))


def test_a_finished_run_is_left_as_it_is(digits, tmp_path):
    options = config(tmp_path, **OPTIONS)
    run_dir = train(options, task(digits))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    train(options, killed_at(1, task(digits)))
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_another_configuration_is_refused_with_the_difference(digits, tmp_path):
    train(config(tmp_path, **OPTIONS), task(digits))
    other = config(tmp_path, **OPTIONS | {"steps": 25})
    with pytest.raises(RunError, match="own configuration, got steps: 24 there, 25 here"):
        train(other, task(digits))
    other = config(tmp_path, data={"pool": 32}, **OPTIONS)
    with pytest.raises(RunError, match=r"got data\.pool: 64 there, 32 here; choose"):
        train(other, task(digits))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_may_resume_with_another_number_of_workers(digits, tmp_path, num_workers):
    def made(workers):
        pools = PoolStream(digits, pool=32, seed=0, memory_gib=0, num_workers=workers)
        data = {"num_workers": workers, "memory_gib": 0.0}
        return config(tmp_path, name="killed", data=data, **OPTIONS), task(digits, pools)

    train(config(tmp_path, name="whole", **OPTIONS), task(digits))
    options, first = made(1)
    with pytest.raises(Killed):
        train(options, killed_at(11, first))
    train(*made(num_workers))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))


def test_one_process_at_a_time(digits, tmp_path):
    options = config(tmp_path, **OPTIONS)
    with lock(options.run_dir), pytest.raises(RunError, match="another is at work"):
        train(options, task(digits))
    train(options, task(digits))


@contextlib.contextmanager
def holder(run_dir):
    """The number of a process that holds the lock; it has forked another."""
    told, tell = os.pipe()
    if not (pid := os.fork()):
        os.setsid()
        with lock(run_dir):
            if not os.fork():
                time.sleep(60)  # as a worker of a DataLoader, which notices after seconds
                os._exit(0)
            os.write(tell, b"held")
            time.sleep(60)
            os._exit(0)
    assert os.read(told, 4) == b"held"
    yield pid
    os.killpg(pid, signal.SIGKILL)
    os.close(told)
    os.close(tell)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def refused_apart(run_dir):
    """Whether another process, too, finds the lock held."""
    if not (pid := os.fork()):
        with contextlib.suppress(RunError), lock(run_dir):
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def test_a_lock_is_held_by_its_process_alone(tmp_path):
    with holder(tmp_path / "run") as pid:
        with pytest.raises(RunError, match="another is at work"), lock(tmp_path / "run"):
            pass
        kill(pid)
        with lock(tmp_path / "run"):  # while the forked process lives on
            with pytest.raises(RunError, match="another is at work"), lock(tmp_path / "run"):
                pass
            assert refused_apart(tmp_path / "run")


def test_who_waits_for_a_run_directory_waits_for_its_process(tmp_path):
    wait_until_free(tmp_path / "new")
    with holder(tmp_path / "run") as pid:
        waiting = threading.Thread(target=wait_until_free, args=(tmp_path / "run",))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        kill(pid)
        waiting.join(30)
        assert not waiting.is_alive()


def test_a_run_outside_of_the_main_thread_needs_no_signals(digits, tmp_path):
    thread = threading.Thread(target=train, args=(config(tmp_path, **OPTIONS), task(digits)))
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "trial" / "summary.json").read_text())["status"] == "finished"


def wandb_logs(run_dir):
    """(run id, logged steps) of each W&B log of a run, oldest first, by W&B's own reader."""
    found = []
    for log in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", log]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        (run_id,) = {each["run"]["run_id"] for each in records if each["type"] == "run"}
        history = [each["history"]["item"] for each in records if each["type"] == "history"]
        found.append((run_id, [row["train/step"] for row in history]))
    return found


def test_a_resumed_run_continues_its_wandb_run(digits, tmp_path):
    """Each process leaves a log of the same run id, which `wandb sync` joins to one run."""
    options = config(tmp_path, track={"wandb": "offline"}, **OPTIONS)
    with pytest.raises(Killed):
        train(options, killed_at(12, task(digits)))
    newest = Checkpoints(tmp_path / "trial" / "checkpoints").newest()
    train(options, task(digits))
    (first, before), (second, after) = wandb_logs(tmp_path / "trial")
    assert first == second == newest["tracker"]["run_id"]
    assert (newest["step"], before, after) == (8, [0, 5, 10], [10, 15, 20, 24])
