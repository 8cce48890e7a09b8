"""Remote shards on the local disk: kept by version; what is remembered; unwritable disks."""

import errno
import os
import re
import shutil
import time
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from shard_server import replace
from small_datasets import keys_of, make_small

from selectflow.cli import main
from selectflow.data import Cache, DataError, PoolStream, read_split, sources
from selectflow.data.tar_index import scan

KEYS = [f"s{i}" for i in range(10)]
NAMES = [f"train-00000{i}.tar" for i in range(3)]
pytestmark = pytest.mark.usefixtures("directory")


def stored(source, **options):
    return [each["__key__"] for each in read_split(source, "train", **options)]


def index_of(directory):
    (path,) = directory.glob("*.json")
    return path


# versions


@pytest.mark.parametrize("tells", ["date", "etag", "nothing"])
@pytest.mark.parametrize("takes_head", [True, False])
def test_a_shard_that_is_replaced_at_its_url_is_seen(server, tmp_path, tells, takes_head):
    server.tells, server.takes_head = tells, takes_head
    source = [f"{server.url}/{name}" for name in NAMES]
    stream = PoolStream(source, pool=2, seed=0)
    state, before = (
        stream.state_dict(),
        [path.stat().st_size for path in sorted((tmp_path / "web").glob("*.tar"))],
    )
    assert sorted(keys_of(islice(stream, 5))) == KEYS
    replace(tmp_path / "web", first=50)
    assert [path.stat().st_size for path in sorted((tmp_path / "web").glob("*.tar"))] == before
    again = PoolStream(source, pool=2, seed=0)
    assert sorted(keys_of(islice(again, 5))) == [f"s{i}" for i in range(50, 60)]
    with pytest.raises(DataError, match="fingerprint must be"):
        again.load_state_dict(state)


@pytest.mark.parametrize("tells", ["date", "nginx"])
def test_a_shard_that_is_replaced_within_a_second_is_seen(server, tmp_path, tells):
    server.tells = tells
    url = f"{server.url}/train-000000.tar"
    for first in (0, 50, 90):
        replace(tmp_path / "web", first, age_s=0.0)
        assert stored(url) == [f"s{i}" for i in range(first, first + 4)]


def test_what_has_not_changed_is_neither_fetched_nor_scanned_again(server, monkeypatch, directory):
    source = [f"{server.url}/{name}" for name in NAMES]
    state = PoolStream(source, pool=2, seed=0).state_dict()
    server.heads.clear()
    server.gets.clear()
    scanned = []
    monkeypatch.setattr(sources, "scan", lambda file: scanned.append(file) or scan(file))
    PoolStream(source, pool=2, seed=0, memory_gib=0).load_state_dict(state)
    assert sorted(server.heads) == [f"/{name}" for name in NAMES]  # each is asked once
    assert server.gets == []
    assert scanned == []
    for path in directory.glob("*.shard"):  # what they hold is known without them
        path.unlink()
    PoolStream(source, pool=2, seed=0, memory_gib=0).load_state_dict(state)
    assert server.gets == []


def test_a_dataset_that_is_written_anew_under_equal_names_is_seen(server, tmp_path):
    assert stored(server.url) == KEYS
    replace(tmp_path / "web", first=50)
    assert stored(server.url) == [f"s{i}" for i in range(50, 60)]
    server.gets.clear()
    assert stored(server.url) == [f"s{i}" for i in range(50, 60)]
    assert server.gets == ["/manifest.json"]


def test_an_object_in_a_store_that_is_replaced_is_seen(tmp_path):
    store = fsspec.filesystem("memory")
    for first in (0, 50):
        make_small(tmp_path, count=3, first=first)
        store.pipe_file("/box/train-000000.tar", (tmp_path / "train-000000.tar").read_bytes())
        keys = [f"s{i}" for i in range(first, first + 3)]
        assert stored("memory://box/train-000000.tar") == keys
    store.rm("/box", recursive=True)


def test_the_output_of_a_command_is_asked_for_at_each_opening(tmp_path, directory):
    cache = Cache(directory, allow_pipe=True)
    for first in (0, 50):
        make_small(tmp_path, count=3, first=first)
        expected = [f"s{i}" for i in range(first, first + 3)]
        assert stored(f"pipe:cat {tmp_path}/train-000000.tar", cache=cache) == expected


def test_a_change_during_a_run_is_an_error_and_no_other_sample(server, tmp_path, directory):
    source = [f"{server.url}/{name}" for name in NAMES]
    stream = PoolStream(source, pool=10, seed=0, memory_gib=0, cache=Cache(directory))
    replace(tmp_path / "web", first=50)
    for path in directory.glob("*.shard"):
        path.unlink()
    with pytest.raises(DataError, match=r"train-00000\d\.tar must have \d+ bytes and sha256"):
        next(stream)


