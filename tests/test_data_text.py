"""Text as token blocks: splits, mixtures, dirt and tokenizers, against the text they came from."""

import json
import subprocess
import sys
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from small_datasets import files_of

from selectflow.cli import main
from selectflow.data import (
    DataError,
    PoolStream,
    TextOptions,
    make_text,
    open_tokenizer,
    read_manifest,
    read_metadata,
    read_split,
    write_subset,
)
from selectflow.data.documents import Document, json_lines, source_text, split_docstrings
from selectflow.data.text import cut
from selectflow.data.tokenizers import (
    ByteTokenizer,
    SubwordTokenizer,
    load_tokenizer,
    make_tokenizer,
)

MIXTURE = {
    "code": 0.3, "prose": 0.2, "tables": 0.1, "shuffled": 0.2, "duplicate": 0.1, "boilerplate": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    options = TextOptions(
        mixture=MIXTURE, num_train=400, num_target=20, num_test=30, block=64, tokenizer="bytes"
    )
    make_text(root, options)
    return root


def write_lines(path, texts, domain="news"):
    rows = [json.dumps({"text": text, "domain": domain}) for text in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


TEXTS = [f"document {number}: " + f"word{number} " * (3 + number % 5) for number in range(200)]


# blocks


def encoded(*texts):
    tokenizer = ByteTokenizer()
    return [(Document(f"d{i}", "x", t), tokenizer.encode(t)) for i, t in enumerate(texts)]


def pieces(rest, *texts):
    return [
        (bytes(block.tokens), block.name, block.place)
        for block in cut(encoded(*texts), 255, 4, rest)
    ]


def test_blocks_by_hand():
    texts = "abcdefghi", "", "jk", "lmno"
    assert pieces("drop", *texts) == [
        (b"abcd", "d0", 0), (b"efgh", "d0", 1), (b"lmno", "d3", 0),
    ]  # fmt: skip
    assert pieces("pad", *texts) == [
        (b"abcd", "d0", 0), (b"efgh", "d0", 1), (b"i\xff\xff\xff", "d0", 2),
        (b"jk\xff\xff", "d2", 0), (b"lmno", "d3", 0),
    ]  # fmt: skip
    # abcd efgh i#|# jk#l mno#: the end of the empty document is the second #
    assert pieces("pack", *texts) == [
        (b"abcd", "d0", 0), (b"efgh", "d0", 1), (b"i\xff\xffj", "d0", 2), (b"k\xfflm", "d2", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("rest", ["pad", "pack"])
def test_no_token_is_lost_but_at_the_end(rest):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 122, size))) for size in rng.integers(0, 30, 50)]
    blocks = list(cut(encoded(*texts), 255, 8, rest))
    text = b"".join(bytes(block.tokens) for block in blocks).replace(b"\xff", b"").decode()
    assert "".join(texts).startswith(text)
    assert len("".join(texts)) - len(text) < 8


# the text that comes with Python


def test_docstrings_are_told_from_code():
    lines = '"""Top.', '\x0c"""', "X = 1", "class A:", '    """In A."""', "    y = 'no'", ""
    code, docstrings = split_docstrings("\n".join(lines))
    assert code == "X = 1\nclass A:\n    y = 'no'\n"
    assert docstrings == "Top.\n\x0c\n\nIn A."


def test_blocks_are_the_text_of_their_documents(mixed):
    groups = [each for each in source_text() if each.identity.startswith(("topics", "encodings"))]
    texts = {each.name: each.text.encode() for group in groups for each in group.read()}
    seen = 0
    for sample in read_split(mixed, "train"):
        made = sample["json"]
        if made["origin"] in ("prose", "tables"):
            assert bytes(sample["npy"]) in texts[made["document"]]
            seen += 1
    assert seen == 120
    library = Path(sysconfig.get_path("stdlib"))
    for sample in read_split(mixed, "test"):
        source = (library / f"{sample['json']['document']}.py").read_text("utf-8")
        assert bytes(sample["npy"]) in split_docstrings(source)[0].encode()


def test_the_mixture_is_as_asked_and_its_origins_are_recorded(mixed):
    made = list(read_metadata(mixed, "train").values())
    counts = Counter(each["origin"] for each in made)
    assert counts == {name: round(share * 400) for name, share in MIXTURE.items()}
    dirty = {each["origin"] for each in made if each["altered"]}
    assert dirty == {"shuffled", "duplicate", "boilerplate"}
    for split, count in {"target": 20, "test": 30}.items():
        held_out = read_metadata(mixed, split).values()
        assert [each["origin"] for each in held_out] == ["code"] * count


