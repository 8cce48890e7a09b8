"""What can be trained on can be selected from: members are copied, under any name."""

import numpy as np
import pytest
import torch
from foreign_shards import (
    datacomp,
    dataset,
    energon,
    imagenet,
    img2dataset,
    mosaic,
    picture,
    slow_records,
    tar,
)
from small_datasets import make_small
from test_data_foreign import directory, keys, labelled, trained  # noqa: F401

from selectflow.cli import main
from selectflow.data import (
    DataError,
    Layout,
    PoolStream,
    check_fields,
    find_manifest,
    read_metadata,
    read_split,
    verify,
    write_subset,
)
from selectflow.run.ledger import kept_keys, mean_scores, read_ledger
from selectflow.run.offline import write_scores


def stored(root, split="train"):
    """The members of each sample, as they lie in the shards."""
    return dict(
        record for path in sorted(root.glob(f"{split}-*.tar")) for record in slow_records(path)
    )


NAMES = ["{s}{i:05}", "./{s}/a {i}", "été/{i}", "{s}\n{i}", "n" * 120 + "/{i}", "_{i}_", "{i}"]


@pytest.mark.parametrize("key", NAMES)
def test_a_subset_has_the_bytes_of_its_samples_under_any_name(tmp_path, key):
    def fields(split, i):
        rest = {"json": b'{"score": NaN}', "seg.PNG": picture(i, mode="L"), "_x": b"x", "url": b""}
        return {"JPG": picture(i, "JPEG"), "cls": b" %d\n" % (i % 4)} | rest

    source = dataset(tmp_path / "d", fields, key=key)
    wanted = keys(source)[::3]
    write_subset(tmp_path / "o", source, "train", wanted, {}, copied=["test"], seed=0)
    assert keys(tmp_path / "o") == wanted
    whole, found = stored(source), stored(tmp_path / "o")
    assert list(found) == wanted
    assert found == {key: whole[key] for key in wanted}
    assert stored(tmp_path / "o", "test") == stored(source, "test")
    assert verify(tmp_path / "o") == []
    # and again from the subset, with other shards
    write_subset(tmp_path / "p", tmp_path / "o", "train", wanted, {}, layout=Layout(per_shard=2))
    assert stored(tmp_path / "p") == found


def test_equal_keys_of_several_shards_and_sources_are_selected_apart(tmp_path):
    for name in "ab":
        for shard in range(2):
            members = [
                (f"{i}.{e}", d) for i in range(3) for e, d in labelled("", 9 * shard + i).items()
            ]
            tar(tmp_path / name / f"train-{shard}.tar", members)
    sources = {name: tmp_path / name for name in "ab"}
    wanted = ["a/train-0/2", "a/train-1/2", "b/train-1/0"]
    write_subset(tmp_path / "o", sources, "train", wanted, {})
    assert keys(tmp_path / "o") == wanted
    images = {s["__key__"]: s["png"] for s in read_split(sources, "train")}
    for sample in read_split(tmp_path / "o", "train"):
        np.testing.assert_array_equal(sample["png"], images[sample["__key__"]])


def test_samples_of_several_formats_and_splits_of_other_fields_are_selected(tmp_path):
    def fields(split, i):
        form = "png" if i % 2 else "jpg"
        label = {} if split == "pool" else {"cls": b"%d" % (i % 4)}
        made = {"json": b"{}"} if split == "test" and i < 4 else {}
        return {form: picture(i, "PNG" if i % 2 else "JPEG")} | label | made

    sizes = [("train", 8), ("test", 8), ("pool", 8)]
    source = dataset(tmp_path / "d", fields, sizes)
    write_subset(tmp_path / "o", source, "train", keys(source)[:5], {}, copied=["test", "pool"])
    assert find_manifest(tmp_path / "o").optional == {
        "train": ("jpg", "json", "png"), "test": ("jpg", "json", "png"),
        "pool": ("cls", "jpg", "json", "png"),
    }  # fmt: skip
    pool = next(PoolStream(tmp_path / "o", pool=5, seed=0))
    assert pool["image"].shape == (5, 3, 8, 8)
    assert len(read_metadata(tmp_path / "o", "test")) == 4
    check_fields(tmp_path / "o", "train", ["image", "label"])
    with pytest.raises(DataError, match=r"split 'pool' must have a label \(cls\)"):
        check_fields(tmp_path / "o", "pool", ["image", "label"])
    assert verify(tmp_path / "o") == []


def test_what_cannot_be_read_is_not_selected(tmp_path):
    dataset(tmp_path / "d", lambda s, i: labelled(s, i) | ({"png": b"x"} if i == 3 else {}))
    held = keys(tmp_path / "d", max_errors=1)
    write_subset(tmp_path / "o", tmp_path / "d", "train", held[:4], {})
    with pytest.raises(
        DataError, match="readable samples of split 'train', got 'train00003' and 0"
    ):
        write_subset(tmp_path / "p", tmp_path / "d", "train", ["train00003", "train00004"], {})
    with pytest.raises(DataError, match=r"test-000000\.tar .* key 'test00003' that can be decoded"):
        write_subset(tmp_path / "q", tmp_path / "d", "train", held[:4], {}, copied=["test"])


