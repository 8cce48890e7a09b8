"""The ledger of several processes: files of each, read as one table in the order of steps."""

import pytest
from test_ledger import COLUMNS, decision, small_parts, written

from selectflow.run.ledger import Ledger, LedgerError, last_step, read_ledger, read_parts
from selectflow.run.ledger_files import Writer, parts_of
from selectflow.run.replay import Replay, ReplayError

__all__ = ["small_parts"]  # the fixture


def of_rank(run_dir, rank, size, steps, ledger=None, pool=8):
    """A ledger with the decisions of one process; keys say whose they are."""
    ledger = ledger or Ledger(run_dir, {"rank": rank}, rank, size)
    for step in steps:
        keys = [f"{step}-{rank}of{size}-{i}" for i in range(pool)]
        ledger.add(step, decision(step, pool, key=keys, epoch=[0] * pool))
    ledger.flush()
    return ledger


def expected(*segments, pool=8):
    """Keys by step, then rank, then place; segments of (size, steps)."""
    return [
        f"{step}-{rank}of{size}-{place}"
        for size, steps in segments
        for step in steps
        for rank in range(size)
        for place in range(pool)
    ]


def keys(run_dir):
    return read_ledger(run_dir, ["key"])["key"].to_pylist()


@pytest.mark.parametrize("size", [2, 3, 11])
def test_rows_are_in_the_order_of_steps_and_ranks(tmp_path, small_parts, size):
    for rank in reversed(range(size)):
        of_rank(tmp_path, rank, size, range(1, 13))
    assert keys(tmp_path) == expected((size, range(1, 13)))
    assert read_ledger(tmp_path).column_names == COLUMNS
    for part in read_parts(tmp_path, ["step"]):
        steps = part["step"].to_pylist()
        assert steps == sorted(steps)
        assert len(steps) == size * 8 * len(set(steps)), "a step is in two tables"
    assert last_step(tmp_path) == 12


def test_processes_whose_parts_end_at_other_steps_are_read_as_one(tmp_path, small_parts):
    """One of them has lost samples of its pools."""
    of_rank(tmp_path, 0, 2, range(1, 13))
    of_rank(tmp_path, 1, 2, range(1, 13), pool=5)
    first = [[part.first for part in parts] for parts in parts_of(tmp_path / "selection").values()]
    assert first[0] != first[1]
    table = read_ledger(tmp_path).to_pylist()
    assert [row["step"] for row in table] == [s for s in range(1, 13) for _ in range(13)]
    for step in range(1, 13):
        ranks = [row["key"].split("-")[1] for row in table if row["step"] == step]
        assert ranks == ["0of2"] * 8 + ["1of2"] * 5


def test_steps_that_a_process_has_not_written_yet_are_left_out(tmp_path, small_parts):
    ahead = of_rank(tmp_path, 0, 2, range(1, 8))
    with pytest.raises(LedgerError, match="wait for its first evaluation"):
        read_ledger(tmp_path)
    behind = of_rank(tmp_path, 1, 2, range(1, 4))
    assert keys(tmp_path) == expected((2, range(1, 4)))
    assert last_step(tmp_path) == 3
    (own,) = [part for part in read_parts(tmp_path, ["key"], rank=0) if len(part)]
    assert len(own) == 24
    of_rank(tmp_path, 1, 2, range(4, 8), behind)
    assert keys(tmp_path) == expected((2, range(1, 8)))
    assert ahead.state_dict() == behind.state_dict() == {"rows": 56}


@pytest.mark.parametrize("saved", [3, 5, 6])
def test_a_run_that_goes_on_in_other_numbers_of_processes(tmp_path, small_parts, saved):
    """In two, cut back to three, cut back to one, cut back to two again."""
    for rank in (0, 1):
        of_rank(tmp_path, rank, 2, range(1, 9))
    for rank in (0, 1, 2):
        ledger = Ledger(tmp_path, {}, rank, 3)
        ledger.load_state_dict(None, saved)
        of_rank(tmp_path, rank, 3, range(saved + 1, 13), ledger)
    before = expected((2, range(1, saved + 1)), (3, range(saved + 1, 13)))
    assert keys(tmp_path) == before
    alone = Ledger(tmp_path)
    alone.load_state_dict(None, 10)
    written(tmp_path, range(11, 15), alone).flush()
    before = expected((2, range(1, saved + 1)), (3, range(saved + 1, 11)))
    assert keys(tmp_path)[: len(before)] == before
    assert len(keys(tmp_path)) == len(before) + 4 * 8
    for rank in (0, 1):
        ledger = Ledger(tmp_path, {}, rank, 2)
        ledger.load_state_dict(None, 12)
        of_rank(tmp_path, rank, 2, range(13, 15), ledger)
        rows = ledger.state_dict()
        again = Ledger(tmp_path, {}, rank, 2)
        again.load_state_dict(rows, 14)
        with pytest.raises(LedgerError, match=f"must hold {rows['rows'] + 1} rows"):
            again.load_state_dict({"rows": rows["rows"] + 1}, 14)
    assert keys(tmp_path)[-32:] == expected((2, range(13, 15)))
    assert len(keys(tmp_path)) == len(before) + 2 * 8 + 2 * 2 * 8


def test_processes_leave_the_halves_of_others_alone(tmp_path):
    folder = tmp_path / "selection"
    for rank in (0, 1):
        of_rank(tmp_path, rank, 2, [1])
        (folder / f".part-00000002-rank{rank}of2.parquet.1.tmp").write_bytes(b"half")
    Ledger(tmp_path, {}, 1, 2).load_state_dict({"rows": 8}, 1)
    assert [path.name[:24] for path in folder.glob(".*.tmp")] == [".part-00000002-rank0of2."]
    assert list(parts_of(folder)) == [Writer(0, 2), Writer(1, 2)]


def test_a_run_of_the_best_of_all_pools_is_not_replayed(tmp_path):
    of_rank(tmp_path, 0, 2, range(1, 5))
    of_rank(tmp_path, 1, 2, range(1, 5), pool=4)  # keeps 1 of 4, the other 2 of 8
    with pytest.raises(ReplayError, match=r"got \[2, 1\] at step 1 .* select.scope=local"):
        Replay(tmp_path, 4, {}, 1, 1, 2)
