"""Pool streams: their order, that it can be resumed, and shared by ranks, workers and sources."""

import gc
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import keys_of, make_small, sample
from torch.utils.data import DataLoader

from selectflow.data import (
    DataError,
    Manifest,
    PoolStream,
    read_batches,
    write_manifest,
    write_split,
)
from selectflow.data import reader as reader_module
from selectflow.data import stream as stream_module
from selectflow.data.tar_index import Record

# held in memory, read here, read by worker processes: the same pools in all four
MODES = [
    {"memory_gib": 1},
    {"memory_gib": 0},
    {"memory_gib": 0, "num_workers": 1},
    {"memory_gib": 0, "num_workers": 2},
]


def slow_order(counts, seed, buffer, epoch):
    """Rows of one epoch: shards permuted, cut into groups of >= buffer rows, these permuted."""
    firsts = np.cumsum([0, *counts])
    shards = np.random.default_rng([seed, 0, epoch, 0]).permutation(len(counts))
    rows, group, first = [], [], 0
    for place, shard in enumerate(shards):
        group.extend(range(firsts[shard], firsts[shard + 1]))
        if len(group) >= buffer or place == len(shards) - 1:
            rows.extend(np.random.default_rng([seed, 0, epoch, 1 + first]).permutation(group))
            group, first = [], place + 1
    return rows


@pytest.mark.parametrize("buffer", [1, 5, 100])
@pytest.mark.parametrize("pool", [1, 3, 10, 23])
def test_every_epoch_holds_each_sample_once_and_every_pool_is_full(tmp_path, pool, buffer):
    make_small(tmp_path)
    pools = list(islice(PoolStream(tmp_path, pool=pool, seed=0, buffer=buffer), 10 * pool))
    assert all(len(each["key"]) == len(each["label"]) == pool for each in pools)
    keys = keys_of(pools)
    epochs = [tuple(keys[start : start + 10]) for start in range(0, len(keys), 10)]
    assert all(sorted(epoch) == [f"s{i}" for i in range(10)] for epoch in epochs)
    if buffer == 100:  # a small one has few orders
        assert len(set(epochs)) == len(epochs)


def test_image_label_and_key_of_a_pool_belong_together(tmp_path):
    make_small(tmp_path)
    for pool in islice(PoolStream(tmp_path, pool=7, seed=1), 5):
        assert (pool["image"].dtype, pool["label"].dtype) == (torch.float32, torch.int64)
        assert pool["image"].shape == (7, 1, 8, 8)
        assert [f"s{label}" for label in pool["label"].tolist()] == pool["key"]
        assert (pool["image"] == pool["label"][:, None, None, None]).all()


