"""Damaged shards: never a wrong pairing of image and label, a hang, or an unexplained crash."""

import hashlib
import io
import json
import tarfile
import time
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from small_datasets import edit_shard, make_small, sample
from test_run import run_trainer

from selectflow.cli import main
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
from selectflow.report.page import examine
from selectflow.report.runs import load_run
from selectflow.run.ledger import read_ledger

NAME = "train-000001.tar"


def forge(root):
    """Make the manifest agree with the shards as they are now, so that no checksum gives away."""
    manifest = read_manifest(root)
    shards = []
    for shard in manifest.splits["train"]:
        data = (root / shard.name).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(replace(shard, bytes=len(data), sha256=sha256))
    write_manifest(root, replace(manifest, splits={"train": tuple(shards)}))


def truncate(data, rng):
    return data[: rng.integers(len(data))]


def flip(data, rng):
    damaged = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        damaged[at] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def swap(data, rng):
    """Exchange two members, or only their contents, or only their names."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    one, other = rng.choice(len(members), size=2, replace=False)
    (a, a_data), (b, b_data) = members[one], members[other]
    what = rng.integers(3)
    if what == 0:
        members[one], members[other] = members[other], members[one]
    elif what == 1:
        members[one], members[other] = (a, b_data), (b, a_data)
    else:
        a.name, b.name = b.name, a.name
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def check_mutations(root, count):
    make_small(root, count=12)
    whole = (root / NAME).read_bytes()
    rng = np.random.default_rng(0)
    for index in range(count):
        mutated = (truncate, flip, swap)[index % 3](whole, rng)
        (root / NAME).write_bytes(mutated)
        if mutated == whole:
            continue
        for memory_gib in (0, 1):
            with pytest.raises(DataError, match=NAME):
                next(PoolStream(root, pool=12, seed=index, memory_gib=memory_gib))
        tolerant = PoolStream(root, pool=12, seed=index, max_errors=4)
        for pool in islice(tolerant, 2):
            assert set(pool["key"]) == {f"s{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)}
            assert pool["key"] == [f"s{label}" for label in pool["label"].tolist()]
            assert (pool["image"] == pool["label"][:, None, None, None]).all()
        assert tolerant.errors == {NAME: 4}


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


def test_mutated_shards_give_the_strict_error_and_no_sample(tmp_path):
    check_mutations(tmp_path, 60)


@pytest.mark.slow
def test_a_thousand_mutated_shards_give_the_strict_error_and_no_sample(tmp_path):
    check_mutations(tmp_path, 1000)


def test_a_cut_is_named_by_the_member_it_goes_through(tmp_path):
    make_small(tmp_path)
    path = tmp_path / NAME
    with tarfile.open(path) as tar:
        offset = tar.getmember("s5.npy").offset_data
    path.write_bytes(path.read_bytes()[: offset + 10])
    with pytest.raises(DataError, match=rf"{NAME} must be a tar .* end inside member 's5\.npy'"):
        list(read_split(tmp_path, "train"))


def test_a_record_without_a_field_costs_itself_alone_where_the_checksum_holds(tmp_path):
    make_small(tmp_path)
    edit_shard(tmp_path, NAME, lambda members: [m for m in members if m[0].name != "s5.cls"])
    forge(tmp_path)
    stream = PoolStream(tmp_path, pool=10, seed=0, max_errors=1)
    assert sorted(next(stream)["key"]) == sorted(f"s{i}" for i in range(10) if i != 5)
    assert stream.errors == {NAME: 1}
    with pytest.raises(DataError, match=rf"{NAME} must hold .* key 's5', got none of \['cls'\]"):
        PoolStream(tmp_path, pool=10, seed=0)


def write_images(root):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(4, 3, 8, 8), dtype=np.uint8)
    samples = [{"__key__": f"i{i}", "png": pixels[i], "cls": i} for i in range(4)]
    shards = write_split(root, "train", samples, 4)
    write_manifest(root, Manifest({"train": tuple(shards)}, ("cls", "png"), {}, 0))
    return pixels


def test_images_of_bytes_are_between_zero_and_one(tmp_path):
    pixels = write_images(tmp_path)
    batch = next(PoolStream(tmp_path, pool=4, seed=0, shuffle=False))
    np.testing.assert_array_equal(batch["image"].numpy(), pixels.astype(np.float32) / 255)


def test_an_undecodable_image_names_shard_and_key_and_costs_itself_alone(tmp_path):
    write_images(tmp_path)
    name = "train-000000.tar"
    edit_shard(
        tmp_path,
        name,
        lambda ms: [(i, d[:40] if i.name == "i2.png" else d) for i, d in ms],
    )
    forge(tmp_path)
    message = rf"{name} must hold a field 'png' of key 'i2' that can be decoded"
    with pytest.raises(DataError, match=message):
        PoolStream(tmp_path, pool=4, seed=0)
    stream = PoolStream(tmp_path, pool=4, seed=0, max_errors=1)
    assert sorted(next(stream)["key"]) == ["i0", "i1", "i3"]


def test_other_image_formats_are_not_tried(tmp_path):
    write_images(tmp_path)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "GIF")
    edit_shard(
        tmp_path,
        "train-000000.tar",
        lambda ms: [(i, file.getvalue() if i.name == "i2.png" else d) for i, d in ms],
    )
    forge(tmp_path)
    with pytest.raises(DataError, match="'png' of key 'i2' that can be decoded"):
        PoolStream(tmp_path, pool=4, seed=0)


def test_skipping_a_missing_shard_takes_no_time(tmp_path, caplog):
    make_small(tmp_path, count=400, per_shard=4)
    for index in range(1, 51):
        (tmp_path / f"train-{index:06d}.tar").unlink()
    stream = PoolStream(tmp_path, pool=400, seed=0, max_errors=200)
    began = time.perf_counter()
    assert len(next(stream)["key"]) == 200
    assert time.perf_counter() - began < 2
    assert sum(stream.errors.values()) == 200
    assert len(caplog.records) == 50  # what is wrong with a shard is said once


def test_a_trainer_goes_on_without_a_damaged_shard_and_what_it_kept_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    make_digits(tmp_path / "data", label_noise=0.4)
    shard = tmp_path / "data" / NAME
    shard.write_bytes(shard.read_bytes()[:-5000])
    options = ["steps=20", "track.wandb=disabled", "data.root=data", "data.memory_gib=0"]
    strict = run_trainer(tmp_path, "configs/digits_online.yaml", "name=strict", *options)
    assert strict.returncode == 2
    assert f"error: shard {NAME} must be a tar file" in strict.stderr
    options += ["name=run", "data.max_errors=256"]
    done = run_trainer(tmp_path, "configs/digits_online.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(NAME) == 1
    run_dir = tmp_path / "runs" / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["errors_by_shard"] == {NAME: summary["data/errors"]}
    assert main(["select", "write-shards", str(run_dir), "--out", "kept"]) == 0
    kept = {row["key"] for row in read_ledger(run_dir).to_pylist() if row["kept"]}
    assert {each["__key__"] for each in read_split(tmp_path / "kept", "train")} == kept
    assert len(examine("run", load_run(run_dir), 4).best) == 4


def test_a_pool_without_a_readable_sample_stops_the_stream(tmp_path):
    make_small(tmp_path)
    (tmp_path / NAME).unlink()
    stream = PoolStream(tmp_path, pool=4, seed=0, shuffle=False, max_errors=9)
    next(stream)
    before = stream.state_dict()
    for _ in range(2):  # and it stays where it was
        with pytest.raises(DataError, match=f"a pool must hold a readable sample, .*{NAME}"):
            next(stream)
        assert stream.state_dict()["position"] == before["position"]


def test_samples_with_arrays_of_objects_are_refused_by_the_fast_decoder(tmp_path):
    make_small(tmp_path)
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    edit_shard(
        tmp_path,
        NAME,
        lambda ms: [(i, file.getvalue() if i.name == "s5.npy" else d) for i, d in ms],
    )
    forge(tmp_path)
    with pytest.raises(DataError, match=rf"{NAME} must hold a field 'npy' of key 's5'.*pickle"):
        list(read_split(tmp_path, "train"))


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.array(3), np.zeros((0, 2))])
def test_arrays_of_any_layout_survive(tmp_path, array):
    shards = write_split(tmp_path, "train", [sample("a", npy=array)], 1)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("cls", "npy"), {}, 0))
    (read,) = read_split(tmp_path, "train")
    np.testing.assert_array_equal(read["npy"], array)
    assert read["npy"].flags.writeable
