"""Shards as any tool may write them: each sample is streamed once, or an error names it."""

import math
import os
import re
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from foreign_shards import LINK, array, link, picture, slow_records, tar
from hypothesis import event, given, settings
from hypothesis import strategies as st

from selectflow.data import DataError, PoolStream, open_catalog, read_split, write_subset
from selectflow.data.fields import CODECS

KNOWN = {"png", "jpg", "jpeg", "cls", "txt", "json", "npy"}
IMAGES = {0: picture(0), 1: picture(1)}
PHOTOS = {0: picture(0, "JPEG"), 1: picture(1, "JPEG")}
CONTENTS = {
    "png": st.sampled_from(list(IMAGES.values())),
    "jpg": st.sampled_from(list(PHOTOS.values())),
    "JPEG": st.sampled_from(list(PHOTOS.values())),
    "npy": st.integers(0, 3).map(lambda n: array(np.full((2, 2), n, np.float32))),
    "cls": st.sampled_from([b"0", b"3\n", b" 12"]),
    "txt": st.sampled_from([b"", "é".encode(), b"two\nlines"]),
    "json": st.sampled_from([b"{}", b'{"a": NaN, "b": null}']),
    "other.bin": st.just(b"x"),
}
STEMS = st.sampled_from(
    ["0", "1", "2", "a b", "é", "x" * 97, "y" * 140, "_", "-", "\\", "two\nlines", "__m__x", "+"]
)
FOLDERS = st.sampled_from(["", "", "./", "train/", "a.b/", "d" * 80 + "/", "__x/", "é/"])
BESIDE = [("README", b"x"), (".hidden.png", b"x"), ("dir/.x", b""), ("__meta__/a.png", b"x")]


@st.composite
def records(draw, usual):
    """The members of one sample: those that are usual, give or take."""
    extensions = list(usual)
    change = draw(st.sampled_from(["none"] * 12 + ["less", "more", "link", "case"]))
    if change == "less":
        extensions = extensions[:-1]
    if change == "more":
        extensions.append(draw(st.sampled_from([e for e in CONTENTS if e not in usual])))
    if draw(st.booleans()) and "json" in extensions:
        extensions.remove("json")
    name = draw(FOLDERS) + draw(STEMS)
    members = [(f"{name}.{e}", draw(CONTENTS[e])) for e in draw(st.permutations(extensions))]
    if members and change == "link":
        kind = draw(st.sampled_from([tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]))
        members[0] = (members[0][0], link("elsewhere", kind))
    if change == "case":
        members = [(each.replace(".cls", ".CLS"), data) for each, data in members]
    return members


@st.composite
def shards(draw):
    """The members of each shard, and how it is written."""
    usual = draw(
        st.sampled_from(
            [("png", "cls"), ("jpg", "txt", "json"), ("JPEG", "cls", "json"), ("npy", "cls"),
             ("png", "other.bin", "txt"), ("npy",), ("txt",)]
        )
    )  # fmt: skip
    found = []
    for _ in range(draw(st.integers(1, 3))):
        held = draw(st.lists(records(usual), min_size=1, max_size=4))
        members = [member for record in held for member in record]
        if draw(st.sampled_from([False] * 9 + [True])):
            members = draw(st.permutations(members))
        for each in draw(st.lists(st.sampled_from(BESIDE), max_size=2, unique=True)):
            members.insert(draw(st.integers(0, len(members))), each)
        found.append((members, draw(st.sampled_from(["gnu", "pax", "ustar", "pax times"]))))
    return found


FORMS = {
    "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT,
    "ustar": tarfile.USTAR_FORMAT, "pax times": tarfile.PAX_FORMAT,
}  # fmt: skip
TAILS = st.sampled_from([b""] * 8 + [bytes(512), bytes(99), b"\0x", b"joined"])


def write(path, members, form, tail):
    """Write one shard; a name that ustar cannot hold is written as GNU tar does."""
    mtime = 0.5 if form == "pax times" else 0
    try:
        tar(path, members, FORMS[form], mtime)
    except ValueError:
        tar(path, members, tarfile.GNU_FORMAT)
    data = path.read_bytes()
    path.write_bytes(data + (data if tail == b"joined" else tail))


