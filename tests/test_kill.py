"""Really killed: SIGKILL at random moments, and in the middle of each write, resumed to the end."""

import importlib
import os
import random
import runpy
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from test_resume import assert_same, outcome

from selectflow.cli import main as command_line
from selectflow.run import directory as checkpoints

ROOT = Path(__file__).parents[1]
NUM_KILLS = 6  # in each setting: 108

DEMO = {"select.horizon": 0, "select.interval": 4}
LOOK_AHEAD = {"select.horizon": 2, "select.interval": 3}
AUTO = {"select.horizon": "auto", "select.lr": "auto"}
SETTINGS = {
    f"{name}-{num_workers}-workers": options
    | ({"data.num_workers": num_workers, "data.memory_gib": 0} if num_workers else {})
    for name, options in {"demo": DEMO, "look-ahead": LOOK_AHEAD, "auto": AUTO}.items()
    for num_workers in (0, 1, 2)
}


@pytest.fixture(scope="module")
def main():
    """The vision trainer, executed once: a child that is forked then starts at once."""
    for name in ("pyarrow.parquet", "sklearn.datasets"):  # what it would import as it runs
        importlib.import_module(name)
    return runpy.run_path(str(ROOT / "trainers/vision.py"))["main"]


def arguments(folder, **options):
    """Of a run in `folder`, which writes its own shards."""
    values = {
        "name": "run", "root": folder, "data.root": folder / "digits", "steps": 240,
        "eval_every": 30, "checkpoint_every": 10, "resume": "auto", "track.wandb": "disabled",
    }  # fmt: skip
    values |= options
    config = ROOT / "configs/digits_online.yaml"
    return [str(config), *(f"{name}={value}" for name, value in values.items())]


def start(main, argv, prepare=lambda: None):
    """A process of its own that runs the trainer; its number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(os.devnull, "w") as sys.stdout:
            prepare()
            status = main(argv)
    finally:  # nothing of pytest may run in the child
        os._exit(status)


def finish(main, argv, prepare=lambda: None):
    """Run to the end."""
    _, status = os.waitpid(start(main, argv, prepare), 0)
    assert os.waitstatus_to_exitcode(status) == 0


def is_killed_after(pid, seconds):
    """Whether the process was still running after `seconds`; it no longer is."""
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), "the run failed by itself"
    return code != 0


def at_once():
    """Let checkpoints be written as they are, these small ones while the training waits."""


def in_background():
    """Let every checkpoint be written while the training goes on."""
    checkpoints._LARGE = 0


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [at_once, in_background])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_runs_killed_at_random_moments_end_as_if_they_never_were(main, tmp_path, options, prepare):
    began = time.perf_counter()
    finish(main, arguments(tmp_path / "whole", **options))
    seconds = time.perf_counter() - began
    expected = outcome(tmp_path / "whole" / "run")
    moments, kills, runs = random.Random(0), 0, 0
    while kills < NUM_KILLS:
        argv, longest = arguments(tmp_path / str(runs), **options), 0.4 * seconds
        while is_killed_after(start(main, argv, prepare), moments.uniform(0.0, longest)):
            kills += 1
            longest *= 1.1  # so that it ends on a machine that has become slower too
        assert_same(expected, outcome(tmp_path / str(runs) / "run"))
        runs += 1
    print(f"{kills} kills in {runs} runs, a whole one takes {seconds:.1f} s", flush=True)


def kill_at(number):
    """Let this process kill itself in the middle of its `number`-th change of a file."""
    calls = 0

    def before(real):
        def changed(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return changed

    for name in ("fsync", "replace", "unlink", "truncate", "mkdir"):
        setattr(os, name, before(getattr(os, name)))
    Path.unlink = before(Path.unlink)


def check_kills_in_writes(main, tmp_path, numbers, prepare):
    def killed_at(number):
        prepare()
        kill_at(number)

    short = {"steps": 24, "checkpoint_every": 5, "eval_every": 6, "keep_checkpoints": 1}
    finish(main, arguments(tmp_path / "whole", **short))
    expected, killed = outcome(tmp_path / "whole" / "run"), 0
    for number in numbers:
        argv = arguments(tmp_path / str(number), **short)
        _, status = os.waitpid(start(main, argv, partial(killed_at, number)), 0)
        if status == 0:
            break  # there are no more
        killed += 1
        os.waitpid(start(main, argv, partial(killed_at, 7)), 0)  # so is the run that goes on
        finish(main, argv, prepare)
        assert_same(expected, outcome(tmp_path / str(number) / "run"))
        assert not list((tmp_path / str(number) / "run").rglob("*.tmp"))
    return killed


@pytest.mark.parametrize("prepare", [at_once, in_background])
def test_a_run_killed_in_the_middle_of_a_write_ends_as_if_it_never_was(main, tmp_path, prepare):
    assert check_kills_in_writes(main, tmp_path, (3, 30), prepare) == 2


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [at_once, in_background])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_run_killed_in_the_middle_of_any_write_ends_as_if_it_never_was(
    main, tmp_path, first, prepare
):
    assert check_kills_in_writes(main, tmp_path, range(first, 1000, 3), prepare) > 10


@pytest.mark.usefixtures("main")  # of what it imports
def test_shards_whose_writing_was_killed_are_written_again_byte_for_byte(tmp_path):
    """Killed at each change of a file in turn, and the same command again."""

    def make(root, prepare=lambda: None):
        argv = ["shards", "make", "digits", "--root", str(root), "--per-shard", "400"]
        return os.waitpid(start(command_line, argv, prepare), 0)[1]

    def files(root):
        return {path.name: path.read_bytes() for path in root.glob("[!.]*")}

    assert make(tmp_path / "whole") == 0
    expected, number = files(tmp_path / "whole"), 1
    assert len(expected) == 6
    while make(root := tmp_path / str(number), partial(kill_at, number)):
        assert "manifest.json" not in files(root) or files(root) == expected
        assert make(root) == 0
        assert files(root) == expected
        number += 1
    assert number > 2 * len(expected)
