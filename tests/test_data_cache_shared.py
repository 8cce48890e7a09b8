"""One cache for several processes and threads, which remove what others read."""

import json
import os
import subprocess
import sys
import threading
from itertools import islice

import pytest
from small_datasets import keys_of, make_small

from selectflow.data import Cache, PoolStream

NAMES = [f"train-00000{i}.tar" for i in range(3)]
pytestmark = pytest.mark.usefixtures("directory")


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
