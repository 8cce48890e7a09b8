"""Shards as they lie on disk: against tarfile and webdataset, the slow and obvious readers."""

import io
import tarfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_datasets import make_small
from webdataset.autodecode import default_decoder
from webdataset.tariterators import group_by_keys, tar_file_expander

from selectflow.data import read_split
from selectflow.data.tar_index import list_members

NAMES = ["a.npy", "dir/b.cls", "x" * 99, "d" * 60 + "/" + "z" * 90, "é.txt"]


def write_tar(path, form, mtime):
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for index, name in enumerate(NAMES + ["y" * 101] * (form != tarfile.USTAR_FORMAT)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * index, mtime
            tar.addfile(info, io.BytesIO(bytes([index]) * info.size))


@pytest.mark.parametrize("mtime", [0, 0.5])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form, mtime):
    path = tmp_path / "a.tar"
    write_tar(path, form, mtime)
    with tarfile.open(path) as tar:
        expected = [(i.name, i.offset_data, i.size) for i in tar if i.isreg()]
    with path.open("rb", buffering=0) as file:
        members = list_members(file)
    assert members == expected
    data = path.read_bytes()
    for index, member in enumerate(members):
        assert data[member.offset : member.offset + member.size] == bytes([index]) * (300 * index)


def test_every_cut_and_every_flip_in_a_header_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, tarfile.USTAR_FORMAT, 0)
    with tarfile.open(path) as tar:
        headers = [info.offset for info in tar]
        end = tar.offset - 512
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in range(0, end, 100)]
    for at in headers:
        for offset in rng.choice(512, size=64, replace=False):
            one = bytearray(whole)
            one[at + offset] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(one))
    missed = 0
    for data in damaged:
        path.write_bytes(data)
        with path.open("rb", buffering=0) as file:
            try:
                list_members(file)
            except ValueError:
                continue
        missed += 1
    assert missed == 0


NAME_PART = st.text("aZ0._- é", min_size=1, max_size=40).filter(lambda part: part.strip(". ") != "")
MEMBERS = st.lists(
    st.tuples(
        st.lists(NAME_PART, min_size=1, max_size=5).map("/".join),
        st.sampled_from([0, 1, 511, 512, 513, 3000]),
    ),
    max_size=6,
    unique_by=lambda member: member[0],
)
EDITS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


def tar_of(members, form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    return file.getvalue()


def listed(data, folder, **options):
    path = folder / "a.tar"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        return list_members(file, **options)


FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
KEEP = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": True}


@settings(max_examples=100, deadline=None, **KEEP)
@given(members=MEMBERS, form=FORMS)
def test_any_names_and_sizes_are_listed_as_tarfile_does(tmp_path, members, form):
    data = tar_of(members, form)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar]
    assert listed(data, tmp_path) == expected


@settings(max_examples=200, deadline=None, **KEEP)
@given(
    members=MEMBERS, edits=EDITS, cut=st.none() | st.floats(0, 1), window=st.sampled_from([1, 3])
)
def test_any_edit_is_noticed_or_changes_no_place(tmp_path, members, edits, cut, window):
    """Beyond the mutations of test_data_reader: few bytes anywhere, without a checksum."""
    whole = tar_of(members, tarfile.USTAR_FORMAT)
    damaged = bytearray(whole)
    for place, value in edits:
        damaged[int(place * len(damaged))] = value
    if cut is not None:
        damaged = damaged[: int(cut * len(damaged))]
    expected, found = listed(whole, tmp_path), None
    with suppress(ValueError):
        found = listed(bytes(damaged), tmp_path, window=512 * window)
    assert found == expected or (found is None and damaged != whole)


def test_samples_are_those_that_webdataset_reads(tmp_path):
    make_small(tmp_path, count=10)
    paths = sorted(tmp_path.glob("*.tar"))
    opened = [{"url": path.name, "stream": io.BytesIO(path.read_bytes())} for path in paths]
    plain = list(map(default_decoder, group_by_keys(tar_file_expander(opened))))
    ours = list(read_split(tmp_path, "train"))
    assert [s["__key__"] for s in ours] == [s["__key__"] for s in plain]
    for one, other in zip(ours, plain, strict=True):
        assert (one["cls"], one["json"]) == (other["cls"], other["json"])
        np.testing.assert_array_equal(one["npy"], other["npy"])