def test_order_is_a_function_of_seed_and_epoch_alone(tmp_path):
    make_small(tmp_path)

    def order(pool, seed, count=30):
        stream = PoolStream(tmp_path, pool=pool, seed=seed)
        return keys_of(islice(stream, count // pool))

    torch.manual_seed(123)
    first = order(5, seed=0)
    torch.manual_seed(456)
    assert first == order(5, seed=0) == order(2, seed=0) == order(30, seed=0)
    assert first != order(5, seed=1)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("buffer", [1, 5, 6, 1000])
def test_order_equals_the_slow_one_in_every_mode(tmp_path, options, buffer):
    make_small(tmp_path, count=22)
    stream = PoolStream(tmp_path, pool=4, seed=3, buffer=buffer, **options)
    expected = [f"s{i}" for epoch in range(3) for i in slow_order([4] * 5 + [2], 3, buffer, epoch)]
    pools = list(islice(stream, 16))
    assert keys_of(pools) == expected[:64]
    for pool in pools:
        assert [f"s{label}" for label in pool["label"].tolist()] == pool["key"]
        assert (pool["image"] == pool["label"][:, None, None, None]).all()


def test_without_shuffle_the_order_is_the_stored_one(tmp_path):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=4, seed=0, shuffle=False)
    assert keys_of(islice(stream, 5)) == [f"s{i}" for i in range(10)] * 2


@pytest.mark.parametrize("options", MODES)
def test_a_pool_knows_the_epoch_of_each_sample(tmp_path, options):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=7, seed=2, buffer=5, **options)
    for _ in islice(stream, 3):
        pass
    resumed = PoolStream(tmp_path, pool=7, seed=2, buffer=5, **options)
    resumed.load_state_dict(stream.state_dict())
    epochs = [epoch for pool in islice(resumed, 6) for epoch in pool["epoch"]]
    assert epochs == [place // 10 for place in range(21, 63)]


@pytest.mark.parametrize("options", MODES[1:])
def test_the_epochs_of_a_pool_leave_out_what_cannot_be_read(tmp_path, options):
    make_small(tmp_path, count=12)
    (tmp_path / "train-000001.tar").unlink()
    stream = PoolStream(tmp_path, pool=9, seed=0, max_errors=4, **options)
    pools = list(islice(stream, 4))
    seen = [pair for pool in pools for pair in zip(pool["key"], pool["epoch"], strict=True)]
    whole = [(f"s{i}", epoch) for epoch in range(3) for i in slow_order([4] * 3, 0, 4096, epoch)]
    assert seen == [pair for pair in whole if pair[0] not in {"s4", "s5", "s6", "s7"}]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("done", [0, 1, 5, 17])
def test_resume_hands_out_the_identical_remaining_pools(tmp_path, done, options):
    make_small(tmp_path)
    whole = PoolStream(tmp_path, pool=3, seed=4, buffer=5, **options)
    for _ in islice(whole, done):
        pass
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PoolStream(tmp_path, pool=3, seed=4, buffer=5, **options)
    next(resumed)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for expected, got in zip(islice(whole, 12), islice(resumed, 12), strict=True):
        assert expected["key"] == got["key"]
        assert torch.equal(expected["image"], got["image"])
        assert torch.equal(expected["label"], got["label"])


@pytest.mark.parametrize(
    ("module", "name", "memory_gib"), [(reader_module, "collate", 0), (stream_module, "pick", 1)]
)
def test_a_stream_that_was_interrupted_goes_on_after_the_last_pool(
    tmp_path, monkeypatch, module, name, memory_gib
):
    make_small(tmp_path)
    options = {"pool": 3, "seed": 0, "memory_gib": memory_gib}
    whole = keys_of(islice(PoolStream(tmp_path, **options), 30))
    stream = PoolStream(tmp_path, **options)
    keys = keys_of(islice(stream, 2))
    real, calls = getattr(module, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        keys.extend(key for pool in stream for key in pool["key"])
    keys += keys_of(islice(stream, 30 - len(keys) // 3))
    assert keys == whole


def test_a_second_iter_goes_on_where_the_first_stopped(tmp_path):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=3, seed=0)
    parts = [pool for _ in range(3) for pool in islice(iter(stream), 4)]
    assert keys_of(parts) == keys_of(islice(PoolStream(tmp_path, pool=3, seed=0), 12))


def test_state_is_refused_by_another_dataset_or_order(tmp_path):
    both = make_small(tmp_path / "a")
    write_manifest(
        tmp_path / "a", replace(both, splits=both.splits | {"other": both.splits["train"]})
    )
    make_small(tmp_path / "b", first=1)
    state = PoolStream(tmp_path / "a", pool=2, seed=0).state_dict()
    refused = {
        "fingerprint": PoolStream(tmp_path / "b", pool=2, seed=0),
        "seed": PoolStream(tmp_path / "a", pool=2, seed=1),
        "shuffle": PoolStream(tmp_path / "a", pool=2, seed=0, shuffle=False),
        "buffer": PoolStream(tmp_path / "a", pool=2, seed=0, buffer=7),
        "resample": PoolStream(tmp_path / "a", pool=2, seed=0, resample=True),
        "split": PoolStream(tmp_path / "a", "other", pool=2, seed=0),
    }
    for name, stream in refused.items():
        next(stream)
        before = stream.state_dict()
        with pytest.raises(DataError, match=f"{name} must be .* in the state; resume with"):
            stream.load_state_dict(state)
        assert stream.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": [10]}, r"position must be in \[0, 10\), got 10"),
        ({"position": [-1]}, r"position must be in \[0, 10\), got -1"),
        ({"epoch": [-1]}, "epoch must be >= 0, got -1"),
        ({"epoch": [0, 0]}, "epoch must have 1 items"),
        ({"epoch": 3}, "state must be of a stream like this"),
        ({"errors": None}, "state must be of a stream like this"),
    ],
)
def test_state_outside_the_epoch_is_refused_and_changes_nothing(tmp_path, change, message):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=2, seed=0)
    next(stream)
    before = stream.state_dict()
    with pytest.raises(DataError, match=message):
        stream.load_state_dict(before | change)
    assert stream.state_dict() == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"pool": 0}, "pool must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"buffer": 0}, "buffer must be >= 1"),
        ({"num_workers": -1}, "num_workers must be >= 0"),
        ({"memory_gib": float("nan")}, "memory_gib must be >= 0, got nan"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"shares": {"a": 1}}, "shares must be of several sources, got {'a': 1} for one"),
    ],
)
def test_stream_options_out_of_range_are_refused(tmp_path, option, message):
    make_small(tmp_path)
    with pytest.raises(DataError, match=message):
        PoolStream(tmp_path, **({"pool": 1, "seed": 0} | option))


