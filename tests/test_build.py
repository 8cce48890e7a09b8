"""Datasets as they are made: packed and unpacked, from folders, torchvision and source text."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from small_datasets import edit_shard, make_small, sample

from selectflow.cli import main
from selectflow.data import (
    DataError,
    Layout,
    Manifest,
    PoolStream,
    make_digits,
    make_folder,
    make_torchvision,
    read_manifest,
    read_split,
    verify,
    write_manifest,
    write_split,
)


def write(root, samples, per_shard=100, **options):
    shards = write_split(root, "train", samples, per_shard, **options)
    fields = tuple(sorted(samples[0].keys() - {"__key__"}))
    write_manifest(root, Manifest({"train": tuple(shards)}, fields, {}, 0, options.get("pack", 1)))
    return shards


def files_of(root):
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}


# packing and sizes


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


# datasets


def write_pictures(folder, count=12):
    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("cat", "dog")[index % 2] / f"p {index}.{('png', 'jpg')[index % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 60, 3), index, np.uint8)
        pixels[:, :5] = rng.integers(256)  # left of the middle square
        Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("pack", [1, 4])
def test_a_folder_becomes_square_images_of_its_classes(tmp_path, pack):
    write_pictures(tmp_path / "in")
    options = {"size": 10, "num_target": 2, "num_test": 4, "layout": Layout(256, pack)}
    manifest = make_folder(tmp_path / "out", tmp_path / "in", **options)
    assert manifest.options["classes"] == ["cat", "dog"]
    counts = {split: manifest.num_samples(split) for split in manifest.splits}
    assert counts == {"train": 6, "target": 2, "test": 4}
    for split in counts:
        labels = []
        for each in read_split(tmp_path / "out", split):
            pixels = each["png" if pack == 1 else "npy"]
            assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 10, 10))
            assert pixels.max() - pixels.min() <= 2  # nothing but the middle; jpg is not exact
            assert round(pixels.mean()) % 2 == each["cls"] or pack > 1
            labels.append(each["cls"])
        assert abs(sum(labels) - len(labels) / 2) < 1
    again = make_folder(tmp_path / "again", tmp_path / "in", **options)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")
    assert again == manifest


def test_an_unreadable_picture_is_named_and_no_dataset_is_left(tmp_path):
    write_pictures(tmp_path / "in")
    (tmp_path / "in" / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"image '.*broken\.png' must be readable"):
        make_folder(tmp_path / "out", tmp_path / "in", size=4, num_target=2, num_test=2)
    with pytest.raises(DataError, match="root must be a dataset directory"):
        read_manifest(tmp_path / "out")


def test_a_folder_without_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"folder must hold images of two classes .* got 0 of \[\]"):
        make_folder(tmp_path / "out", tmp_path, size=4)


class Fake:
    """What torchvision's CIFAR10 looks like from outside."""

    classes = ("a", "b", "c")

    def __init__(self, root, train, download):
        self.train, self.targets = train, [i % 3 for i in range(60 if train else 9)]

    def __getitem__(self, index):
        value = index if self.train else 200 + index
        return Image.new("RGB", (4, 4), (value, 0, value)), self.targets[index]


def test_torchvision_data_are_split_and_get_noise(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Fake", Fake, raising=False)
    make_torchvision(tmp_path, "Fake", num_target=6, label_noise=0.5, seed=1)
    seen = {}
    for split in ("train", "target", "test"):
        for each in read_split(tmp_path, split):
            value = int(each["npy"][0, 0, 0])
            assert each["npy"].tolist() == [[[value] * 4] * 4, [[0] * 4] * 4, [[value] * 4] * 4]
            true_label = (value - 200 if split == "test" else value) % 3
            assert each["json"] == {"altered": each["cls"] != true_label, "true_label": true_label}
            seen.setdefault(split, {})[value] = each["json"]["altered"]
    assert {split: sum(altered.values()) for split, altered in seen.items()} == {
        "train": 27, "target": 0, "test": 0,
    }  # fmt: skip
    assert sorted(seen["train"] | seen["target"]) == list(range(60))
    assert sorted(seen["test"]) == list(range(200, 209))


@pytest.mark.parametrize("name", ["NoSuch", "CIFAR10x", "ImageFolder"])
def test_other_torchvision_datasets_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"dataset must be a class .*, got '{name}'"):
        make_torchvision(tmp_path, name)


# the command line


def test_commands_make_list_show_and_verify(tmp_path, capsys):
    root = str(tmp_path / "d")
    assert main(["shards", "make", "digits", "--root", root, "--pack", "16"]) == 0
    assert "train 1197, target 200, test 400" in capsys.readouterr().out
    assert main(["shards", "ls", root]) == 0
    listed = capsys.readouterr().out
    assert "samples of a record: 16" in listed
    assert "pack=16" in listed
    sheet = tmp_path / "sheet.png"
    assert main(["shards", "head", root, "--count", "4", "--image", str(sheet)]) == 0
    assert "train-000000/000000/3 cls=3" in capsys.readouterr().out
    first = next(iter(read_split(root, "train")))["npy"][0]
    with Image.open(sheet) as image:
        assert image.size == (192, 192)
        shown = np.asarray(image)[2:94, 2:94, 0]
    corners = shown[4::12, 4::12][:8, :8]  # an image of 8 x 8 was enlarged to 92
    assert np.abs(corners / 255 - first).max() < 0.01
    assert main(["shards", "verify", root]) == 0


def test_verify_names_every_fault(tmp_path, capsys):
    make_small(tmp_path)
    edit_shard(tmp_path, "train-000000.tar", lambda members: members[:3])
    (tmp_path / "train-000002.tar").unlink()
    assert [fault.shard for fault in verify(tmp_path)] == ["train-000000.tar", "train-000002.tar"]
    assert main(["shards", "verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "train-000000.tar must hold" in captured.out
    assert "got faults in train-000000.tar, train-000002.tar; restore them" in captured.err


@pytest.mark.parametrize(
    "dataset", ["digit", "folder", "folder:", "torchvision", "text:", "code:x"]
)
def test_unknown_datasets_are_refused(tmp_path, dataset, capsys):
    with pytest.raises(SystemExit):
        main(["shards", "make", dataset, "--root", str(tmp_path)])
    assert (
        "must be digits, torchvision:NAME, folder:PATH, text, text:SOURCE or code, got"
        in capsys.readouterr().err
    )


def test_options_of_another_dataset_are_refused(tmp_path, capsys):
    assert main(["shards", "make", "text", "--root", str(tmp_path), "--size", "3"]) == 2
    assert "--size must be left out for text, got 3; it takes" in capsys.readouterr().err
