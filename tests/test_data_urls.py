"""Plain HTTP, and addresses as people write them."""

import json
import shutil

import pytest
from small_datasets import make_small

from selectflow.cli import main
from selectflow.data import (
    DataError,
    TextOptions,
    find_manifest,
    find_splits,
    make_text,
    open_tokenizer,
    read_split,
    verify,
)

KEYS = [f"s{i}" for i in range(10)]
NAMES = [f"train-00000{i}.tar" for i in range(3)]
pytestmark = pytest.mark.usefixtures("directory")


def stored(source, **options):
    return [each["__key__"] for each in read_split(source, "train", **options)]


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
