"""Shards of other people: nothing is lost without a word, and what is wrong names its place."""

import json
import runpy
import tarfile
from itertools import islice

import numpy as np
import pytest
from foreign_shards import array, dataset, imagenet, link, picture, slow_records, tar
from test_run import ROOT

from selectflow.cli import main
from selectflow.data import (
    DataError,
    PoolStream,
    find_splits,
    read_batches,
    read_metadata,
    read_split,
    verify,
)


@pytest.fixture(autouse=True)
def directory(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SELECTFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))


def labelled(split, i):
    return {"png": picture(i), "cls": b"%d" % (i % 4)}


def keys(source, split="train", **options):
    return [sample["__key__"] for sample in read_split(source, split, **options)]


def refused(source, message, **options):
    for memory_gib in (0, 1):
        with pytest.raises(DataError, match=message):
            next(PoolStream(source, pool=64, seed=0, memory_gib=memory_gib, **options))


# names of shards


def test_a_split_has_the_shards_of_exactly_its_name(tmp_path, capsys):
    dataset(tmp_path, labelled)
    for other in ("test-hard", "test-2", "test-000000-x", "testing", "trai"):
        tar(tmp_path / f"{other}-000000.tar", [("h.png", picture()), ("h.cls", b"3")])
    tar(tmp_path / "val-00000-of-00002.tar", [("v0.png", picture()), ("v0.cls", b"3")])
    tar(tmp_path / "val-00001-of-00002.tar", [("v1.png", picture()), ("v1.cls", b"3")])
    (tmp_path / "train-000000.tar.idx").write_bytes(b"an index of another tool")
    splits = find_splits(tmp_path)
    assert splits == [
        "target", "test", "test-000000-x", "test-2", "test-hard", "testing", "trai", "train", "val",
    ]  # fmt: skip
    assert len(keys(tmp_path, "test")) == 8
    assert keys(tmp_path, "test-2") == keys(tmp_path, "testing") == ["h"]
    assert keys(tmp_path, "val") == ["v0", "v1"]
    count = sum(PoolStream(tmp_path, split, pool=1, seed=0).num_samples for split in splits)
    assert count == sum(len(slow_records(path)) for path in tmp_path.glob("*.tar"))


@pytest.mark.parametrize("name", ["test-hard.tar", "test-000001.tar.gz", "test-000001.TAR"])
def test_a_tar_that_is_almost_of_a_split_is_refused(tmp_path, name):
    dataset(tmp_path, labelled)
    tar(tmp_path / name, [("h.png", picture())])
    with pytest.raises(DataError, match=rf"named <split>-<digits>\.tar, got '{name}'; rename"):
        keys(tmp_path, "test")


# fields


def test_the_first_record_does_not_decide_what_a_sample_is(tmp_path):
    images = [
        (f"{i}.{e}", d) for i in range(3) for e, d in (("png", picture(i)), ("txt", b"a cat"))
    ]
    tar(tmp_path / "a.tar", [("README.txt", b"hello"), *images])
    refused(tmp_path / "a.tar", r"a\.tar .* key 'README', got none of \['png'\]")
    stream = PoolStream(tmp_path / "a.tar", pool=4, seed=0, max_errors=1)
    pool = next(stream)
    assert sorted(pool["key"]) == ["0", "1", "2"]
    assert pool["text"] == ["a cat"] * 3
    assert pool["image"].shape == (3, 3, 8, 8)
    assert stream.errors == {str(tmp_path / "a.tar"): 1}


@pytest.mark.parametrize("odd", [0, 3, 5])
def test_a_record_without_a_label_is_named_wherever_it_stands(tmp_path, odd):
    members = [(f"{i}.{e}", d) for i in range(6) for e, d in labelled("", i).items()]
    tar(tmp_path / "a.tar", [each for each in members if each[0] != f"{odd}.cls"])
    refused(tmp_path / "a.tar", rf"key '{odd}', got none of \['cls'\]")


@pytest.mark.parametrize("extra", ["cls", "txt", "npy"])
def test_a_record_with_a_field_more_than_the_others_is_the_odd_one(tmp_path, extra):
    """Naming the five that lack it would blame the wrong ones."""
    data = {"cls": b"1", "txt": b"a", "npy": array(np.zeros(3))}[extra]
    members = [(f"{i}.png", picture(i)) for i in range(6)]
    tar(tmp_path / "a.tar", [*members[:1], (f"0.{extra}", data), *members[1:]])
    refused(tmp_path / "a.tar", r"key '0', got \['\w+', '\w+'\], unlike most samples")
    pool = next(PoolStream(tmp_path / "a.tar", pool=6, seed=0, max_errors=1))
    assert sorted(pool["key"]) == ["1", "2", "3", "4", "5"]