def test_without_a_connection_the_newest_copy_is_used_and_said(server, tmp_path, caplog):
    url = f"{server.url}/train-000000.tar"
    assert stored(url) == KEYS[:4]
    replace(tmp_path / "web", first=50)
    assert stored(url) == ["s50", "s51", "s52", "s53"]
    assert caplog.messages == []
    (tmp_path / "web").rename(tmp_path / "gone")
    assert stored(url) == ["s50", "s51", "s52", "s53"]
    (said,) = caplog.messages
    assert said.startswith(f"shard {url} cannot be asked whether it has changed (FileNotFoundError")


def test_a_damaged_copy_of_a_shard_without_a_manifest_is_fetched_again(server, directory):
    url = f"{server.url}/train-000000.tar"
    for is_remembered in (True, False):
        assert stored(url) == KEYS[:4]
        (copy,) = directory.glob("*.shard")
        copy.write_bytes(copy.read_bytes()[:700])
        if not is_remembered:
            index_of(directory).unlink()
        assert stored(url) == KEYS[:4]


# what is remembered, and where nothing can be


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"null", b'{"shard": {"name": 3}}', b"\xff"])
def test_an_index_that_cannot_be_read_is_made_anew(tmp_path, directory, left):
    make_small(tmp_path, count=3)
    time.sleep(0.1)  # what has just been written is not remembered
    shard = tmp_path / NAMES[0]
    assert stored([shard]) == KEYS[:3]
    kept = index_of(directory).read_bytes()
    index_of(directory).write_bytes(left)
    assert stored([shard]) == KEYS[:3]
    assert index_of(directory).read_bytes() == kept


def test_an_index_that_does_not_fit_its_shard_is_forgotten(tmp_path, directory):
    make_small(tmp_path, count=3)
    time.sleep(0.1)
    shard = tmp_path / NAMES[0]
    assert stored([shard]) == KEYS[:3]
    index = index_of(directory)
    index.write_bytes(re.sub(rb'"[0-9a-f]{64}"', b'"%s"' % (b"0" * 64), index.read_bytes()))
    with pytest.raises(DataError, match=r"have .* sha256 0000.*; or start again, since what was"):
        stored([shard])
    assert stored([shard]) == KEYS[:3]


def test_a_shard_of_equal_size_and_date_is_scanned_again(tmp_path):
    shard = tmp_path / "here" / NAMES[0]
    make_small(shard.parent, count=3)
    date = shard.stat().st_mtime_ns
    for first, put in ((50, shutil.copyfile), (70, os.replace), (90, shutil.copyfile)):
        time.sleep(0.1)
        stored([shard])
        make_small(tmp_path / "new", count=3, first=first)
        put(tmp_path / "new" / NAMES[0], shard)
        os.utime(shard, ns=(0, date))
        expected = [f"s{first + i}" for i in range(3)]
        assert stored([shard]) == expected
        make_small(shard.parent, count=3)  # at once, before the file system's clock goes on
        os.utime(shard, ns=(0, date))
        assert stored([shard]) == KEYS[:3]


def fail_to_write(monkeypatch, error):
    """A directory that cannot be written: root may write everywhere, so the calls fail."""

    def failing(path, **_):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr("selectflow.data.cache.atomic_file", failing)


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_local_shards_need_no_cache(tmp_path, monkeypatch, caplog, error):
    make_small(tmp_path)
    time.sleep(0.1)
    fail_to_write(monkeypatch, error)
    pattern = f"{tmp_path}/train-{{000000..000002}}.tar"
    assert stored(pattern) == KEYS
    (said,) = caplog.messages
    assert f"({os.strerror(error)}): they are read again" in said


@pytest.mark.parametrize("place", ["/proc/1/none", "{}/a file/in it"])
def test_a_directory_that_cannot_be_made_stops_remote_shards_alone(
    server, tmp_path, monkeypatch, caplog, place
):
    (tmp_path / "a file").touch()
    place = place.format(tmp_path)
    monkeypatch.setenv("SELECTFLOW_CACHE", place)
    (tmp_path / "web/manifest.json").unlink()
    time.sleep(0.1)
    assert stored(tmp_path / "web") == KEYS
    assert main(["shards", "ls", str(tmp_path / "web")]) == 0
    assert caplog.messages
    with pytest.raises(DataError, match=rf"train-000000\.tar must be kept in {place}, got .*CACHE"):
        stored(f"{server.url}/train-000000.tar")


def test_a_full_disk_is_not_blamed_on_the_address(server, directory, monkeypatch):
    fail_to_write(monkeypatch, errno.ENOSPC)
    with pytest.raises(DataError, match=rf"must be kept in {directory}, got No space left .* room"):
        stored(server.url)
    assert len(server.gets) <= 2  # the manifest; it is not tried again


def test_a_cache_that_others_filled_may_be_read_only(server, directory, monkeypatch):
    assert stored(server.url) == KEYS

    def utime(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", utime)
    fail_to_write(monkeypatch, errno.EROFS)
    assert stored(server.url) == KEYS


def test_without_a_home_the_cache_lies_with_temporary_files(monkeypatch):
    monkeypatch.setenv("SELECTFLOW_CACHE", "")

    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    assert Cache().directory == Path.home() / ".cache/selectflow"
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert Cache().directory.name == f"selectflow-{os.getuid()}"