def can_be_told(members):
    """Whether the members of each key stand together, and none comes twice."""
    order, seen = [], set()
    for name, _ in members:
        named = re.fullmatch(r"((?:.*/|)[^./][^./]*)\.([^/]*)", name, re.DOTALL)
        if not named or name.startswith("__meta__/"):
            continue
        key, extension = named[1], named[2].lower()
        if (key, extension) in seen:
            return False
        seen.add((key, extension))
        if not order or order[-1] != key:
            order.append(key)
    return len(set(order)) == len(order)


def kind_of(held):
    """What batches take of a sample: its image, in any one format, label, text and array."""
    parts = {e for e in held if e in KNOWN} - {"json"}
    images = parts & {"png", "jpg", "jpeg"}
    return frozenset(parts - images | {"image"} if len(images) == 1 else parts)


def check(root, made, tail):
    paths = [root / f"train-{number:03}.tar" for number in range(len(made))]
    for path, (members, form) in zip(paths, made, strict=True):
        write(path, members, form, tail if path == paths[-1] else b"")
    slow = [(path, *each) for path in paths for each in slow_records(path)]
    slow = [each for each in slow if not each[1].startswith("__meta__/")]
    reasons = {
        # an empty tar, joined to itself, is zeros still
        "bytes after its end mark": any(tail) and not (tail == b"joined" and not made[-1][0]),
        "of a key that came before": not all(can_be_told(members) for members, _ in made),
        "got none in": not any(KNOWN.intersection(held) for _, _, held in slow),
    }
    if any(reasons.values()):
        with pytest.raises(DataError) as raised:
            open_catalog(root, "train")
        assert any(reasons[text] for text in reasons if text in str(raised.value)), raised.value
        event("refused as a whole")
        return
    assert open_catalog(root, "train").num_samples == len(slow)
    found, lost = check_samples(root, slow)
    event(f"{'some' if lost else 'none'} odd, {'some' if found else 'none'} read")
    if found:
        check_stream_and_subset(root, found, lost)


def check_samples(root, slow):
    """Each sample of the slow reader is read once with its own fields, or named."""
    times = Counter(key for _, key, _ in slow)
    apart = max(times.values()) > 1
    kinds = Counter(kind_of(held) for _, _, held in slow)
    most = [kind for kind, count in kinds.items() if count == max(kinds.values())]
    event(f"keys {'told apart' if apart else 'as they are'}")
    samples = list(read_split(root, "train", max_errors=math.inf))
    found = {sample["__key__"]: sample for sample in samples}
    assert len(found) == len(samples)
    lost = []
    for path, key, held in slow:
        name = f"{path.stem}/{key}" if apart else key
        has_link = any(data is LINK for e, data in held.items() if e in KNOWN)
        if kind_of(held) not in most or has_link or (len(most) > 1 and name not in found):
            assert name not in found
            lost.append((path, key))
            continue
        fields = {e: CODECS[e][1](data) for e, data in held.items() if e in KNOWN}
        np.testing.assert_equal(found[name], {"__key__": name} | fields)
    assert len(found) + len(lost) == len(slow)
    if lost:
        with pytest.raises(DataError) as raised:
            list(read_split(root, "train"))
        assert str(lost[0][0]) in str(raised.value)
        assert repr(lost[0][1]) in str(raised.value)
    return found, lost


def check_stream_and_subset(root, found, lost):
    size = len(found) + len(lost)
    stream = PoolStream(root, pool=size, seed=0, max_errors=size)
    assert sorted(next(stream)["key"]) == sorted(found)
    assert sum(stream.errors.values()) == len(lost)
    write_subset(root / "o", root, "train", found, {})
    again = {sample["__key__"]: sample for sample in read_split(root / "o", "train")}
    np.testing.assert_equal(again, found)


def check_in_folder(made, tail):
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("SELECTFLOW_CACHE")
        os.environ["SELECTFLOW_CACHE"] = f"{folder}/cache"
        try:
            root = Path(folder, "d")
            root.mkdir()
            check(root, made, tail)
        finally:
            del os.environ["SELECTFLOW_CACHE"]
            if before is not None:
                os.environ["SELECTFLOW_CACHE"] = before


@settings(max_examples=100, deadline=None, derandomize=True)
@given(made=shards(), tail=TAILS)
def test_every_sample_is_streamed_once_or_named(made, tail):
    check_in_folder(made, tail)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(made=shards(), tail=TAILS)
def test_every_sample_of_two_thousand_datasets_is_streamed_once_or_named(made, tail):
    check_in_folder(made, tail)