def test_json_may_be_of_some_samples_only(tmp_path):
    members = [(f"{i}.{e}", d) for i in range(6) for e, d in labelled("", i).items()]
    for i in range(1, 6):
        members.insert(members.index(next(m for m in members if m[0] == f"{i}.cls")) + 1,
                       (f"{i}.json", b'{"altered": true}'))  # fmt: skip
    tar(tmp_path / "c.tar", members)
    found = read_metadata(tmp_path / "c.tar", "train")
    assert found == {f"{i}": {"altered": True} for i in range(1, 6)}
    assert len(next(PoolStream(tmp_path / "c.tar", pool=6, seed=0))["key"]) == 6


def test_fields_are_those_of_most_samples_of_all_shards(tmp_path):
    """The whole first shard is odd."""
    tar(tmp_path / "train-0.tar", [(f"a{i}.png", picture(i)) for i in range(2)])
    tar(
        tmp_path / "train-1.tar",
        [(f"b{i}.{e}", d) for i in range(3) for e, d in labelled("", i).items()],
    )
    refused(tmp_path, r"train-0\.tar .* key 'a\d', got none of \['cls'\]")


def test_images_may_be_of_several_formats(tmp_path):
    formats = ["JPEG", "jpg", "png"]
    members = []
    for i in range(6):
        form = formats[i % 3]
        data = picture(i, "PNG" if form == "png" else "JPEG")
        members += [(f"{i}.{form}", data), (f"{i}.cls", b"%d" % i)]
    tar(tmp_path / "train-0.tar", members)
    for memory_gib in (0, 1):
        pool = next(PoolStream(tmp_path, pool=6, seed=0, memory_gib=memory_gib))
        assert sorted(pool["key"]) == [str(i) for i in range(6)]
        for key, image, label in zip(pool["key"], pool["image"], pool["label"], strict=True):
            sample = next(s for s in read_split(tmp_path, "train") if s["__key__"] == key)
            stored = sample[formats[int(key) % 3].lower()]
            assert int(label) == int(key)
            np.testing.assert_array_equal(image.numpy(), stored.astype(np.float32) / 255)
    tar(tmp_path / "train-1.tar", [("x.gif", b""), ("x.cls", b"0")])
    refused(tmp_path, r"key 'x', got none of \['png or jpg or jpeg'\]")


def test_sources_of_other_fields_are_refused_by_name(tmp_path):
    dataset(tmp_path / "a", labelled)
    dataset(tmp_path / "b", lambda s, i: {"png": picture(i)})
    dataset(tmp_path / "c", imagenet)
    sources = {name: tmp_path / name for name in "abc"}
    message = r"same fields, got \['image', 'label'\] in 'a' and \['image'\] in 'b'"
    with pytest.raises(DataError, match=message):
        PoolStream(sources, pool=2, seed=0)
    del sources["b"]
    assert len(next(PoolStream(sources, pool=48, seed=0))["key"]) == 48


# the tar files


def test_what_follows_the_end_mark_is_looked_at(tmp_path):
    for name in "ab":
        tar(tmp_path / f"{name}.tar", [(f"{name}{i}.txt", b"x") for i in range(3)])
    a, b = (tmp_path / f"{name}.tar" for name in "ab")
    joined = tmp_path / "train-000000.tar"
    for data in (a.read_bytes() + b.read_bytes(), a.read_bytes() + b"x"):
        joined.write_bytes(data)
        with pytest.raises(DataError, match=r"train-000000\.tar .* further bytes after its end"):
            keys(tmp_path)
        with pytest.raises(DataError, match="further bytes after its end mark"):
            verify(tmp_path)
    joined.write_bytes(a.read_bytes() + bytes(5120))
    assert keys(tmp_path) == ["a0", "a1", "a2"]


