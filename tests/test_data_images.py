"""Labelled images as shards: digits, folders of classes, torchvision's datasets."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from small_datasets import files_of

from selectflow.data import (
    DataError,
    Layout,
    make_digits,
    make_folder,
    make_torchvision,
    read_manifest,
    read_metadata,
    read_split,
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


# folders and torchvision


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
