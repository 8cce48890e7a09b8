"""The ledger: what was decided can be read, while the run goes on, and cut back to any step."""

import json
import os
from collections import defaultdict

import numpy as np
import pyarrow.dataset
import pytest
import torch

from selectflow.run import ledger as module
from selectflow.run.ledger import Ledger, LedgerError, read_ledger, read_parts, read_stream
from selectflow.strategies import Selection

COLUMNS = ["step", "epoch", "key", "score", "loss", "kept", "horizon", "source"]


def decision(step, size=8, dtype=torch.float32, with_losses=True, **pool):
    generator = torch.Generator().manual_seed(step)
    scores = torch.randn(size, generator=generator, dtype=dtype)
    pool = {"key": [f"s{step}-{i}" for i in range(size)], "epoch": [step // 3] * size} | pool
    return Selection(
        pool=pool,
        indices=scores.argsort(descending=True)[: size // 4],
        scores=scores,
        losses=scores.abs() if with_losses else None,
        step=step - 1,
        horizon=step % 4 if with_losses else None,
        age=0,
        target_loss=None,
        lookahead_s=0.0,
        seconds=0.0,
    )


def written(run_dir, steps, ledger=None):
    ledger = ledger or Ledger(run_dir, {"seed": 3})
    for step in steps:
        ledger.add(step, decision(step))
    return ledger


def files(run_dir):
    return {path.name: path.read_bytes() for path in (run_dir / "selection").iterdir()}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "_PART_ROWS", 40)  # five steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_decision_is_read_back_exactly(tmp_path, dtype):
    ledger, made = Ledger(tmp_path), [decision(step, dtype=dtype) for step in range(1, 6)]
    for step, each in enumerate(made, start=1):
        ledger.add(step, each)
    ledger.flush()
    table = read_ledger(tmp_path)
    assert table.column_names == COLUMNS
    expected = defaultdict(list)
    for step, each in enumerate(made, start=1):
        expected["step"] += [step] * 8
        expected["key"] += each.pool["key"]
        expected["epoch"] += each.pool["epoch"]
        expected["score"] += each.scores.tolist()
        expected["loss"] += each.losses.tolist()
        expected["kept"] += [place in each.indices for place in range(8)]
        expected["horizon"] += [step % 4] * 8
        expected["source"] += [None] * 8
    assert table.to_pydict() == expected
    scores = torch.from_numpy(table["score"].to_numpy().copy()).to(dtype)
    assert torch.equal(scores, torch.cat([each.scores for each in made]))


def test_what_is_not_known_is_null(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add(1, decision(1, with_losses=False, epoch=None))
    ledger.flush()
    table = read_ledger(tmp_path, ["epoch", "loss", "horizon"])
    assert table.to_pydict() == {name: [None] * 8 for name in ("epoch", "loss", "horizon")}
    assert read_stream(tmp_path) == {}


def test_other_readers_see_the_rows_while_the_run_goes_on(tmp_path, small_parts):
    ledger, folder = Ledger(tmp_path, {"seed": 3}), tmp_path / "selection"
    for step in range(1, 13):
        ledger.add(step, decision(step))
        if step % 4 == 0:
            ledger.flush()
            (folder / ".part-00000099.parquet.1.tmp").write_bytes(b"one that is being written")
            table = pyarrow.dataset.dataset(folder).to_table()
            assert table["step"].to_pylist() == [1 + row // 8 for row in range(step * 8)]
            assert table.equals(read_ledger(tmp_path))
    names = [f"part-{first:08d}.parquet" for first in (1, 6, 11)]
    assert sorted(files(tmp_path))[1:] == names
    assert [len(part) for part in read_parts(tmp_path)] == [40, 40, 16]
    assert read_stream(tmp_path) == {"seed": 3}


@pytest.mark.parametrize("flushes", [(), (3, 8, 9), range(1, 13)])
def test_the_files_depend_on_the_rows_alone(tmp_path, small_parts, flushes):
    ledger = Ledger(tmp_path / "often", {"seed": 3})
    for step in range(1, 13):
        ledger.add(step, decision(step))
        if step in flushes:
            ledger.flush()
    ledger.flush()
    written(tmp_path / "once", range(1, 13)).flush()
    assert files(tmp_path / "often") == files(tmp_path / "once")


@pytest.mark.parametrize("died", [*range(5, 13)])
@pytest.mark.parametrize("saved", [0, 1, 4, 5, 6])
def test_a_ledger_that_was_cut_back_ends_in_the_same_files(tmp_path, small_parts, saved, died):
    written(tmp_path / "whole", range(1, 13)).flush()
    ledger = written(tmp_path / "cut", range(1, saved + 1))
    state = json.loads(json.dumps(ledger.state_dict()))
    written(tmp_path / "cut", range(saved + 1, died + 1), ledger).flush()
    (tmp_path / "cut/selection/.part-00000001.parquet.1.tmp").write_bytes(b"half a part")
    resumed = Ledger(tmp_path / "cut", {"seed": 3})
    resumed.load_state_dict(state, saved)
    if saved:
        expected = [1 + row // 8 for row in range(saved * 8)]
        assert read_ledger(tmp_path / "cut", ["step"])["step"].to_pylist() == expected
    written(tmp_path / "cut", range(saved + 1, 13), resumed).flush()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_cut_that_is_killed_itself_is_made_again(tmp_path, small_parts, monkeypatch):
    ledger = written(tmp_path, range(1, 4))
    state = ledger.state_dict()
    written(tmp_path, range(4, 13), ledger).flush()

    def die(*_):
        raise KeyboardInterrupt

    killed = Ledger(tmp_path, {"seed": 3})
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", die)
        with pytest.raises(KeyboardInterrupt):
            killed.load_state_dict(state, 3)
    resumed = Ledger(tmp_path, {"seed": 3})
    resumed.load_state_dict(state, 3)
    assert len(read_ledger(tmp_path)) == 3 * 8


def test_rows_that_are_gone_are_noticed_on_resume(tmp_path, small_parts):
    state = written(tmp_path, range(1, 13)).state_dict()
    (tmp_path / "selection/part-00000006.parquet").unlink()
    with pytest.raises(LedgerError, match=r"ledger must hold 96 rows up to step 12, got 56 in"):
        Ledger(tmp_path).load_state_dict(state, 12)


def test_a_damaged_part_is_named(tmp_path):
    written(tmp_path, range(1, 4)).flush()
    path = tmp_path / "selection/part-00000001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LedgerError, match=r"whole Parquet file, got .*part-00000001\.parquet"):
        read_ledger(tmp_path)


def test_a_run_without_a_ledger_and_unknown_columns_are_named(tmp_path):
    with pytest.raises(LedgerError, match=r"run must have a ledger, got .* without selection/part"):
        read_ledger(tmp_path)
    written(tmp_path, [1]).flush()
    with pytest.raises(LedgerError, match=r"columns must be of \['step', .*got \['sore'\]"):
        read_ledger(tmp_path, ["step", "sore"])


def test_a_float32_score_takes_the_space_of_one(tmp_path):
    ledger = Ledger(tmp_path)
    for step in range(1, 65):
        ledger.add(step, decision(step, size=1000, key=[f"digit-{i:04d}" for i in range(1000)]))
    ledger.flush()
    size = sum(map(len, files(tmp_path).values()))
    assert size < 64_000 * 10  # two floats, a bit, and what repeats


def test_rows_that_cannot_be_written_stay_and_name_the_file(tmp_path, monkeypatch):
    ledger = written(tmp_path, range(1, 3))
    ledger.flush()
    ledger.add(3, decision(3))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"No space left.*part-00000001\.parquet"):
        ledger.flush()
    monkeypatch.undo()
    assert len(read_ledger(tmp_path)) == 2 * 8
    ledger.flush()
    assert np.unique(read_ledger(tmp_path)["step"].to_numpy()).tolist() == [1, 2, 3]