def test_a_damaged_header_after_a_long_name_is_no_end(tmp_path):
    """`tarfile`, which reads long names, takes it for the end of the file."""
    path = tmp_path / "train-000000.tar"
    tar(path, [("n" * 120 + ".txt", b"x"), ("b.txt", b"x"), ("c.txt", b"x")])
    with tarfile.open(path) as file:
        at = file.getmember("b.txt").offset
    data = bytearray(path.read_bytes())
    data[at + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a damaged header after member 'nnn.*'"):
        keys(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("at", [0, 2])
def test_a_link_in_place_of_a_field_is_named(tmp_path, kind, at):
    members = [(f"{i}.{e}", d) for i in range(4) for e, d in labelled("", i).items()]
    members = [
        (name, link("1.png", kind)) if name == f"{at}.png" else (name, data)
        for name, data in members
    ]
    tar(tmp_path / "train-0.tar", members)
    refused(
        tmp_path, rf"train-0\.tar must hold a file as member '{at}\.png' of key '{at}', got a l"
    )
    (fault,) = verify(tmp_path)
    assert f"'{at}.png'" in fault.message
    assert len(next(PoolStream(tmp_path, pool=4, seed=0, max_errors=1))["key"]) == 3


def test_names_that_are_no_utf8_stay_apart_and_can_be_stored(tmp_path):
    """Also those that `tarfile` reads, whose lone surrogates no ledger could hold."""
    path = tmp_path / "train-000000.tar"
    names = [b"caf\xe9", b"caf\xe8", b"n" * 120 + b"\xe9"]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        for name in names:
            info = tarfile.TarInfo(name.decode("latin-1") + ".txt")
            file.addfile(info)
    found = keys(tmp_path)
    assert found == ["caf\\xe9", "caf\\xe8", "n" * 120 + "\\xe9"]
    tar(path, [("a.txt", b"")])
    assert keys(tmp_path) == ["a"]


# values


@pytest.mark.parametrize("field", ["png", "cls", "npy"])
def test_an_empty_field_is_named(tmp_path, field):
    made = {"png": labelled, "cls": labelled}.get(
        field, lambda s, i: {"npy": array(np.zeros((1, 8, 8))), "cls": b"1"}
    )
    dataset(tmp_path, lambda s, i: made(s, i) | ({field: b""} if i == 3 else {}))
    refused(tmp_path, rf"field '{field}' of key 'train00003' that can be decoded")
    assert len(verify(tmp_path)) == 3  # in each split
    stream = PoolStream(tmp_path, pool=24, seed=0, max_errors=1)
    assert len(next(stream)["key"]) == 23


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            b"-1",
            r"label of key 'train00005' must be at least 0, got -1 in field 'cls' of shard .*0",
        ),
        (b"99999999999999999999", r"label of key 'train00005' must be below 2147483648"),
        (b"1_0", "field 'cls' of key 'train00005' that can be decoded"),
        (b"1.0", "field 'cls' of key 'train00005' that can be decoded"),
    ],
)
def test_a_label_that_is_no_class_is_named_and_counted(tmp_path, value, message):
    dataset(
        tmp_path,
        lambda s, i: labelled(s, i) | ({"cls": value} if (s, i) == ("train", 5) else {}),
    )
    refused(tmp_path, message)
    (fault,) = verify(tmp_path)
    assert "train00005" in fault.message
    stream = PoolStream(tmp_path, pool=24, seed=0, max_errors=1)
    assert "train00005" not in next(stream)["key"]
    assert sum(stream.errors.values()) == 1


def test_labels_are_below_the_number_of_classes(tmp_path):
    dataset(tmp_path, labelled)
    refused(tmp_path, r"label of key 'train\d+' must be below 3, the .*, got 3 in", num_classes=3)
    next(PoolStream(tmp_path, pool=24, seed=0, num_classes=4))
    with pytest.raises(DataError, match=r"must be below 3"):
        read_batches(tmp_path, "test", 8, num_classes=3)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "odd",
    [
        {"png": picture(1, size=(9, 8))},
        {"png": picture(1, mode="L")},
        {"npy": array(np.zeros((1, 4, 4), np.float32))},
        {"npy": array(np.full((1, 8, 8), 255, np.uint8))},  # stacked, it would be a float of 255
    ],
)
def test_an_array_unlike_most_is_named_and_counted(tmp_path, odd, first, num_workers):
    (field,) = odd
    usual = {"png": picture(), "npy": array(np.zeros((1, 8, 8), np.float32))}[field]
    at = 0 if first else 7
    dataset(tmp_path, lambda s, i: ({field: usual} | (odd if i == at else {})) | {"cls": b"1"})
    name = f"train{at:05}"
    refused(
        tmp_path, rf"image of key '{name}' must be of shape .* like most, .* of shard .*-000000"
    )
    assert len(verify(tmp_path)) == 3  # in each split
    options = {"memory_gib": 0, "num_workers": num_workers, "max_errors": 1}
    stream = PoolStream(tmp_path, pool=24, seed=0, **options)
    for pool in islice(stream, 2):
        assert len(pool["key"]) == 23
        assert name not in pool["key"]
    assert sum(stream.errors.values()) == 1
    assert stream.shape == pool["image"].shape[1:]


# equal keys


