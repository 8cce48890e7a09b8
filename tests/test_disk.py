"""Disks that are full or read-only: the file is named, and what was saved before is still good."""

import os
import subprocess

import pytest
from test_resume import OPTIONS, assert_same, outcome
from test_run import config, digits, task

from selectflow.cli import main
from selectflow.data import make_digits, read_manifest
from selectflow.run.directory import Checkpoints
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import train

__all__ = ["digits"]  # the fixture


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MiB; where this user may mount none, the test is skipped."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs a small disk, and mounting one failed: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk, left=0):
    """Write to the disk until `left` bytes are free."""
    free = os.statvfs(disk)
    size = free.f_bavail * free.f_bsize - left
    with (disk / "other").open("wb") as file:
        file.write(bytes(size))


def filled_at(step, made, disk, left, values=0):
    """The task, after whose training step number `step` the disk is filled by something else."""
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        if model.training and len(batch["key"]) == 8:
            calls += 1
            if calls == step:
                fill(disk, left)
        return made.loss_fn(model, batch)

    def evaluate(model, batches):
        found = made.evaluate(model, batches)
        return found | {f"value_{i:04d}": found["loss"] for i in range(values)}

    return type(made)(**{**vars(made), "loss_fn": loss_fn, "evaluate": evaluate})


@pytest.mark.parametrize(
    ("step", "left", "values", "named"),
    [
        (9, 0, 400, r"metrics\.jsonl"),  # whose lines are longer than what a block has left
        (6, 0, 0, r"selection/part-00000001\.parquet"),
        (6, 24_000, 0, r"checkpoints/step-00000008\.pt"),
    ],
)
def test_a_run_on_a_full_disk_names_the_file_and_resumes(
    digits, tmp_path, disk, step, left, values, named
):
    """The error is that of the first file: those after it cannot be written either.

    Selection is uniform, so that the loss is asked for by the training alone.
    """
    options = {"select": {"strategy": "uniform"}} | OPTIONS
    whole = config(tmp_path, name="whole", **options)
    train(whole, filled_at(0, task(digits), disk, left, values))
    full = config(disk, name="full", **options)
    with pytest.raises(OSError, match=named) as caught:
        train(full, filled_at(step, task(digits), disk, left, values))
    assert "No space left" in str(caught.value)
    assert not list((disk / "full").rglob("*.tmp"))
    (disk / "other").unlink()
    train(full, filled_at(0, task(digits), disk, left, values))
    assert_same(outcome(tmp_path / "whole"), outcome(disk / "full"))


def test_shards_on_a_full_disk_are_named_and_no_part_of_one_is_left(disk):
    fill(disk, 700_000)
    with pytest.raises(OSError, match=r"No space left on device.*train-000000\.tar"):
        make_digits(disk / "digits")
    assert not list((disk / "digits").iterdir())
    (disk / "other").unlink()


def test_selected_shards_on_a_full_disk(digits, tmp_path, disk, capsys):
    values = {"data": {"name": "shards", "root": digits}, "eval_every": 2}
    run_dir = train(config(tmp_path, **values), task(digits))
    fill(disk, 20_000)
    arguments = ["select", "write-shards", str(run_dir), "--out", str(disk / "new"), "--pack=64"]
    assert main(arguments) == 2
    assert "No space left on device: " in capsys.readouterr().err
    (disk / "other").unlink()
    assert main(arguments) == 0
    kept = read_ledger(run_dir, ["kept"])["kept"].to_numpy().sum()
    assert read_manifest(disk / "new").num_samples("train") <= kept


def test_a_read_only_directory_is_named_before_anything_is_trained(digits, disk):
    (disk / "trial").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=r"Read-only file system: '.*disk/\.trial\.lock'"):
        train(config(disk), filled_at(1, task(digits), disk, 0))


def test_what_a_checkpoint_counts_is_on_the_disk_before_it(digits, tmp_path, monkeypatch):
    """A machine that dies keeps of a file what was fsynced: cutting it back must find it all."""
    on_disk, counted = {}, []
    real_fsync, real_save = os.fsync, Checkpoints.save

    def fsync(fd):
        real_fsync(fd)
        on_disk[os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))] = os.fstat(fd).st_size

    def save(self, step, state):
        sizes = state["tracker"]["metrics_bytes"], state["log"]["decisions"]["bytes"]
        counted.append((sizes, (on_disk["metrics.jsonl"], on_disk.get("decisions.jsonl", 0))))
        return real_save(self, step, state)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Checkpoints, "save", save)
    train(config(tmp_path, select={"horizon": "auto", "lr": "auto"}, **OPTIONS), task(digits))
    assert len(counted) == 6
    assert all(states == files for states, files in counted)
    assert 0 < counted[2][0][1] < counted[-1][0][1]