def test_a_subset_of_foreign_shards_can_be_packed_and_unpacked(tmp_path):
    make_small(tmp_path / "d")
    write_subset(
        tmp_path / "p", tmp_path / "d", "train", keys(tmp_path / "d"), {}, layout=Layout(pack=4)
    )
    packed = keys(tmp_path / "p")
    assert packed[:2] == ["train-000000/000000/0", "train-000000/000000/1"]
    write_subset(tmp_path / "q", tmp_path / "p", "train", packed[:3], {})
    assert [s["cls"] for s in read_split(tmp_path / "q", "train")] == [0, 1, 2]
    dataset(tmp_path / "e", lambda s, i: {"cls": b"1", "txt": b"a"}, key="./{s} {i}")
    write_subset(
        tmp_path / "r", tmp_path / "e", "train", keys(tmp_path / "e"), {}, layout=Layout(pack=4)
    )
    assert len(keys(tmp_path / "r")) == 24


# whole runs on the layouts of well-known tools


@pytest.mark.parametrize("fields", [img2dataset, datacomp])
def test_captioned_images_are_streamed_selected_and_refused_by_the_trainer(
    tmp_path, monkeypatch, capsys, fields
):
    monkeypatch.chdir(tmp_path)
    source = dataset(tmp_path / "d", fields, key="{i:09}")
    pool = next(PoolStream(source, pool=24, seed=0))
    by_key = dict(stored(source))
    for key, text in zip(pool["key"], pool["text"], strict=True):
        assert by_key[key]["txt"] == text.encode()
    assert len(read_metadata(source, "train")) == 24
    assert verify(source) == []
    write_subset(tmp_path / "o", source, "train", pool["key"][:5], {}, copied=["test"])
    assert {k: by_key[k] for k in pool["key"][:5]} == stored(tmp_path / "o")
    assert trained("d") == 2
    assert capsys.readouterr().err.startswith(
        "error: samples of split 'train' must have a label (cls)"
    )


@pytest.mark.parametrize("fields", [imagenet, energon, mosaic])
def test_labelled_images_are_trained_on_and_selected(tmp_path, monkeypatch, capsys, fields):
    monkeypatch.chdir(tmp_path)
    source = dataset(tmp_path / "d", fields, key="./{s}/n01 {i}")
    assert verify(source) == []
    options = ["select.strategy=loss", "track.samples=2"]
    assert trained("d", *options) == 0
    assert main(["select", "write-shards", "runs/run", "--out", "kept"]) == 0
    kept, whole = kept_keys("runs/run"), stored(source)
    assert stored(tmp_path / "kept") == {key: whole[key] for key in kept}
    assert stored(tmp_path / "kept", "target") == stored(source, "target")
    assert main(["shards", "verify", "kept"]) == 0
    assert main(["shards", "head", "kept", "--image", "sheet.png"]) == 0
    assert trained("kept", *options, name="again") == 0
    assert set(read_ledger("runs/again")["key"].to_pylist()) <= set(kept)
    offline = ["select.horizon=.inf", "select.interval=1", "select.derivative=central"]
    assert trained("d", *offline, name="offline") == 0
    chosen = stored(tmp_path / "runs/offline/selected")
    assert chosen
    assert chosen == {key: whole[key] for key in chosen}
    capsys.readouterr()


def test_scores_of_equal_keys_are_those_of_their_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def fields(split, i):
        altered = b"true" if i < 1000 else b"false"
        return labelled(split, i) | {"json": b'{"altered": %s}' % altered}

    dataset(tmp_path / "whole", fields)
    for path in (tmp_path / "whole").glob("*.tar"):
        members = [
            (f"{i:03}.{e}", d) for i, (_, r) in enumerate(slow_records(path)) for e, d in r.items()
        ]
        tar(tmp_path / "d" / path.name, members)
    options = ["select.strategy=uniform", "select.keep=8", "steps=3", "eval_every=3"]
    assert trained("d", *options) == 0
    scores = mean_scores("runs/run")
    assert sorted(scores.keys) == [f"train-00000{s}/{i:03}" for s in range(2) for i in range(12)]
    assert torch.equal(scores.occurrences, torch.ones(24, dtype=torch.int64))
    assert write_scores(tmp_path, scores, scores.keys[:1]).exists()
    lines = (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()
    assert '"select/kept_altered": 0.5' in lines[-1]
    assert main(["select", "write-shards", "runs/run", "--out", "kept"]) == 0
    assert list(stored(tmp_path / "kept")) == sorted(scores.keys)
    capsys.readouterr()
