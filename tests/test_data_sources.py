"""What a user may name as data: folders, patterns, lists, and shards that come over a network."""

import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import islice

import fsspec
import pytest
from small_datasets import edit_shard, keys_of, make_small
from test_run import ROOT, run_trainer

from selectflow.cli import main
from selectflow.data import (
    Cache,
    DataError,
    PoolStream,
    find_splits,
    make_digits,
    read_batches,
    read_split,
    sources,
    verify,
)
from selectflow.data.tar_index import scan
from selectflow.run.ledger import read_ledger

KEYS = [f"s{i}" for i in range(10)]
pytestmark = pytest.mark.usefixtures("directory")


@pytest.fixture
def memory(tmp_path):
    """The small dataset on fsspec's in-memory file system, with the local one under tmp_path."""
    make_small(tmp_path)
    files = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        files.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    yield files
    files.rm("/bucket", recursive=True)


@pytest.fixture
def server(tmp_path):
    """A loopback HTTP server over tmp_path; `failures` requests of shards fail as `failure` says:
    they are refused by 503, cut off in the middle of the shard, or never answered."""
    make_small(tmp_path)
    over = threading.Event()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if not (self.path.endswith(".tar") and self.server.failures > 0):
                super().do_GET()
                return
            self.server.failures -= 1
            if self.server.failure == "refused":
                self.send_error(503)
            elif self.server.failure == "cut":
                data = (tmp_path / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            else:
                over.wait()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as http:
        http.failures, http.failure, http.requests = 0, "refused", []
        http.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        over.set()
        http.shutdown()
        thread.join()


def stored(source, **options):
    return [each["__key__"] for each in read_split(source, "train", **options)]


# local


def test_every_way_to_name_the_shards_gives_the_same_samples(tmp_path):
    make_small(tmp_path)
    pattern = f"{tmp_path}/train-{{000000..000002}}.tar"
    listed = [f"{tmp_path}/train-00000{i}.tar" for i in range(3)]
    for source in (
        tmp_path, f"{tmp_path}/manifest.json", f"file://{tmp_path}", pattern, listed, [pattern],
    ):  # fmt: skip
        assert stored(source) == KEYS, source
    expected = keys_of(islice(PoolStream(tmp_path, pool=4, seed=2, buffer=5), 9))
    (tmp_path / "manifest.json").unlink()
    for source in (tmp_path, pattern, listed):
        stream = PoolStream(source, pool=4, seed=2, buffer=5)
        assert keys_of(islice(stream, 9)) == expected, source
    assert stored(listed[2]) == ["s8", "s9"]


def test_shards_without_a_manifest_are_described_once(tmp_path, monkeypatch):
    make_small(tmp_path)
    time.sleep(0.1)  # what has just been written is not remembered
    pattern = f"{tmp_path}/train-{{000000..000002}}.tar"
    state = PoolStream(pattern, pool=4, seed=0).state_dict()
    described = []

    def scanned(file):
        described.append(file.name)
        return scan(file)

    monkeypatch.setattr(sources, "scan", scanned)
    PoolStream(pattern, pool=4, seed=0).load_state_dict(state)
    assert described == []
    edit_shard(tmp_path, "train-000001.tar", lambda members: members[:6])
    changed = PoolStream(pattern, pool=4, seed=0)
    assert [str(name) for name in described] == [f"{tmp_path}/train-000001.tar"]
    assert changed.num_samples == 8
    with pytest.raises(DataError, match="fingerprint must be"):
        changed.load_state_dict(state)


def test_fields_that_are_not_known_are_left_alone(tmp_path):
    make_small(tmp_path)
    name = "train-000000.tar"

    def rename(members):
        for info, data in members:
            info.name = info.name.replace(".json", ".other.bin")
            yield info, data

    edit_shard(tmp_path, name, rename)
    first = next(iter(read_split(str(tmp_path / name), "train")))
    assert sorted(first) == ["__key__", "cls", "npy"]


def test_a_cut_shard_without_a_manifest_is_named(tmp_path):
    make_small(tmp_path)
    path = tmp_path / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train-000001\.tar must be a whole tar file, got 3000 b"):
        stored([path])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source must name at least one dataset"),
        ([], "source must hold samples"),
        ("nowhere", "root must be a dataset directory"),
        ("nowhere/a.tar", r"nowhere/a\.tar must be present, got no such file"),
        ("gone-{0..2}.tar", r"gone-0\.tar must be present"),
    ],
)
def test_sources_with_nothing_in_them_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        PoolStream(source, pool=1, seed=0)