def test_a_mixture_without_the_targets_domain(tmp_path):
    """There is nothing to make dirt of, which matters only where some is asked for."""
    options = {"num_train": 40, "num_target": 5, "num_test": 5, "block": 64}
    make_text(tmp_path, TextOptions(mixture={"prose": 0.5, "tables": 0.5}, **options))
    made = read_metadata(tmp_path, "train").values()
    assert Counter(each["origin"] for each in made) == {"prose": 20, "tables": 20}
    assert {each["origin"] for each in read_metadata(tmp_path, "target").values()} == {"code"}
    with pytest.raises(DataError, match="must have clean text to make dirt of"):
        make_text(tmp_path / "b", TextOptions(mixture={"prose": 0.5, "shuffled": 0.5}, **options))


def test_no_document_is_in_two_splits(mixed):
    files = {}
    for split in ("train", "target", "test"):
        documents = {each["document"] for each in read_metadata(mixed, split).values()}
        files[split] = {name.removesuffix("/docstrings") for name in documents}
    assert files["train"].isdisjoint(files["target"] | files["test"])
    assert files["target"].isdisjoint(files["test"])


def test_dirt_is_what_it_says(mixed):
    by_origin = defaultdict(list)
    for sample in read_split(mixed, "train"):
        by_origin[sample["json"]["origin"]].append(sample)
    sorted_code = {bytes(sorted(each["npy"])) for each in by_origin["code"]}
    code = {bytes(each["npy"]) for each in by_origin["code"]}
    for each in by_origin["shuffled"]:
        assert bytes(sorted(each["npy"])) in sorted_code
        assert bytes(each["npy"]) not in code or len(set(each["npy"].tolist())) == 1
        assert each["json"]["domain"] == "code"
    copies = Counter(bytes(each["npy"]) for each in by_origin["duplicate"])
    assert sorted(copies.values()) == [20, 20]  # 40 of them, at most 32 of each
    clean = {bytes(e["npy"]) for name in ("code", "prose", "tables") for e in by_origin[name]}
    assert copies.keys() <= clean
    boilerplate = b"".join(bytes(each["npy"]) for each in by_origin["boilerplate"]).decode()
    assert "All rights reserved" in boilerplate


def test_train_is_in_random_order(mixed):
    origins = [each["origin"] for each in read_metadata(mixed, "train").values()]
    for half in (origins[:200], origins[200:]):
        assert 40 <= Counter(half)["code"] <= 80  # of 120 in all


def test_text_streams_as_tokens_and_resumes(mixed):
    stream = PoolStream(mixed, pool=8, seed=0)
    first = next(stream)
    assert first["tokens"].shape == (8, 64)
    assert 0 <= first["tokens"].min() <= first["tokens"].max() < 256
    state, expected = stream.state_dict(), next(stream)
    other = PoolStream(mixed, pool=8, seed=0)
    other.load_state_dict(state)
    found = next(other)
    assert found["key"] == expected["key"]
    assert found["tokens"].equal(expected["tokens"])


# determinism


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_same_options_give_the_same_bytes_in_another_process(tmp_path, tokenizer):
    lines = write_lines(tmp_path / "in.jsonl", TEXTS)
    options = [
        "shards", "make", f"text:jsonl:{lines}", "--domain", "news", "--block", "8",
        "--target", "5", "--test", "5", "--train", "40", "--mixture", "news=0.5,shuffled=0.5",
        "--tokenizer", tokenizer,
    ]  # fmt: skip
    assert main([*options, "--root", str(tmp_path / "here")]) == 0
    command = [sys.executable, "-W", "ignore", "-m", "selectflow", *options]
    subprocess.run([*command, "--root", str(tmp_path / "there")], check=True, capture_output=True)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    make = TextOptions(
        f"jsonl:{lines}", "news", {"news": 0.5, "shuffled": 0.5}, 40, 5, 5, 8, tokenizer=tokenizer
    )
    make_text(tmp_path / "seeded", make, seed=1)
    assert files_of(tmp_path / "seeded") != files_of(tmp_path / "here")
    make_text(tmp_path / "seeded", make, seed=1)  # reused
    with pytest.raises(DataError, match="seed must be 1"):
        make_text(tmp_path / "seeded", make, seed=2)


# sources


def test_every_source_gives_the_same_blocks(tmp_path):
    import datasets  # noqa: PLC0415

    write_lines(tmp_path / "in.jsonl", TEXTS)
    for number, text in enumerate(TEXTS):
        path = tmp_path / "files" / "news" / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "domain": ["news"] * len(TEXTS)})
    rows.save_to_disk(tmp_path / "rows", num_proc=None)
    found = []
    for source in (f"jsonl:{tmp_path}/in.jsonl", f"files:{tmp_path}/files", f"hf:{tmp_path}/rows"):
        root = tmp_path / source.partition(":")[0]
        root = root.with_name(root.name + "-out")
        make_text(root, TextOptions(source, None, num_target=5, num_test=5, block=8))
        found.append([bytes(each["npy"]) for each in read_split(root, "train")])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 300