def test_equal_keys_of_several_shards_are_told_apart(tmp_path):
    def fields(split, i):
        return labelled(split, i) | {"json": json.dumps({"altered": i < 1000}).encode()}

    dataset(tmp_path / "d", fields)
    for path in (tmp_path / "d").glob("train-*.tar"):
        records = slow_records(path)
        tar(path, [(f"{i:03}.{e}", d) for i, (_, r) in enumerate(records) for e, d in r.items()])
    metadata = read_metadata(tmp_path / "d", "train")
    expected = [f"train-00000{shard}/{i:03}" for shard in range(2) for i in range(12)]
    assert list(metadata) == expected == keys(tmp_path / "d")
    assert sum(made["altered"] for made in metadata.values()) == 12
    assert keys(tmp_path / "d", "test")[0] == "test00000"  # where none are equal, keys stay
    # shards of one name in several folders
    listed = [tmp_path / name / "train-000000.tar" for name in ("d", "e")]
    tar(listed[1], [(f"000.{e}", d) for e, d in fields("train", 7).items()])
    assert {key[:2] for key in keys(listed)} == {"0/", "1/"}
    with pytest.raises(DataError, match=r"must list each shard once, got .*-000000\.tar twice"):
        keys([listed[0], listed[0]])


# the trainer


RUN = [
    "root=runs", "overwrite=true", "data.name=shards", "data.label_noise=0", "data.pool=8",
    "data.target_batch=8", "select.keep=2", "steps=4", "eval_every=2", "model.hidden=[8]",
    "track.wandb=disabled",
]  # fmt: skip


def trained(data, *options, name="run"):
    """Exit status of the vision trainer."""
    script = runpy.run_path(str(ROOT / "trainers/vision.py"))
    config = str(ROOT / "configs/digits_online.yaml")
    return script["main"]([config, *RUN, f"name={name}", f"data.root={data}", *options])


def jpeg(split, i):
    return {"jpg": picture(i, "JPEG"), "cls": b"%d" % (i % 4)}


UNFIT = {
    "no label": (lambda s, i: {"jpg": picture(i, "JPEG"), "json": b"{}", "txt": b"a"}, (),
                 "split 'train' must have a label (cls), got the fields ['jpg', 'json', 'txt']"),
    "no image": (lambda s, i: {"gif": b"", "cls": b"1", "txt": b"a"}, (),
                 "split 'train' must have an image (png,"),
    "a list": (lambda s, i: jpeg(s, i) | {"json": b"[1, 2]"}, (),
               "json of key 'train00000' must be an object, got list in field 'json' of shard"),
    "null": (lambda s, i: jpeg(s, i) | {"json": b"null"}, (),
             "json of key 'train00000' must be an object, got NoneType"),
    "below 0": (lambda s, i: jpeg(s, i) | {"cls": b"-1"} if i == 3 else jpeg(s, i), (),
                "label of key 'target00003' must be at least 0, got -1"),
    "above the classes": (
        lambda s, i: jpeg(s, i) | ({"cls": b"12"} if (s, i) == ("train", 3) else {}),
        ("model.num_classes=4", "track.kinds=false", "data.memory_gib=0"),
        "label of key 'train00003' must be below 4, the number of classes, got 12"),
    "flat": (lambda s, i: {"npy": array(np.zeros((8, 8), np.float32)), "cls": b"1"}, (),
             "split 'target' must be of shape (channels, height, width), got (8, 8)"),
    "left out of the loss": (
        lambda s, i: jpeg(s, i) | ({"cls": b"-100"} if s == "test" and i % 2 else {}), (),
        "label of key 'test00001' must be at least 0, got -100"),
    "other splits": (
        lambda s, i: jpeg(s, i) | ({"jpg": picture(i, "JPEG", (9, 8))} if s == "train" else {}), (),
        "split 'train' must be of shape (3, 8, 8) as those of 'target', got (3, 8, 9)"),
    "grey splits": (
        lambda s, i: jpeg(s, i) | ({"jpg": picture(i, "JPEG", mode="L")} if s == "test" else {}),
        ("model.name=cnn",), "split 'test' must be of shape (3, 8, 8) as those of 'target'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_the_trainer_says_what_it_cannot_train_on(tmp_path, monkeypatch, capsys, name):
    fields, options, message = UNFIT[name]
    monkeypatch.chdir(tmp_path)
    dataset(tmp_path / "d", fields)
    assert trained("d", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_the_trainer_goes_on_without_what_it_may_leave_out(tmp_path, monkeypatch, capsys):
    """One of another size, one without a label, one of a class that is not there."""
    monkeypatch.chdir(tmp_path)
    odd = {3: {"jpg": picture(3, "JPEG", (9, 8))}, 4: {"cls": b"12"}, 5: {"cls": b"-1"}}
    dataset("d", lambda s, i: jpeg(s, i) | (odd.get(i, {}) if s == "train" else {}))
    assert trained("d", "model.num_classes=4", "data.max_errors=2", "steps=6") == 2
    assert "raise max_errors, 2, to go on without such samples" in capsys.readouterr().err
    assert trained("d", "model.num_classes=4", "data.max_errors=3", "steps=6") == 0
    assert main(["shards", "verify", "d"]) == 2
    out = capsys.readouterr().out
    assert "train00003" in out
    assert "train00005" in out