# sharing


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


def test_several_sources_are_one_epoch_without_shares(tmp_path):
    make_small(tmp_path / "a")
    make_small(tmp_path / "b", count=5)
    stream = PoolStream({"x": tmp_path / "a", "y": tmp_path / "b"}, pool=15, seed=0)
    names = [f"x/s{i}" for i in range(10)] + [f"y/s{i}" for i in range(5)]
    for pool in islice(stream, 3):
        assert sorted(pool["key"]) == sorted(names)


def test_shares_mix_sources_each_in_exact_epochs(tmp_path):
    make_small(tmp_path / "a")
    make_small(tmp_path / "b", count=5)
    sources = {"x": tmp_path / "a", "y": tmp_path / "b"}
    stream = PoolStream(sources, pool=50, seed=0, shares={"x": 3, "y": 1})
    keys = keys_of(islice(stream, 200))
    of = {name: [key for key in keys if key.startswith(name)] for name in sources}
    assert abs(len(of["x"]) / len(keys) - 0.75) < 0.015  # 3.5 standard deviations
    for name, count in {"x": 10, "y": 5}.items():
        epochs = [of[name][i : i + count] for i in range(0, len(of[name]) - count, count)]
        assert all(set(epoch) == {f"{name}/s{i}" for i in range(count)} for epoch in epochs)
    again = PoolStream(sources, pool=50, seed=0, shares={"x": 3, "y": 1})
    met = Counter()
    for pool in islice(again, 20):
        for key, epoch in zip(pool["key"], pool["epoch"], strict=True):
            assert epoch == met[key]  # of its own source: how often it came before
            met[key] += 1
    resumed = PoolStream(sources, pool=50, seed=0, shares={"x": 3, "y": 1})
    stream = PoolStream(sources, pool=30, seed=0, shares={"x": 3, "y": 1})
    for _ in islice(stream, 145):  # beyond the first block of choices
        pass
    resumed.load_state_dict(stream.state_dict())
    assert keys_of(islice(resumed, 10)) == keys[4350:4850]


@pytest.mark.parametrize("shares", [{"x": 1}, {"x": 1, "y": 0}, {"x": 1, "y": 1, "z": 1}])
def test_shares_of_other_sources_are_refused(tmp_path, shares):
    make_small(tmp_path)
    with pytest.raises(DataError, match=r"shares must be a positive number for each"):
        PoolStream({"x": tmp_path, "y": tmp_path}, pool=1, seed=0, shares=shares)


def test_resampling_is_seeded_and_draws_shards_with_replacement(tmp_path):
    make_small(tmp_path, count=40, per_shard=4)

    def epochs(seed):
        stream = PoolStream(tmp_path, pool=40, seed=seed, resample=True)
        return [Counter(pool["key"]) for pool in islice(stream, 50)]

    assert epochs(0) == epochs(0) != epochs(1)
    missing = np.mean([40 - len(epoch) for epoch in epochs(0)]) / 40
    assert abs(missing - 0.9**10) < 0.05  # a shard is left out with probability (1 - 1/10)^10


# reading