def test_the_splits_of_a_dataset_and_of_a_folder_of_shards(tmp_path, memory, capsys):
    make_digits(tmp_path / "digits")
    listed = []
    for rest in range(2):
        assert find_splits(tmp_path / "digits") == ["target", "test", "train"]
        assert verify(tmp_path / "digits") == []
        assert main(["shards", "ls", str(tmp_path / "digits")]) == 0
        listed.append(capsys.readouterr().out.splitlines())
        (tmp_path / "digits" / "manifest.json").unlink(missing_ok=rest == 1)
    assert listed[0][:-1] == listed[1][:-1]
    assert listed[1][-1] == "made from: not known, without a manifest"
    assert find_splits("memory://bucket") == ["train"]
    assert main(["shards", "ls", "memory://bucket"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "made from: name=small seed=0"
    with pytest.raises(DataError, match="root must be a dataset directory with a manifest"):
        find_splits(tmp_path / "nowhere")


# remote


@pytest.mark.parametrize(
    "source",
    [
        "memory://bucket",
        "memory://bucket/manifest.json",
        "memory://bucket/train-{000000..000002}.tar",
    ],
)
def test_remote_shards_are_fetched_once_and_kept(memory, tmp_path, source):
    expected = keys_of(islice(PoolStream(tmp_path, pool=4, seed=2, buffer=5), 9))
    options = {"pool": 4, "seed": 2, "buffer": 5, "memory_gib": 0}
    assert keys_of(islice(PoolStream(source, **options), 9)) == expected
    for index in range(3):
        memory.rm(f"/bucket/train-{index:06d}.tar")
    assert keys_of(islice(PoolStream(source, **options), 9)) == expected
    assert len(read_batches(source, "train", 4)) == 3


def test_a_damaged_copy_is_fetched_again(memory, directory):
    assert stored("memory://bucket") == KEYS
    for path in directory.glob("*.shard"):
        path.write_bytes(path.read_bytes()[:100])
    assert stored("memory://bucket") == KEYS
    memory.pipe_file("/bucket/train-000001.tar", b"damaged at its origin")
    for path in directory.glob("*.shard"):
        path.unlink()
    with pytest.raises(DataError, match=r"memory://bucket/train-000001\.tar must be a tar file"):
        stored("memory://bucket")


def test_the_cache_keeps_its_size_and_the_order_is_kept(memory, tmp_path, directory):
    size = max(path.stat().st_size for path in tmp_path.glob("*.tar"))
    cache = Cache(directory, max_gib=1.5 * size / 2**30)
    stream = PoolStream("memory://bucket", pool=4, seed=0, memory_gib=0, cache=cache)
    expected = PoolStream(tmp_path, pool=4, seed=0)
    for one, other in islice(zip(stream, expected, strict=True), 20):
        assert one["key"] == other["key"]
        assert sum(path.stat().st_size for path in directory.glob("*.shard")) <= 1.5 * size


def test_a_transfer_that_breaks_leaves_nothing_and_is_tried_again(memory, directory, monkeypatch):
    breaks = [2]
    real = fsspec.implementations.memory.MemoryFile.read

    def read(file, *args):
        if breaks[0] and b"ustar" in (data := real(file, *args)):
            breaks[0] -= 1
            assert len(list(directory.glob(".*.tmp"))) == 1
            raise OSError("connection lost")
        return data if breaks[0] else real(file, *args)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", read)
    cache = Cache(directory, backoff_s=0)
    assert stored("memory://bucket", cache=cache) == KEYS
    assert breaks == [0]
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_over_http(server, tmp_path, num_workers):
    stream = PoolStream(server.url, pool=4, seed=0, memory_gib=0, num_workers=num_workers)
    expected = PoolStream(tmp_path, pool=4, seed=0)
    assert keys_of(islice(stream, 10)) == keys_of(islice(expected, 10))


FAILURES = pytest.mark.parametrize("failure", ["refused", "cut", "never answered"])


@FAILURES
def test_a_server_that_recovers_is_waited_for(server, directory, failure):
    server.failures, server.failure = 3, failure
    cache = Cache(directory, attempts=4, backoff_s=0.01, timeout_s=0.5)
    assert stored(server.url, cache=cache) == KEYS
    assert not list(directory.glob(".*"))


@FAILURES
def test_a_server_that_stays_broken_is_named(server, directory, failure):
    server.failures, server.failure = 100, failure
    cache = Cache(directory, attempts=3, backoff_s=0.01, timeout_s=0.5)
    with pytest.raises(DataError, match=rf"{server.url}/train-000000\.tar .* in attempt 3"):
        stored(server.url, cache=cache)
    server.failures = 3  # all attempts for the first shard
    tolerant = PoolStream(server.url, pool=10, seed=0, cache=cache, max_errors=4)
    assert sorted(next(tolerant)["key"]) == KEYS[4:]
    assert tolerant.errors == {f"{server.url}/train-000000.tar": 4}


def test_a_missing_object_is_not_asked_for_again(server, directory, tmp_path):
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar must be readable, got FileNotFound"):
        stored(f"{server.url}/train-000000.tar", cache=Cache(directory))
    assert server.requests.count("/train-000000.tar") <= 2  # for its version and for itself


def test_a_file_system_that_is_not_installed_is_named_with_the_extra():
    if find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(DataError, match=r"shard s3://bucket/a\.tar .* 'selectflow\[remote\]'"):
        stored("s3://bucket/a.tar")


def test_a_run_streams_from_a_server(server, tmp_path):
    make_digits(tmp_path / "digits")
    done = run_trainer(
        tmp_path, ROOT / "configs/digits_online.yaml", "steps=2", "track.wandb=disabled",
        "data.name=shards", f"data.root={server.url}/digits", "data.label_noise=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    local = run_trainer(
        tmp_path, ROOT / "configs/digits_online.yaml", "steps=2", "track.wandb=disabled",
        "data.name=shards", "data.root=digits", "data.label_noise=0", "name=local",
    )  # fmt: skip
    assert local.returncode == 0, local.stderr
    ledgers = [read_ledger(tmp_path / "runs" / name) for name in ("digits_online-s0", "local")]
    assert ledgers[0].equals(ledgers[1])


# commands


def test_commands_run_only_where_they_are_allowed(tmp_path, directory):
    make_small(tmp_path)
    source = f"pipe:cat {tmp_path}/train-{{000000..000002}}.tar"
    with pytest.raises(
        DataError, match=r"source must not run commands, got 'pipe:cat .*allow_pipe"
    ):
        stored(source)
    assert stored(source, cache=Cache(directory, allow_pipe=True)) == KEYS


def test_a_command_that_fails_is_named(tmp_path, directory):
    cache = Cache(directory, allow_pipe=True, attempts=2, backoff_s=0)
    with pytest.raises(DataError, match=r"shard pipe:exit 3 must be readable, .* exit status 3 in"):
        stored("pipe:exit 3", cache=cache)
    assert [path.name for path in directory.iterdir()] == ["locks"]


@pytest.mark.parametrize(
    "option", [{"max_gib": 0}, {"attempts": 0}, {"backoff_s": -1}, {"timeout_s": 0}]
)
def test_cache_options_out_of_range_are_refused(option):
    with pytest.raises(DataError, match=r"max_gib must be > 0, .* backoff_s >= 0 and timeout_s > "):
        Cache(**option)
