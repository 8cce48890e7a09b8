"""Samples to shards, one by one and packed: what is written, and what is refused."""

from itertools import islice

import numpy as np
import pytest
from small_datasets import make_small, sample

from selectflow.data import (
    DataError,
    Manifest,
    PoolStream,
    make_digits,
    read_manifest,
    read_split,
    write_manifest,
    write_split,
)


def test_samples_round_trip_in_stored_order(tmp_path):
    manifest = make_small(tmp_path)
    assert [shard.count for shard in manifest.splits["train"]] == [4, 4, 2]
    for i, each in enumerate(read_split(tmp_path, "train")):
        assert each["__key__"] == f"s{i}"
        np.testing.assert_array_equal(each["npy"], np.full((1, 8, 8), i, dtype=np.float32))
        assert (each["cls"], each["json"]) == (i, {"row": i})
    assert read_manifest(tmp_path) == manifest
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(
    "key",
    ["", "a.b", "/a", "a/", "a//b", "../a", "a b", "__meta__", "a\n", "é", "x" * 91, 3, None],
)
def test_bad_keys_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="__key__ must be"):
        write_split(tmp_path, "train", [sample(key)], 4)


@pytest.mark.parametrize("key", ["a/b-1_c", "_a", "a__", "x" * 90, "/".join("a" * 45)])
def test_good_keys_survive(tmp_path, key):
    shards = write_split(tmp_path, "train", [sample(key)], 4)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("cls", "npy"), {}, 0))
    assert [each["__key__"] for each in read_split(tmp_path, "train")] == [key]


def test_duplicate_keys_are_refused_across_shards_and_nothing_half_written_is_left(tmp_path):
    samples = [sample("a"), sample("b"), sample("c"), sample("a")]
    with pytest.raises(DataError, match=r"__key__ must be unique in its split, got 'a' twice"):
        write_split(tmp_path, "train", samples, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "must be at least 1, got 0"),
        ([{"__key__": "a"}], r"got \[\] for key 'a'"),
        ([sample("a", pickle=b"")], r"out of \['cls', .*\], got .*'pickle'"),
        ([sample("a"), {"__key__": "b", "cls": 1}], r"got \['cls'\] for key 'b'"),
        ([sample("a", npy=np.array([None]))], "'npy' of key 'a' must be storable without pickle"),
        ([sample("a", cls=1.5)], "'cls' of key 'a'"),
        ([sample("a", json={"x": float("nan")})], "'json' of key 'a'"),
    ],
)
def test_bad_samples_are_refused(tmp_path, samples, message):
    with pytest.raises(DataError, match=message):
        write_split(tmp_path, "train", samples, 4)


# packing and sizes


def write(root, samples, per_shard=100, **options):
    shards = write_split(root, "train", samples, per_shard, **options)
    fields = tuple(sorted(samples[0].keys() - {"__key__"}))
    write_manifest(root, Manifest({"train": tuple(shards)}, fields, {}, 0, options.get("pack", 1)))
    return shards


@pytest.mark.parametrize("pack", [2, 5, 7, 64])
def test_packed_samples_are_the_unpacked_ones_under_stable_ids(tmp_path, pack):
    samples = [sample(f"s{i}", i, txt=f"text {i}") for i in range(23)]
    write(tmp_path, samples, per_shard=10, pack=pack)
    read = list(read_split(tmp_path, "train"))
    in_shard = -(-10 // pack) * pack  # a record is never divided
    for i, each in enumerate(read):
        shard, place = divmod(i, in_shard)
        record = i // pack
        assert each["__key__"] == f"train-{shard:06d}/{record:06d}/{place % pack}"
        assert (each["cls"], each["json"], each["txt"]) == (i, {"row": i}, f"text {i}")
        np.testing.assert_array_equal(each["npy"], samples[i]["npy"])
    assert len(read) == 23


@pytest.mark.parametrize("memory_gib", [0, 1])
def test_packed_samples_stream_in_the_order_of_the_unpacked_ones(tmp_path, memory_gib):
    make_digits(tmp_path / "packed", per_shard=256, pack=32)
    make_digits(tmp_path / "single", per_shard=256)
    options = {"pool": 64, "seed": 3, "buffer": 300, "memory_gib": memory_gib}
    packed = PoolStream(tmp_path / "packed", **options)
    single = PoolStream(tmp_path / "single", **options)
    for one, other in islice(zip(packed, single, strict=True), 40):
        assert (one["image"] == other["image"]).all()
        assert (one["label"] == other["label"]).all()


def test_packing_makes_small_samples_small(tmp_path):
    def size(pack):
        manifest = make_digits(tmp_path / str(pack), pack=pack)
        return sum(shard.bytes for shard in manifest.splits["train"])

    assert size(64) < size(1) / 5


def test_shards_close_at_the_first_of_count_and_bytes(tmp_path):
    samples = [sample(f"s{i}", i) for i in range(20)]
    shards = write(tmp_path, samples, per_shard=8, max_bytes=10**9)
    assert [shard.count for shard in shards] == [8, 8, 4]
    shards = write(tmp_path, samples, per_shard=8, max_bytes=1000)  # a sample has about 400
    assert [shard.count for shard in shards] == [3] * 6 + [2]


def test_a_record_of_another_length_than_its_labels_is_refused(tmp_path):
    write(tmp_path, [sample(f"s{i}", i) for i in range(4)], pack=4)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", [sample(f"s{i}", i) for i in range(3)], pack=4)
    short = next(iter(read_split(tmp_path / "other", "train")))
    assert short["cls"] == 0
    manifest = read_manifest(tmp_path / "other")
    shard = manifest.splits["train"][0]
    longer = type(shard)(shard.name, 4, shard.bytes, shard.sha256)
    write_manifest(
        tmp_path / "other", Manifest({"train": (longer,)}, manifest.fields, {}, 0, pack=4)
    )
    with pytest.raises(DataError, match=r"train-000000\.tar must hold 4 samples in field .* got 3"):
        list(read_split(tmp_path / "other", "train"))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([sample("a"), sample("b", npy=np.zeros(3))], "'npy' of key 'a to b' .* several shapes"),
        ([sample("a", jpg=b"")], r"out of \['cls', 'json', 'npy', 'txt'\] that can be packed"),
        ([sample("a"), sample("b", cls=1.5)], "'cls' of key 'a to b'"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, samples, message):
    with pytest.raises(DataError, match=message):
        write_split(tmp_path, "train", samples, 4, pack=2)


@pytest.mark.parametrize("option", [{"pack": 0}, {"max_bytes": 0}])
def test_sizes_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(DataError, match=f"{next(iter(option))} must be >= 1, got 0"):
        write_split(tmp_path, "train", [sample("a")], 4, **option)
