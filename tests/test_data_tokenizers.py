"""Text that looks like special tokens, and tokenizers as their files are found."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from selectflow.data import DataError, TextOptions, make_text, open_tokenizer, read_split
from selectflow.data.documents import json_lines
from selectflow.data.tokenizers import SubwordTokenizer, load_tokenizer, make_tokenizer

TEXTS = [f"document {number} <|endoftext|> and its tail </s> [SEP] too" for number in range(60)]


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "[SEP]"])
def test_a_special_token_in_a_text_is_its_letters(tmp_path, name):
    texts = [text.replace("<|endoftext|>", name) for text in TEXTS]
    trained = make_tokenizer("bpe:300", texts)
    raw = Tokenizer.from_str(trained.to_json())
    raw.add_special_tokens([name, "[PAD]"])
    (tmp_path / "tokenizer.json").write_text(raw.to_str())
    for tokenizer in (trained, load_tokenizer(tmp_path)):
        text = f"before {name} after [PAD]"
        tokens = tokenizer.encode(text)
        assert tokenizer.end not in tokens
        assert tokenizer.decode(tokens) == text
        assert len(tokens) > len(tokenizer.encode(f"before {name[:1]}"))


def test_no_document_ends_in_its_middle(tmp_path):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    options = TextOptions(
        f"jsonl:{tmp_path}/in.jsonl", None, num_target=1, num_test=1, block=8, tokenizer="bpe:300"
    )
    make_text(tmp_path / "out", options)
    end = open_tokenizer(tmp_path / "out").end
    assert not any((each["npy"] == end).any() for each in read_split(tmp_path / "out", "train"))


def test_an_end_that_is_a_word_like_others_is_refused():
    raw = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = SubwordTokenizer(raw)
    assert tokenizer.encode("a b a").tolist() == [0, 2, 0]
    with pytest.raises(DataError, match=r"text must not hold '\[SEP\]', .* got 'a \[SEP\] a'"):
        tokenizer.encode("a [SEP] a")


def test_a_file_that_cuts_and_fills_up_texts_does_not_here(tmp_path):
    trained = make_tokenizer("bpe:300", TEXTS)
    raw = Tokenizer.from_str(trained.to_json())
    raw.enable_truncation(5)
    raw.enable_padding(length=50)
    raw.save(str(tmp_path / "tokenizer.json"))
    for text in (TEXTS[0], "a"):
        expected = trained.encode(text)
        np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(text), expected)


def test_ids_with_gaps_are_below_the_number_of_tokens():
    raw = Tokenizer(models.WordLevel({"a": 300, "<eos>": 7, "?": 2}, unk_token="?"))
    tokenizer = SubwordTokenizer(raw)
    assert tokenizer.num_tokens == 301
    assert tokenizer.encode("a").tolist() == [300]


def test_a_tokenizer_that_drops_characters_is_told_of(caplog):
    SubwordTokenizer(Tokenizer(models.BPE({"a": 0, "<eos>": 1}, [])))
    assert "leaves out characters that it does not know" in caplog.text
    caplog.clear()
    make_tokenizer("bpe:300", TEXTS)
    assert caplog.messages == []


def test_domains_are_what_the_lines_say(tmp_path):
    """Numbers, too: 0 is a domain; and a byte order mark is none of the text."""
    domains = ["news", 0, 1, False, None, ""]
    rows = [json.dumps({"text": f"a\r\n{domain}", "domain": domain}) for domain in domains]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    read = [document for group in json_lines(tmp_path / "in.jsonl") for document in group.read()]
    assert [each.domain for each in read] == ["news", "0", "1", "False", "text", "text"]
    assert [each.text for each in read] == [f"a\r\n{domain}" for domain in domains]
