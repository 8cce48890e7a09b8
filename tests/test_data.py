import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_datasets import edit_shard, keys_of, make_small, sample

from selectflow.data import (
    DataError,
    Manifest,
    PoolStream,
    make_digits,
    read_batches,
    read_manifest,
    read_metadata,
    read_split,
    write_manifest,
    write_split,
)

NUM_TRAIN, NUM_TARGET, NUM_TEST = 1197, 200, 400


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    root = tmp_path_factory.mktemp("noisy")
    make_digits(root, label_noise=0.4, seed=7)
    return root


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("clean")
    make_digits(root)
    return root


# digits


def test_digits_are_reproducible_byte_for_byte(noisy, tmp_path):
    again = make_digits(tmp_path, label_noise=0.4, seed=7)
    files = sorted(path.name for path in noisy.iterdir())
    assert files == sorted(path.name for path in tmp_path.iterdir())
    for name in files:
        assert (noisy / name).read_bytes() == (tmp_path / name).read_bytes(), name
    for shards in again.splits.values():
        for shard in shards:
            data = (tmp_path / shard.name).read_bytes()
            assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_digits_equal_scikit_learn(noisy):
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    for split in ("train", "target", "test"):
        for each in read_split(noisy, split):
            index = int(each["__key__"].removeprefix("digit-"))
            assert each["npy"].dtype == np.float32
            np.testing.assert_array_equal(each["npy"][0] * 16, bunch.images[index])
            assert each["json"]["true_label"] == bunch.target[index]


def test_noise_share_is_exact_and_every_altered_sample_is_marked(noisy):
    for split, expected in {"train": round(0.4 * NUM_TRAIN), "target": 0, "test": 0}.items():
        samples = list(read_split(noisy, split))
        wrong = [each["cls"] != each["json"]["true_label"] for each in samples]
        assert wrong == [each["json"]["altered"] for each in samples]
        assert sum(wrong) == expected


def test_noise_is_uniform_over_the_other_classes(tmp_path):
    make_digits(tmp_path, label_noise=1.0)
    shifts = Counter(
        (each["cls"] - each["json"]["true_label"]) % 10 for each in read_split(tmp_path, "train")
    )
    assert set(shifts) == set(range(1, 10))
    expected = NUM_TRAIN / 9
    chi_square = sum((count - expected) ** 2 / expected for count in shifts.values())
    assert chi_square < 26.1  # 0.999 quantile at 8 degrees of freedom


def test_seed_changes_which_labels_are_altered(noisy, tmp_path):
    make_digits(tmp_path, label_noise=0.4, seed=8)
    assert read_metadata(noisy, "train") != read_metadata(tmp_path, "train")


def test_splits_are_disjoint_stratified_and_equal_across_noise(noisy, clean):
    counts = {"train": NUM_TRAIN, "target": NUM_TARGET, "test": NUM_TEST}
    classes = Counter()
    for split in counts:
        classes.update(m["true_label"] for m in read_metadata(clean, split).values())
    seen = set()
    for split, count in counts.items():
        metadata = read_metadata(clean, split)
        assert list(metadata) == list(read_metadata(noisy, split))
        assert len(metadata) == count
        assert seen.isdisjoint(metadata)
        seen.update(metadata)
        here = Counter(m["true_label"] for m in metadata.values())
        for label, total in classes.items():
            assert abs(here[label] - total * count / 1797) < 2
    assert len(seen) == 1797


def test_same_options_reuse_the_shards(clean):
    before = {path.name: path.stat().st_mtime_ns for path in clean.iterdir()}
    assert make_digits(clean) == read_manifest(clean)
    assert before == {path.name: path.stat().st_mtime_ns for path in clean.iterdir()}


@pytest.mark.parametrize("option", [{"label_noise": 0.1}, {"seed": 5}, {"per_shard": 100}])
def test_other_options_are_refused_by_name(clean, option):
    name, value = next(iter(option.items()))
    with pytest.raises(DataError, match=rf"{name} must be .* got {value}; choose another root"):
        make_digits(clean, **option)


@pytest.mark.parametrize(
    "option", [{"label_noise": 1.5}, {"label_noise": float("nan")}, {"seed": -1}, {"per_shard": 0}]
)
def test_options_out_of_range_are_refused(tmp_path, option):
    with pytest.raises(DataError, match=f"{next(iter(option))} must be"):
        make_digits(tmp_path / "new", **option)