def test_resume_in_the_middle_of_many_shards_reads_only_what_it_needs(tmp_path, monkeypatch):
    make_small(tmp_path, count=1000, per_shard=1)
    stream = PoolStream(tmp_path, pool=1, seed=0, buffer=20, memory_gib=0)
    for _ in islice(stream, 500):
        pass
    expected, state = next(stream)["key"], stream.state_dict()
    opened = []
    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k)
    )
    resumed = PoolStream(tmp_path, pool=1, seed=0, buffer=20, memory_gib=0)
    began = time.perf_counter()
    resumed.load_state_dict(state | {"position": [500], "drawn": 500})
    assert next(resumed)["key"] == expected
    assert time.perf_counter() - began < 2
    # manifest, the first shard for the shape of all samples, and the pool's
    assert len(set(opened)) <= 3


@pytest.mark.slow
def test_the_reader_holds_no_more_indexes_than_two_groups_of_shards(tmp_path):
    def num_records():  # one for each sample
        return sum(type(each) is Record for each in gc.get_objects())

    make_small(tmp_path, count=200, per_shard=5)
    before = num_records()
    stream = PoolStream(tmp_path, pool=3, seed=0, buffer=20, memory_gib=0)
    held = [num_records() - before for _ in islice(stream, 200)]
    assert 20 <= max(held) <= 2 * (20 + 5) + 5


def test_data_in_memory_are_read_once(tmp_path):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=3, seed=0)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    assert len(keys_of(islice(stream, 20))) == 60


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    make_small(tmp_path)
    stream = PoolStream(tmp_path, pool=10, seed=0, memory_gib=0)
    next(stream)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"train-000001\.tar must stay as it is while it is read"):
        next(stream)


@pytest.mark.parametrize("options", MODES[1:])
def test_unreadable_samples_stop_the_stream_beyond_the_budget_and_are_counted(tmp_path, options):
    make_small(tmp_path, count=40)
    (tmp_path / "train-000003.tar").unlink()  # 4 samples

    def drain(max_errors):
        stream = PoolStream(tmp_path, pool=8, seed=0, max_errors=max_errors, **options)
        return stream, keys_of(islice(stream, 15))

    stream, keys = drain(4)
    whole = [f"s{i}" for epoch in range(3) for i in slow_order([4] * 10, 0, 4096, epoch)]
    assert keys == [key for key in whole if key not in {"s12", "s13", "s14", "s15"}]
    assert stream.errors == {"train-000003.tar": 4}
    resumed = PoolStream(tmp_path, pool=8, seed=0, max_errors=4, **options)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.errors == stream.errors
    with pytest.raises(
        DataError, match=r"train-000003\.tar must be present, .* raise max_errors, 3, to"
    ):
        drain(3)


def test_tokens_are_int64(tmp_path):
    rows = [{"__key__": f"t{i}", "npy": np.arange(8, dtype=np.uint16) + i} for i in range(4)]
    shards = write_split(tmp_path, "train", rows, 2)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("npy",), {}, 0))
    for batch in [next(PoolStream(tmp_path, pool=4, seed=0)), *read_batches(tmp_path, "train", 4)]:
        assert batch["tokens"].dtype == torch.int64
        for key, tokens in zip(batch["key"], batch["tokens"].tolist(), strict=True):
            assert tokens == list(range(int(key[1:]), int(key[1:]) + 8))


def test_images_of_several_sizes_and_splits_without_images_are_refused(tmp_path):
    shards = write_split(tmp_path, "train", [sample("a"), sample("b", npy=np.zeros((1, 4, 4)))], 4)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("cls", "npy"), {}, 0))
    with pytest.raises(DataError, match=r"image of key 'b' must be of shape \(1, 8, 8\)"):
        PoolStream(tmp_path, pool=1, seed=0)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("cls",), {}, 0))
    with pytest.raises(DataError, match=r"fields must include one of .*'txt'\], got \['cls'\]"):
        PoolStream(tmp_path, pool=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("memory_gib", [0, 1])
def test_memory_is_flat_over_ten_thousand_pools(tmp_path, memory_gib):
    make_small(tmp_path, count=2000, per_shard=20)
    stream = PoolStream(tmp_path, pool=64, seed=0, buffer=200, memory_gib=memory_gib)
    for _ in islice(stream, 1000):
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in islice(stream, 10_000):
        pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"from {before} KiB by {grown} KiB in 10,000 pools")
    assert grown < 4096
