"""Folders as people have them: hidden files, other endings, capitals, files that lie deeper."""

import logging
import os
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from selectflow.cli import main
from selectflow.data import (
    DataError,
    Layout,
    TextOptions,
    make_folder,
    make_text,
    read_metadata,
    read_split,
)
from selectflow.data.folders import find_files

ENDINGS = (".png", ".jpg")


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root, **options):
    return [str(path.relative_to(root)) for path in find_files(root, ENDINGS, **options)]


def test_hidden_names_are_left_out_at_every_depth(tmp_path, caplog):
    put(tmp_path, "a/1.png", "b/1.png", "b/in/2.png")
    put(tmp_path, ".ipynb_checkpoints/a/1.png", "a/._1.png", "b/.git/x.png", "b/in/.DS_Store")
    assert found(tmp_path) == ["a/1.png", "b/1.png"]
    assert caplog.messages == [f"left out of {tmp_path}: 4 hidden, 1 in folders inside a class"]
    caplog.clear()
    assert found(tmp_path, deep=True) == ["a/1.png", "b/1.png", "b/in/2.png"]
    assert caplog.messages == [f"left out of {tmp_path}: 4 hidden"]


def test_endings_may_be_of_any_case_and_others_are_counted(tmp_path, caplog):
    put(tmp_path, "a/1.PNG", "a/1.png", "a/2.Jpg", "b/1.jpg", "b/2.bmp", "b/3.bmp", "b/no", "LIST")
    assert found(tmp_path) == ["a/1.PNG", "a/1.png", "a/2.Jpg", "b/1.jpg"]
    (said,) = caplog.messages
    assert said.endswith("1 beside the classes, 1 that end in '', 2 that end in '.bmp'")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    put(tmp_path, "a/1.png", "b/1.png")
    found(tmp_path)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("names", "got"),
    [
        ([], "got none in"),
        (["x.webp", "y.webp"], r"got 2 that end in '\.webp' in"),
        (["train/x.png"], "got 1 in folders inside a class in"),
        ([".x.png"], "got 1 hidden in"),
    ],
)
def test_a_class_without_files_is_refused(tmp_path, names, got):
    (tmp_path / "owls").mkdir()
    put(tmp_path, "cats/1.png", *(f"owls/{name}" for name in names))
    with pytest.raises(DataError, match=rf"class 'owls' must hold files .*\.jpg, {got}"):
        find_files(tmp_path, ENDINGS)


def test_links_are_followed_but_not_around(tmp_path):
    put(tmp_path, "there/in/2.png", "data/a/1.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "there")
    (tmp_path / "there/in/around").symlink_to(tmp_path / "there")
    assert found(tmp_path / "data", deep=True) == ["a/1.png", "b/in/2.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    put(tmp_path, "a/1.png")
    (tmp_path / "a").chmod(0)
    with pytest.raises(DataError, match=r"folder must be one that can be read, got .*/a'"):
        find_files(tmp_path, ENDINGS)
    (tmp_path / "a").chmod(0o700)


def test_the_command_says_what_is_left_out_of_images(tmp_path, caplog):
    for name in ("cats", "dogs", ".ipynb_checkpoints"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.full((4, 4, 3), index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{index}.PNG")
    put(tmp_path, "in/cats/old.bmp")
    options = ["--root", f"{tmp_path}/out", "--target", "2", "--test", "2", "--size", "4"]
    with caplog.at_level(logging.WARNING):
        assert main(["shards", "make", f"folder:{tmp_path}/in", *options]) == 0
    assert caplog.messages == [f"left out of {tmp_path}/in: 1 hidden, 1 that end in '.bmp'"]
    labels = {each["true_label"] for each in read_metadata(tmp_path / "out", "train").values()}
    assert labels == {0, 1}
    options = {"size": 4, "num_target": 2, "num_test": 2}
    manifest = make_folder(tmp_path / "again", tmp_path / "in", **options)
    assert manifest.options["classes"] == ["cats", "dogs"]


def test_text_of_any_ending_and_case_is_read_as_it_is(tmp_path, caplog):
    root = tmp_path / "in"
    texts = {}
    for index in range(60):
        name = f"prose/{index}.{('txt', 'TXT', 'md')[index % 3]}"
        texts[name] = f"Line {index:02}\r\n\r\nended by two characters, as \x85 and \r are\n"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\xef\xbb\xbf" * (index % 2) + texts[name].encode())
    (root / "prose/0.TXT").write_bytes(b"another of this name, and long enough for one block")
    texts["prose/0.TXT"] = "another of this name, and long enough for one block"
    put(root, "prose/.ipynb_checkpoints/0.txt", "prose/image.svg", "notes.txt")
    options = TextOptions(
        f"files:{root}", target_domain=None, num_target=1, num_test=1, block=16, rest="pad"
    )
    make_text(tmp_path / "out", options, layout=Layout())
    said = "1 beside the classes, 1 hidden, 1 that end in '.svg'"
    assert caplog.messages == [f"left out of {root}: {said}"]
    read = defaultdict(list)
    for sample in read_split(tmp_path / "out", "train"):
        assert sample["json"]["domain"] == "prose"
        place = int(sample["__key__"].rpartition("-")[2])
        read[sample["json"]["document"]].append((place, bytes(sample["npy"])))
    assert len(read) > 30
    for document, blocks in read.items():
        both = document in ("prose/0.txt", "prose/0.TXT")  # else named without an ending
        name = document if both else next(n for n in texts if n.rpartition(".")[0] == document)
        joined = b"".join(tokens for _, tokens in sorted(blocks))
        assert joined.rstrip(b"\xff").decode() == texts[name]


def test_a_domain_may_not_be_called_as_dirt_is(tmp_path):
    for domain in ("prose", "duplicate"):
        for index in range(20):
            put(tmp_path, f"in/{domain}/{index}.txt")
            (tmp_path / f"in/{domain}/{index}.txt").write_text(f"{domain} {index} " * 9)
    options = TextOptions(
        f"files:{tmp_path}/in", target_domain="prose", num_target=1, num_test=1, block=8
    )
    with pytest.raises(DataError, match=r"domain must be none of .*, got 'duplicate' of document"):
        make_text(tmp_path / "out", options)