# shards and manifest


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


def test_missing_shard_is_named(tmp_path):
    make_small(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar must be present"):
        PoolStream(tmp_path, pool=2, seed=0)


def test_missing_field_names_shard_and_key(tmp_path):
    make_small(tmp_path)
    edit_shard(
        tmp_path, "train-000001.tar", lambda members: [m for m in members if m[0].name != "s5.cls"]
    )
    with pytest.raises(DataError, match=r"train-000001\.tar must hold .* key 's5', .*\['cls'\]"):
        list(read_split(tmp_path, "train"))


def test_dropped_and_swapped_samples_are_refused(tmp_path):
    make_small(tmp_path)
    edit_shard(tmp_path, "train-000002.tar", lambda members: members[:3])
    with pytest.raises(DataError, match=r"train-000002\.tar must hold 2 samples, got 1"):
        list(read_split(tmp_path, "train"))

    def swap_labels(members):  # two whole samples, but each with the other's label
        data = {info.name: data for info, data in members}
        data["s0.cls"], data["s1.cls"] = data["s1.cls"], data["s0.cls"]
        return [(info, data[info.name]) for info, _ in members]

    make_small(tmp_path)
    edit_shard(tmp_path, "train-000000.tar", swap_labels)
    with pytest.raises(DataError, match=r"train-000000\.tar must have \d+ bytes and sha256"):
        list(read_split(tmp_path, "train"))


def test_pickled_arrays_are_not_loaded(tmp_path):
    manifest = make_small(tmp_path, count=1)
    pickled = np.array([{}], dtype=object)
    with (tmp_path / "pickled.npy").open("wb") as file:
        np.save(file, pickled, allow_pickle=True)
    data = (tmp_path / "pickled.npy").read_bytes()
    name = "train-000000.tar"
    edit_shard(
        tmp_path, name, lambda ms: [(i, data if i.name.endswith("npy") else d) for i, d in ms]
    )
    tar = (tmp_path / name).read_bytes()
    shard = manifest.splits["train"][0]
    forged = replace(shard, bytes=len(tar), sha256=hashlib.sha256(tar).hexdigest())
    write_manifest(tmp_path, replace(manifest, splits={"train": (forged,)}))
    with pytest.raises(DataError, match=r"train-000000\.tar .*'npy' of key 's0' that can be dec"):
        list(read_split(tmp_path, "train"))


def test_every_truncation_and_every_flipped_byte_is_refused(tmp_path):
    name = make_small(tmp_path, count=2).splits["train"][0].name
    whole = (tmp_path / name).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in range(0, len(whole), 256)]
    for at in rng.integers(len(whole), size=100):
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << int(at) % 8)]) + whole[at + 1 :])
    for data in damaged:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            list(read_split(tmp_path, "train"))


def test_missing_dataset_says_what_to_do(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"root must be a dataset directory .*; write the data"):
            read_manifest(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "\xff",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"sha256"', '"md5"'),
        lambda text: text.replace("train-000000.tar", "../train-000000.tar"),
        lambda text: text.replace('"count": 4', '"count": "4"'),
        lambda text: text.replace('"fields"', '"columns"'),
    ],
)
def test_malformed_manifest_is_refused(tmp_path, edit):
    make_small(tmp_path)
    path = tmp_path / "manifest.json"
    text = edit(path.read_text())
    assert text != path.read_text()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json must be a manifest of version 1, got"):
        read_manifest(tmp_path)


def test_unknown_split_names_those_there_are(clean):
    with pytest.raises(DataError, match=r"one of \['target', 'test', 'train'\], got 'val'"):
        read_batches(clean, "val", 32)


# whole splits


def test_batches_hold_the_split_once_in_stored_order(noisy):
    batches = read_batches(noisy, "target", 64)
    assert [len(batch["key"]) for batch in batches] == [64, 64, 64, 8]
    stored = list(read_split(noisy, "target"))
    assert keys_of(batches) == [each["__key__"] for each in stored]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [s["cls"] for s in stored]
    images = torch.cat([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images.numpy(), np.stack([each["npy"] for each in stored]))
    with pytest.raises(DataError, match="batch_size must be >= 1"):
        read_batches(noisy, "target", 0)
