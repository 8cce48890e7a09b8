"""Checkpoints: whole or not there, and large ones written while the training goes on."""

import json
import threading

import pytest
import torch
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import config, digits, task

from selectflow.run import directory as module
from selectflow.run.directory import Checkpoints, lock
from selectflow.run.loop import RunError, train

__all__ = ["digits"]  # the fixture


@pytest.fixture
def in_background(monkeypatch):
    """As if every state were large."""
    monkeypatch.setattr(module, "_LARGE", 0)


@pytest.fixture
def disk(monkeypatch):
    """An event without which no checkpoint is written; when it is there, `torch.save` goes on."""
    free, real = threading.Event(), torch.save

    def save(*args):
        assert free.wait(30)
        real(*args)

    monkeypatch.setattr(torch, "save", save)
    yield free
    free.set()


def fail(*_):
    raise OSError(28, "No space left on device")


def test_a_checkpoint_that_cannot_be_written_is_named_and_costs_no_other(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"step": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"step-00000002.pt cannot be written: .*No space left"):
        checkpoints.save(2, {"step": Unwritable()})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoints.newest() == {"step": 1}


def test_a_damaged_checkpoint_costs_no_earlier_one_that_is_written_after_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(12, {"step": 12})
    checkpoints.paths()[0].write_bytes(b"damaged")
    checkpoints.save(4, {"step": 4})
    assert checkpoints.newest() == {"step": 4}


def test_a_large_state_is_saved_as_it_was(tmp_path, disk):
    module_state = torch.nn.BatchNorm1d(3).state_dict()
    state = {
        "step": 1, "large": torch.ones(module._LARGE // 4), "module": module_state,
        "plain": [1, {"last": [2]}], "pair": (torch.zeros(2), "text"), "none": None,
    }  # fmt: skip
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    state["large"].zero_()
    state["pair"][0].add_(1)
    state["plain"][1]["last"].append(3)
    module_state["weight"].zero_()
    assert checkpoints.newest() is None
    disk.set()
    checkpoints.wait()
    saved = checkpoints.newest()
    assert saved["large"].eq(1).all()
    assert saved["module"]["weight"].eq(1).all()
    assert saved["module"]._metadata == module_state._metadata
    assert saved["pair"][0].eq(0).all()
    assert (saved["plain"], saved["pair"][1], saved["none"]) == ([1, {"last": [2]}], "text", None)


def test_a_small_state_is_on_the_disk_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1, "small": torch.ones(100)})
    assert checkpoints.newest()["step"] == 1


def test_an_error_in_the_background_is_raised_once_by_whoever_comes_next(
    tmp_path, in_background, monkeypatch
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"step": 1})
    checkpoints.wait()
    for then in (checkpoints.wait, lambda: checkpoints.save(3, {"step": 3})):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail)
            checkpoints.save(2, {"step": 2})
            with pytest.raises(OSError, match=r"step-00000002\.pt cannot be written: .*No space"):
                then()
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_run_saved_in_the_background_resumes_to_the_same_end(digits, tmp_path, in_background):
    whole, killed = (config(tmp_path, name=name, **OPTIONS) for name in ("whole", "killed"))
    train(whole, task(digits))
    with pytest.raises(Killed):
        train(killed, killed_at(11, task(digits)))
    assert Checkpoints(killed.run_dir / "checkpoints").newest()["step"] == 8
    train(killed, task(digits))
    assert_same(outcome(whole.run_dir), outcome(killed.run_dir))


def test_a_run_whose_last_checkpoint_fails_in_the_background_is_no_finished_one(
    digits, tmp_path, in_background, monkeypatch
):
    options = config(tmp_path, checkpoint_every=100, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match=r"step-00000007\.pt cannot be written"):
            train(options, task(digits))
    assert json.loads((options.run_dir / "summary.json").read_text())["status"] == "failed"
    train(options, task(digits))
    assert Checkpoints(options.run_dir / "checkpoints").newest()["step"] == 7


def test_a_run_directory_is_held_until_all_is_written(digits, tmp_path, in_background, disk):
    options = config(tmp_path, checkpoint_every=100)
    running = threading.Thread(target=train, args=(options, task(digits)))
    running.start()
    folder = options.run_dir / "checkpoints"
    while not list(folder.glob(".step-00000007.pt.*.tmp")):  # the training is over
        running.join(0.01)
    with pytest.raises(RunError, match="another is at work"), lock(options.run_dir):
        pass
    disk.set()
    running.join()
    with lock(options.run_dir):
        assert Checkpoints(folder).newest()["step"] == 7
