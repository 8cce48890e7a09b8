"""Streams that are shared: by ranks, by workers, by several sources."""

import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import keys_of, make_small
from torch.utils.data import DataLoader

from selectflow.data import DataError, PoolStream


def test_ranks_share_the_global_order_pool_by_pool(tmp_path):
    make_small(tmp_path, count=22)
    whole = keys_of(islice(PoolStream(tmp_path, pool=6, seed=1, buffer=9), 20))
    ranks = [
        PoolStream(tmp_path, pool=2, seed=1, buffer=9, rank=rank, world_size=3) for rank in range(3)
    ]
    shared = [
        key
        for pools in zip(*(islice(r, 20) for r in ranks), strict=True)
        for pool in pools
        for key in pool["key"]
    ]
    assert shared == whole
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)


def test_another_number_of_ranks_continues_the_global_order(tmp_path):
    make_small(tmp_path, count=22)
    whole = keys_of(islice(PoolStream(tmp_path, pool=2, seed=1), 20))
    first = PoolStream(tmp_path, pool=2, seed=1, rank=1, world_size=2)
    for _ in islice(first, 3):
        pass
    resumed = PoolStream(tmp_path, pool=2, seed=1)
    resumed.load_state_dict(first.state_dict())
    assert keys_of(islice(resumed, 14)) == whole[12:]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_of_a_dataloader_around_the_stream_keep_its_order(tmp_path, num_workers):
    make_small(tmp_path)
    expected = keys_of(islice(PoolStream(tmp_path, pool=3, seed=0), 12))
    stream = PoolStream(tmp_path, pool=3, seed=0, num_workers=2, memory_gib=0)
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers)
    assert keys_of(islice(loader, 12)) == expected


KILLED = """
import sys, time
from selectflow.data import PoolStream
stream = PoolStream(sys.argv[1], pool=150, seed=0, memory_gib=0, num_workers=2)
next(stream)
print("started", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_end_with_a_process_that_was_killed(tmp_path):
    """Also those that write to a pipe which is full and which nobody reads any more."""
    make_small(tmp_path, count=300, per_shard=100)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "started\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        time.sleep(0.5)  # all that is read ahead has come as far as the pipe
        process.kill()
        process.wait()
    until = time.monotonic() + 20
    while alive := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


def test_workers_leave_the_random_numbers_of_the_training_alone(tmp_path):
    make_small(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(PoolStream(tmp_path, pool=3, seed=0, num_workers=1, memory_gib=0))
    assert torch.equal(before, torch.get_rng_state())


def test_several_sources_are_one_epoch_without_weights(tmp_path):
    make_small(tmp_path / "a")
    make_small(tmp_path / "b", count=5)
    stream = PoolStream({"x": tmp_path / "a", "y": tmp_path / "b"}, pool=15, seed=0)
    names = [f"x/s{i}" for i in range(10)] + [f"y/s{i}" for i in range(5)]
    for pool in islice(stream, 3):
        assert sorted(pool["key"]) == sorted(names)


def test_weights_mix_sources_each_in_exact_epochs(tmp_path):
    make_small(tmp_path / "a")
    make_small(tmp_path / "b", count=5)
    sources = {"x": tmp_path / "a", "y": tmp_path / "b"}
    stream = PoolStream(sources, pool=50, seed=0, weights={"x": 3, "y": 1})
    keys = keys_of(islice(stream, 200))
    of = {name: [key for key in keys if key.startswith(name)] for name in sources}
    assert abs(len(of["x"]) / len(keys) - 0.75) < 0.015  # 3.5 standard deviations
    for name, count in {"x": 10, "y": 5}.items():
        epochs = [of[name][i : i + count] for i in range(0, len(of[name]) - count, count)]
        assert all(set(epoch) == {f"{name}/s{i}" for i in range(count)} for epoch in epochs)
    again = PoolStream(sources, pool=50, seed=0, weights={"x": 3, "y": 1})
    met = Counter()
    for pool in islice(again, 20):
        for key, epoch in zip(pool["key"], pool["epoch"], strict=True):
            assert epoch == met[key]  # of its own source: how often it came before
            met[key] += 1
    resumed = PoolStream(sources, pool=50, seed=0, weights={"x": 3, "y": 1})
    stream = PoolStream(sources, pool=30, seed=0, weights={"x": 3, "y": 1})
    for _ in islice(stream, 145):  # beyond the first block of choices
        pass
    resumed.load_state_dict(stream.state_dict())
    assert keys_of(islice(resumed, 10)) == keys[4350:4850]


@pytest.mark.parametrize("weights", [{"x": 1}, {"x": 1, "y": 0}, {"x": 1, "y": 1, "z": 1}])
def test_weights_of_other_sources_are_refused(tmp_path, weights):
    make_small(tmp_path)
    with pytest.raises(DataError, match=r"weights must be a positive number for each"):
        PoolStream({"x": tmp_path, "y": tmp_path}, pool=1, seed=0, weights=weights)


def test_resampling_is_seeded_and_draws_shards_with_replacement(tmp_path):
    make_small(tmp_path, count=40, per_shard=4)

    def epochs(seed):
        stream = PoolStream(tmp_path, pool=40, seed=seed, resample=True)
        return [Counter(pool["key"]) for pool in islice(stream, 50)]

    assert epochs(0) == epochs(0) != epochs(1)
    missing = np.mean([40 - len(epoch) for epoch in epochs(0)]) / 40
    assert abs(missing - 0.9**10) < 0.05  # a shard is left out with probability (1 - 1/10)^10
