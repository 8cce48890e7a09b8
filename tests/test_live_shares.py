"""A stream whose shares follow a selection: in any number of workers and processes, and resumed."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_datasets import make_small, sample
from torch import nn

from selectflow import Selector
from selectflow.control.shares import AutoShares, ShareSchedule, live_shares, log_rates
from selectflow.core.batches import take
from selectflow.data import DataError, Manifest, PoolStream, write_manifest, write_split
from selectflow.run.task import PoolSource

SETTINGS = AutoShares(delay=5, memory=10, prior=2)
POOL = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of 40, 20 and 7 samples; labels say which: 0.., 100.. and 200.."""
    root = tmp_path_factory.mktemp("sources")
    for place, (name, count) in enumerate({"a": 40, "b": 20, "c": 7}.items()):
        make_small(root / name, count, per_shard=6, first=100 * place)
    return {name: root / name for name in "abc"}


def selection(pool, is_ranked=True):
    """Keeps a third: those of source b, then the lowest numbers."""
    worth = [
        (name != "b", int(label)) for name, label in zip(pool["source"], pool["label"], strict=True)
    ]
    order = sorted(range(len(worth)), key=worth.__getitem__)
    return SimpleNamespace(
        pool=pool, indices=torch.tensor(order[: len(order) // 3]), is_ranked=is_ranked,
        scores=torch.zeros(len(order)), losses=pool["label"].float(),
    )  # fmt: skip


def followed(stream, num):
    """Keys and shares of pools that the stream was told of."""
    found = []
    for pool in islice(stream, num):
        stream.follow(selection(pool))
        found.append((pool["key"], stream.shares))
    return found


# --- what is drawn --------------------------------------------------------------------------------


def test_each_pool_has_the_shares_after_the_pools_up_to_delay_before_it(sources):
    """Against the rule, pool by pool; a source's share of many pools is what it should be."""
    stream = PoolStream(sources, pool=2000, seed=0, shares=SETTINGS)
    start = np.array([40, 20, 7]) / 67
    counts, expected = np.zeros((2, 3)), [start] * (SETTINGS.delay + 1)
    for number, pool in enumerate(islice(stream, 20)):
        kept = selection(pool)
        num = Counter(pool["source"])
        assert [num[name] / 2000 for name in "abc"] == pytest.approx(expected[number], abs=0.05)
        of_kept = Counter(pool["source"][i] for i in kept.indices)
        counts = 0.9 * counts + [[each[name] for name in "abc"] for each in (num, of_kept)]
        expected.append(live_shares(start, log_rates(*counts, 2), SETTINGS))
        stream.follow(kept)
        assert list(stream.shares.values()) == pytest.approx(expected[-1], rel=1e-12)
    assert stream.shares["b"] > 0.6


def test_nothing_moves_where_nothing_was_ranked(sources):
    stream = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    fixed = PoolStream(sources, pool=POOL, seed=0, shares="size")
    for ranked in (False, True, False):
        before = stream.shares
        pool = next(stream)
        assert pool["key"] == next(fixed)["key"]
        stream.follow(selection(pool, ranked))
        assert (stream.shares == before) is not ranked
    told = selection(next(stream))
    told.scores = None  # selection is off
    before = stream.shares
    stream.follow(told)
    assert stream.shares == before


def test_losses_are_followed_upwards(sources):
    stream = PoolStream(sources, pool=POOL, seed=0, shares="loss")
    followed(stream, 8)
    assert stream.shares["c"] > 7 / 67
    assert stream.shares["a"] < 40 / 67


def test_scheduled_shares_are_those_of_the_pool(sources):
    schedule = ShareSchedule([(0, {"a": 1, "b": 0, "c": 0}), (3, {"a": 0, "b": 1, "c": 0})], "step")
    stream = PoolStream(sources, pool=POOL, seed=0, shares=schedule)
    assert ["".join(sorted(set(pool["source"]))) for pool in islice(stream, 5)] == list("aaabb")
    again = PoolStream(sources, pool=POOL, seed=0, shares=schedule)
    again.load_state_dict(stream.state_dict())
    assert set(next(again)["source"]) == {"b"}


# --- the same, whoever draws and when -------------------------------------------------------------


@pytest.mark.parametrize("memory_gib", [0, 1])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_to_the_bit_while_shares_move(sources, num_workers, memory_gib):
    how = {"pool": POOL, "seed": 3, "shares": SETTINGS, "memory_gib": memory_gib}
    whole = followed(PoolStream(sources, **how), 24)
    assert whole[4][1] != whole[12][1] != whole[20][1]
    first = PoolStream(sources, **how, num_workers=num_workers)
    assert followed(first, 11) == whole[:11]
    rest = PoolStream(sources, **how, num_workers=num_workers)
    rest.load_state_dict(first.state_dict())
    assert followed(rest, 13) == whole[11:]


@pytest.mark.parametrize("peeks", [[0, 3, 1, 0, 2], [2, 2, 2, 2, 2]])
def test_pools_that_were_peeked_at_keep_the_shares_of_their_time(sources, peeks):
    """As in a run: a look-ahead draws pools that are told of later, and once more on resumption."""
    how = {"pool": POOL, "seed": 3, "shares": SETTINGS}
    whole = followed(PoolStream(sources, **how), 20)

    def steps(source, num):
        found = []
        for step, pool in enumerate(islice(source, num)):
            list(islice(source.upcoming(), peeks[step % 5]))
            source.follow(selection(pool))
            found.append((pool["key"], source.shares))
        return found

    source = PoolSource(PoolStream(sources, **how), torch.device("cpu"))
    assert steps(source, 9) == whole[:9]
    list(islice(source.upcoming(), 4))
    resumed = PoolSource(PoolStream(sources, **how), torch.device("cpu"))
    resumed.load_state_dict(source.state_dict())
    assert steps(resumed, 11) == whole[9:]


def linear_losses(model, batch):
    return nn.functional.cross_entropy(
        model(batch["image"].flatten(1).double() / 100), batch["label"] // 100, reduction="none"
    )


def selector_of(seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Linear(64, 3).double()
    target = [{"image": torch.full((4, 1, 8, 8), 110.0), "label": torch.full((4,), 110)}]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return Selector(model, optimizer, linear_losses, target, keep=4, seed=seed, **options)


@pytest.mark.parametrize("options", [{"horizon": 0}, {"horizon": 3}, {"strategy": "uniform"}])
def test_a_selector_tells_the_stream_itself(sources, options):
    """`Selector.stream` does what calling `select` and `follow` does; uniform moves nothing."""
    told = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    selector, found = selector_of(**options), []
    batches = selector.stream(told)
    for _ in range(12):
        found.append(next(batches)["key"])
    pools = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    source, selector = PoolSource(pools, torch.device("cpu")), selector_of(**options)
    for key in found:
        assert selector.select(next(source), source.upcoming())["key"] == key
        pools.follow(selector.last)
    assert told.shares == pools.shares
    assert (pools.shares == pytest.approx({"a": 40 / 67, "b": 20 / 67, "c": 7 / 67})) is (
        "strategy" in options
    )


def in_processes(sources):
    """Shares of a rank, which has its own pools."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    how = {"pool": POOL, "seed": 3, "shares": SETTINGS, "rank": rank, "world_size": size}
    return followed(PoolStream(sources, **how), 15)


def test_two_processes_have_one_share_from_the_counts_of_both(sources, two):
    first, second = two.run(in_processes, sources)
    assert [shares for _, shares in first] == [shares for _, shares in second]
    stream = PoolStream(sources, pool=2 * POOL, seed=3, shares=SETTINGS)
    for pool, (own, shares), (other, _) in zip(islice(stream, 15), first, second, strict=True):
        assert pool["key"] == own + other
        parts = [take(pool, slice(POOL)), take(pool, slice(POOL, None))]
        kept = torch.cat([selection(parts[0]).indices, selection(parts[1]).indices + POOL])
        whole = selection(pool)
        whole.indices = kept
        stream.follow(whole)
        assert stream.shares == shares


# --- sources that end, that are many, that are added ----------------------------------------------


def test_no_sample_comes_more_often_than_max_epochs(sources):
    shares = {"a": 1, "b": 1, "c": 100}
    stream = PoolStream(sources, pool=POOL, seed=0, shares=shares, max_epochs=3)
    pools = list(stream)
    met = Counter(key for pool in pools for key in pool["key"])
    assert len(pools) == 3 * 67 // POOL
    assert max(met.values()) == 3
    assert sum(met.values()) == len(pools) * POOL
    assert all(name == "c" for name in pools[0]["source"][:8])
    resumed = PoolStream(sources, pool=POOL, seed=0, shares=shares, max_epochs=3)
    stream = PoolStream(sources, pool=POOL, seed=0, shares=shares, max_epochs=3)
    list(islice(stream, 5))
    resumed.load_state_dict(stream.state_dict())
    assert [pool["key"] for pool in resumed] == [pool["key"] for pool in pools[5:]]


def test_max_epochs_ends_a_stream_without_shares(sources):
    met = Counter(key for pool in PoolStream(sources, pool=10, seed=0, max_epochs=2)
                  for key in pool["key"])  # fmt: skip
    assert set(met.values()) <= {1, 2}
    assert sum(met.values()) == 130


def test_hundreds_of_sources_of_unequal_size(tmp_path):
    sizes = {f"s{i}": 1 + i % 3 for i in range(150)}
    for name, size in sizes.items():
        make_small(tmp_path / name, size)
    sources = {name: tmp_path / name for name in sizes}
    stream = PoolStream(sources, pool=3000, seed=0, shares=AutoShares())
    pool = next(stream)
    assert len(set(pool["source"])) == 150
    stream.follow(selection(pool))
    assert sum(stream.shares.values()) == pytest.approx(1)
    assert min(stream.shares.values()) >= 0.1 / 300


def test_a_source_is_added_on_resumption(sources):
    two = {name: sources[name] for name in "ab"}
    stream = PoolStream(two, pool=POOL, seed=0, shares=SETTINGS)
    followed(stream, 8)
    grown = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    grown.load_state_dict(stream.state_dict())
    assert 0.5 * 7 / 67 < grown.shares["c"] < 7 / 67 < 1
    pools = list(islice(stream, SETTINGS.delay))  # their shares are of before
    for pool, expected in zip(islice(grown, SETTINGS.delay), pools, strict=True):
        assert pool["key"] == expected["key"]
        assert pool["epoch"] == expected["epoch"]
        grown.follow(selection(pool))
    assert "c" in next(grown)["source"] + next(grown)["source"]
    other = PoolStream({"c": sources["c"]} | two, pool=POOL, seed=0, shares=SETTINGS)
    with pytest.raises(DataError, match="fingerprint must be"):  # new ones come last
        other.load_state_dict(stream.state_dict())


# --- records that name their source ---------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One dataset whose records name their source in key and json; a fifth is of "x"."""
    root = tmp_path_factory.mktemp("mixed")
    names = ["x" if i % 5 == 0 else "y" for i in range(50)]
    records = [
        sample(f"{name}/{i}", i, json={"origin": name, "row": i}) for i, name in enumerate(names)
    ]
    shards = write_split(root, "train", records, 7)
    write_manifest(root, Manifest({"train": tuple(shards)}, ("cls", "json", "npy"), {}, 0))
    return root


@pytest.mark.parametrize("by", ["key", "json.origin"])
def test_records_name_their_source(mixed, by):
    stream = PoolStream(mixed, pool=500, seed=0, by=by, shares={"x": 1, "y": 1})
    pool = next(stream)
    assert pool["source"] == [key[0] for key in pool["key"]]
    assert abs(Counter(pool["source"])["x"] - 250) < 60
    times = Counter(pool["key"])
    for name, size in {"x": 10, "y": 40}.items():  # exact epochs of each
        met = [times[key] for key in times if key[0] == name]
        assert len(met) == size
        assert max(met) - min(met) <= 1
    plain = PoolStream(mixed, pool=20, seed=0, by=by)
    assert next(plain)["key"] == next(PoolStream(mixed, pool=20, seed=0))["key"]


def test_shards_may_be_the_sources(mixed):
    stream = PoolStream(mixed, pool=70, seed=0, by="shard", shares="size")
    assert stream.sources == [f"train-{i:06d}" for i in range(8)]
    pool = next(stream)
    number = [int(key[2:]) // 7 for key in pool["key"]]
    assert pool["source"] == [f"train-{i:06d}" for i in number]


# --- refused --------------------------------------------------------------------------------------


def test_a_stream_that_is_not_told_says_so(sources):
    stream = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    list(islice(stream, SETTINGS.delay + 1))
    with pytest.raises(DataError, match=r"follow what was kept of the first 1 pools, but of 0"):
        next(stream)
    pool = next(PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS))
    stream.follow(selection(pool))
    assert len(next(stream)["key"]) == POOL  # and goes on


def test_what_cannot_be_followed_is_refused(sources):
    stream = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    pool = next(stream)
    told = selection(pool)
    del pool["source"]
    with pytest.raises(DataError, match=r"list 'source' .* got \['epoch', 'image', 'key'"):
        stream.follow(told)
    pool = next(stream)
    stream.follow(selection(pool))
    stream.follow(selection(pool))
    with pytest.raises(DataError, match="once for each pool, got a call more than the 2"):
        stream.follow(selection(pool))
    stream = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS, world_size=2)
    with pytest.raises(DataError, match=r"all 2 processes of the stream joined .* got 1"):
        stream.follow(selection(next(stream)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": "live"}, "shares must be .* got 'live'"),
        ({"shares": AutoShares(start={"a": 1})}, "for each of the sources"),
        ({"shares": ShareSchedule([(0, {"a": 1})])}, "for each of the sources"),
        ({"shares": SETTINGS, "num_workers": 6}, "num_workers must be <= 5"),
        ({"by": "key"}, "by must be left out where sources are given by name"),
        ({"max_epochs": 0}, "max_epochs must be >= 1, got 0"),
        ({"max_epochs": 2, "resample": True}, "max_epochs must be left out with resample"),
    ],
)
def test_options_that_do_not_fit_are_refused(sources, options, message):
    with pytest.raises(DataError, match=message):
        PoolStream(sources, pool=POOL, seed=0, **options)


@pytest.mark.parametrize(
    ("by", "message"),
    [("origin", "by must be 'shard', 'key' or 'json.<field>'"), ("json.place", "lacks")],
)
def test_records_that_do_not_name_their_source_are_refused(mixed, by, message):
    with pytest.raises(DataError, match=message):
        PoolStream(mixed, pool=POOL, seed=0, by=by, shares="size")


def test_live_shares_in_workers_of_a_loader_are_refused(sources):
    stream = PoolStream(sources, pool=POOL, seed=0, shares=SETTINGS)
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    with pytest.raises(DataError, match="live shares need the stream in the process that selects"):
        next(iter(loader))
