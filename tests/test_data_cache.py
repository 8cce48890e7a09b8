"""Remote shards on the local disk: kept by version, held while read; URLs; unwritable disks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from small_datasets import keys_of, make_small

from selectflow.cli import main
from selectflow.data import (
    Cache,
    DataError,
    PoolStream,
    TextOptions,
    find_manifest,
    find_splits,
    make_text,
    open_tokenizer,
    read_split,
    sources,
    verify,
)
from selectflow.data.tar_index import scan

KEYS = [f"s{i}" for i in range(10)]
NAMES = [f"train-00000{i}.tar" for i in range(3)]


@pytest.fixture(autouse=True)
def directory(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SELECTFLOW_CACHE", str(path))
    return path


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, without ranges; what it `tells` of a version is chosen by the server."""

    def do_HEAD(self):
        self.server.heads.append(self.path)
        super().do_HEAD() if self.server.takes_head else self.send_error(405)

    def do_GET(self):
        self.server.gets.append(self.path)
        super().do_GET()

    def send_header(self, name, value):
        if name != "Last-Modified" or self.server.tells == "date":
            super().send_header(name, value)

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if self.server.tells == "etag" and path.is_file():
            super().send_header("ETag", f'"{path.stat().st_ino}-{path.stat().st_mtime_ns}"')
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A loopback HTTP server over tmp_path/web, which holds the small dataset."""
    make_small(tmp_path / "web")
    handler = partial(Handler, directory=tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        http.takes_head, http.tells, http.heads, http.gets = True, "date", [], []
        http.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


def stored(source, **options):
    return [each["__key__"] for each in read_split(source, "train", **options)]


def replace(path, first, later_s=10, count=10, per_shard=4):
    """Put other samples, from s`first` on, into the shards of a folder, at a later date."""
    make_small(path, count=count, per_shard=per_shard, first=first)
    for shard in path.glob("*.tar"):
        date = shard.stat().st_mtime + later_s
        os.utime(shard, (date, date))


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
    replace(tmp_path / "web", first=50, later_s=0)
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


# one directory, several processes


def test_a_file_that_is_open_outlives_its_removal(server, directory):
    cache = Cache(directory)
    expected = cache.read(f"{server.url}/{NAMES[0]}")
    with cache.open(f"{server.url}/{NAMES[0]}") as file:
        (path,) = directory.glob("*.shard")
        path.unlink()
        assert file.readall() == expected


def test_a_copy_that_is_removed_at_the_worst_moment_is_fetched_again(
    server, tmp_path, directory, monkeypatch
):
    """By a thread that removes all files of the cache all the time."""
    over = threading.Event()

    def remove():
        while not over.is_set():
            for path in directory.glob("*.shard"):
                path.unlink(missing_ok=True)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        stream = PoolStream(server.url, pool=4, seed=0, memory_gib=0, cache=Cache(directory))
        expected = PoolStream(tmp_path / "web", pool=4, seed=0)
        assert keys_of(islice(stream, 20)) == keys_of(islice(expected, 20))
    finally:
        over.set()
        thread.join()


def test_those_who_want_the_same_file_fetch_it_once(server, directory):
    opened = []

    def fetch():
        with Cache(directory).open(f"{server.url}/{NAMES[0]}", "v") as file:
            opened.append(file.readall())

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8
    assert len(set(opened)) == 1
    assert server.gets == [f"/{NAMES[0]}"]


def test_what_a_killed_process_left_is_removed_after_a_day(server, directory):
    left = [directory / f".{age}.shard.1.tmp" for age in (0, 100_000)]
    for path, age in zip(left, (0, 100_000), strict=True):
        path.write_bytes(b"half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    Cache(directory).open(f"{server.url}/{NAMES[0]}").close()
    assert [path.exists() for path in left] == [True, False]


SHARE = """
import json, sys
from itertools import islice
from selectflow.data import Cache, PoolStream
url, directory, max_gib, seed, workers, pools = sys.argv[1:]
urls = [f"{url}/train-{i:06d}.tar" for i in range(8)]
cache = Cache(directory, max_gib=float(max_gib))
options = {"memory_gib": 0, "buffer": 4, "num_workers": int(workers), "cache": cache}
stream = PoolStream(urls, pool=4, seed=int(seed), **options)
print(json.dumps([key for pool in islice(stream, int(pools)) for key in pool["key"]]))
"""


def share(server, tmp_path, directory, pools, num_workers):
    """Two processes with `num_workers` each, and a cache that holds two of eight shards."""
    make_small(tmp_path / "web", count=64, per_shard=8)
    size = (tmp_path / "web/train-000000.tar").stat().st_size
    (tmp_path / "web/manifest.json").unlink(missing_ok=True)
    limit = str(2.5 * size / 2**30)
    commands = [
        [sys.executable, "-c", SHARE, server.url, directory, limit, seed, num_workers, pools]
        for seed in (0, 1)
    ]
    running = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for command in commands
    ]
    for seed, process in enumerate(running):
        out, problem = process.communicate(timeout=500)
        assert process.returncode == 0, problem.decode()
        expected = PoolStream(tmp_path / "web", pool=4, seed=seed, buffer=4)
        assert json.loads(out) == keys_of(islice(expected, pools))
    assert len(server.gets) > pools / 2  # eight shards, again and again


def test_processes_share_a_cache_at_its_limit(server, tmp_path, directory):
    share(server, tmp_path, directory, pools=60, num_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_processes_share_a_cache_at_its_limit_for_long(server, tmp_path, directory, trial):
    share(server, tmp_path, directory, pools=1000, num_workers=4)


# plain HTTP


def test_a_shard_larger_than_one_block_needs_no_ranges(server, tmp_path):
    path = tmp_path / "web/train-000000.tar"
    with path.open("ab") as file:  # zeros after the end mark
        file.truncate(12 << 20)
    assert stored(f"{server.url}/train-000000.tar") == KEYS[:4]


def test_urls_are_read_as_urls(server, tmp_path):
    odd = tmp_path / "web/sp ace, 100%25 é"
    shutil.copytree(tmp_path / "web", odd)
    quoted = f"{server.url}/sp%20ace,%20100%2525%20%C3%A9"
    assert find_splits(f"{quoted}?token=a%2Fb/c.tar") == ["train"]
    server.gets.clear()
    assert stored(f"{quoted}?token=a/b") == KEYS
    assert all(path.endswith("?token=a/b") for path in server.gets)
    assert stored(f"{quoted}/manifest.json?token=a") == KEYS
    assert stored(f"{quoted}/train-{{000000..000002}}.tar?token=a") == KEYS
    assert stored(f"{quoted}/train-000001.tar?x=1&token=a/b.c") == KEYS[4:8]
    upper = server.url.replace("http", "HTTP")
    assert stored(f"{upper}/train-000001.tar") == KEYS[4:8]


@pytest.mark.parametrize("start", ["file://{}", "file:{}", "file://localhost{}", "FILE://{}"])
def test_file_urls_name_what_their_path_does(tmp_path, capsys, start):
    root = tmp_path / "sp ace é"
    make_small(root)
    url = start.format(str(root).replace(" ", "%20").replace("é", "%C3%A9"))
    assert stored(url) == stored(f"{url}/manifest.json") == stored([f"{url}/{n}" for n in NAMES])
    assert stored(f"{url}/train-{{000000..000002}}.tar") == KEYS
    assert find_splits(url) == ["train"]
    assert find_manifest(url) == find_manifest(root)
    assert verify(url) == []
    for command in ("ls", "verify", "head"):
        assert main(["shards", command, url]) == 0
    (root / "manifest.json").unlink()
    assert stored(url) == KEYS
    assert main(["shards", "ls", url]) == 0


def test_a_file_url_of_another_machine_is_refused():
    with pytest.raises(DataError, match="file URL must be of this machine, file:///path"):
        stored("file://elsewhere/data")


def test_the_tokenizer_is_found_by_every_address(server, tmp_path):
    lines = [json.dumps({"text": f"word {i} and more of it " * 9}) for i in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = TextOptions(
        f"jsonl:{tmp_path}/in.jsonl", target_domain=None, num_target=1, num_test=1, block=8,
        tokenizer="bpe:300",
    )  # fmt: skip
    make_text(tmp_path / "web/te xt", options)
    expected = open_tokenizer(tmp_path / "web/te xt").vocabulary()
    for root in (f"{server.url}/te%20xt?q=1", f"file://{tmp_path}/web/te%20xt"):
        assert open_tokenizer(root).vocabulary() == expected


# what is remembered, and where nothing can be


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b"null", b'{"shard": {"name": 3}}', b"\xff"])
def test_an_index_that_cannot_be_read_is_made_anew(tmp_path, directory, left):
    make_small(tmp_path, count=3)
    shard = tmp_path / NAMES[0]
    assert stored([shard]) == KEYS[:3]
    kept = index_of(directory).read_bytes()
    index_of(directory).write_bytes(left)
    assert stored([shard]) == KEYS[:3]
    assert index_of(directory).read_bytes() == kept


def test_a_shard_of_equal_size_and_date_is_scanned_again(tmp_path):
    shard, other = tmp_path / "one" / NAMES[0], tmp_path / "two" / NAMES[0]
    make_small(shard.parent, count=3)
    make_small(other.parent, count=3, first=50)
    os.utime(other, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
    assert stored([shard]) == KEYS[:3]
    shutil.copy2(other, shard)
    assert stored([shard]) == ["s50", "s51", "s52"]
    make_small(tmp_path / "three", count=3, first=70)
    os.utime(tmp_path / "three" / NAMES[0], ns=(0, shard.stat().st_mtime_ns))
    (tmp_path / "three" / NAMES[0]).rename(shard)
    assert stored([shard]) == ["s70", "s71", "s72"]


def fail_to_write(monkeypatch, error):
    """A directory that cannot be written: root may write everywhere, so the calls fail."""

    def failing(path, **_):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr("selectflow.data.cache.atomic_file", failing)


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_local_shards_need_no_cache(tmp_path, monkeypatch, caplog, error):
    make_small(tmp_path)
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