def test_copies_of_a_document_are_in_one_split(tmp_path):
    write_lines(tmp_path / "in.jsonl", TEXTS * 3)
    options = TextOptions(f"jsonl:{tmp_path}/in.jsonl", None, num_target=9, num_test=9, block=16)
    make_text(tmp_path / "out", options)
    blocks = {}
    for split in ("train", "target", "test"):
        found = {bytes(each["npy"]) for each in read_split(tmp_path / "out", split)}
        blocks[split] = {block for block in found if b"document" in block}
    assert blocks["train"].isdisjoint(blocks["target"] | blocks["test"])
    assert blocks["target"].isdisjoint(blocks["test"])


def test_half_a_character_is_named_with_its_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "half \\ud800"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="in/00000002 must have a text of whole characters, got "):
        json_lines(path)


# tokenizers


def test_trained_pieces_give_the_text_back(tmp_path):
    tokenizer = make_tokenizer("bpe:300", TEXTS)
    assert isinstance(tokenizer, SubwordTokenizer)
    text = "word7 in a document: ünïcode\n\ttoo"
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens) == text
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7].encode()) / 2
    assert tokenizer.end == 0


def test_the_tokenizer_stays_with_the_shards(tmp_path):
    write_lines(tmp_path / "in.jsonl", TEXTS)
    root = tmp_path / "out"
    options = TextOptions(
        f"jsonl:{tmp_path}/in.jsonl", None, num_target=5, num_test=5, block=8, tokenizer="bpe:300"
    )
    make_text(root, options)
    tokenizer = open_tokenizer(root)
    facts = read_manifest(root).tokenizer
    assert (facts["num_tokens"], facts["end"]) == (tokenizer.num_tokens, tokenizer.end)
    first = next(read_split(root, "test"))
    assert tokenizer.decode(first["npy"]) in "\n".join(TEXTS)
    write_subset(tmp_path / "part", root, "train", [next(read_split(root, "train"))["__key__"]], {})
    assert open_tokenizer(tmp_path / "part").num_tokens == tokenizer.num_tokens
    again = TextOptions(
        f"jsonl:{tmp_path}/in.jsonl", None, num_target=5, num_test=5, block=8, tokenizer=str(root)
    )
    make_text(tmp_path / "again", again)
    assert read_manifest(tmp_path / "again").splits == read_manifest(root).splits

    path = root / "tokenizer.json"
    path.write_text(path.read_text().replace("word", "w0rd"))
    with pytest.raises(DataError, match=r"must be the tokenizer of the manifest, sha256"):
        open_tokenizer(root)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer.json must be readable"):
        open_tokenizer(root)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be >= 1, got 0"),
        ({"rest": "keep"}, "rest must be drop, pad or pack, got 'keep'"),
        ({"mixture": {"code": 1.0}}, "num_train must be given with a mixture"),
        ({"mixture": {"code": 0.7}, "num_train": 9}, "add up to 1, got .* adding up to 0.7"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        TextOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source must be python, files:FOLDER, jsonl:FILE or hf:NAME"),
        ({"source": "files:nowhere"}, "folder must be one that can be read, got 'nowhere'"),
        ({"source": "jsonl:nowhere"}, "nowhere must be readable UTF-8"),
        ({"tokenizer": "bpe:12"}, "tokenizer must be bpe:SIZE with a size >= 257"),
        ({"tokenizer": "nowhere.json"}, "tokenizer must be bytes, bpe:SIZE, .* without a network"),
        ({"target_domain": "poems"}, "num_target must be at most the 0 blocks of text of domain"),
        (
            {"mixture": {"code": 0.5, "poems": 0.5}, "num_train": 10},
            "at most the 0 blocks that there are of 'poems', got 5",
        ),
    ],
)
def test_text_that_is_not_there_is_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", TEXTS, "code")
    given = {"source": f"jsonl:{tmp_path}/in.jsonl", "num_target": 5, "num_test": 5, "block": 8}
    with pytest.raises(DataError, match=message):
        make_text(tmp_path / "out", TextOptions(**given | options))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 of .* must be a JSON object"), ('{"txt": 1}', "00000002 must have a string")],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        make_text(tmp_path / "out", TextOptions(f"jsonl:{path}", None))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    from tokenizers import Tokenizer, models  # noqa: PLC0415

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"to end a document, got none"):
        load_tokenizer(tmp_path / "t.json")
