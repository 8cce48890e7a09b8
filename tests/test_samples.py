"""The samples of extreme scores: in a table beside the run, and over all of it, as they look."""

import json
import re

import numpy as np
import pytest
import torch
from synthetic_runs import write_ledger
from test_language_trainer import KINDS, TEXT, TRAINER, configured, run
from test_resume import Killed, killed_at
from wandb_log import offline_records

from selectflow.data import make_digits, open_tokenizer, read_metadata, read_samples
from selectflow.report.groups import groups
from selectflow.report.page import examine_groups
from selectflow.report.runs import load_runs
from selectflow.run.ledger import (
    rank_samples,
    read_ledger,
    read_scored,
    standardised,
    sum_samples,
)
from selectflow.run.loop import train
from selectflow.run.samples import (
    Sample,
    SampleTable,
    extreme_rows,
    extremes,
    lines,
    one_line,
    show,
)
from selectflow.strategies import Selection


def selection(keys, scores):
    return Selection(
        pool={"key": list(keys), "x": torch.arange(len(keys))}, scores=torch.tensor(scores),
        indices=torch.tensor([0]), losses=None, step=0, horizon=0, age=0, target_loss=None,
        lookahead_s=0.0, seconds=0.0,
    )  # fmt: skip


def in_sd(scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    return ((scores - scores.mean()) / scores.std(correction=0)).tolist()


def test_the_extremes_of_a_stretch_are_those_of_sorting_it_all():
    """Pools of different scale; a key that comes again stands once, with its extreme."""
    generator = torch.Generator().manual_seed(0)
    table, found = SampleTable(4, {"even": frozenset(f"k{n}" for n in range(0, 40, 2))}), []
    for step in range(1, 9):
        keys = [f"k{n}" for n in torch.randperm(40, generator=generator)[:10].tolist()]
        scores = (torch.randn(10, generator=generator) * 10.0**step).tolist()
        table.add(step, selection(keys, scores))
        found += [(value, key) for value, key in zip(in_sd(scores), keys, strict=True)]
    table.add(9, selection(["same", "score"], [2.0, 2.0]))  # says nothing
    for end, best in (("highest", max), ("lowest", min)):
        by_key = {key: best(v for v, k in found if k == key) for _, key in found}
        expected = sorted(by_key, key=by_key.get, reverse=best is max)[:4]
        rows = [row for row in table.rows() if row["end"] == end]
        assert [row["key"] for row in rows] == expected
        assert [row["score"] for row in rows] == pytest.approx(
            [by_key[k] for k in expected], rel=1e-6
        )
        assert all((row["origin"] == "even") == (int(row["key"][1:]) % 2 == 0) for row in rows)
    again = SampleTable(4, {})
    again.load_state_dict(json.loads(json.dumps(table.state_dict())))
    assert again.rows() == table.rows()
    table.clear()
    assert table.rows() == []


def test_a_line_is_one_line_and_clipped():
    assert one_line("a\n\tb\x07é\u2028") == "a\\n\\tb\\x07é\\u2028"
    table = SampleTable(1, {"prose": frozenset("a")}, lambda batch, i: "x\n" * 200)
    table.add(3, selection("ab", [1.0, 0.0]))
    text = lines(table.rows(), "title").splitlines()
    assert text[0] == "title"
    assert text[1].startswith("  highest  +1.00 sd  prose  x\\nx\\nx")
    assert [len(line) for line in text[1:]] == [100, 100]
    assert text[2].startswith("  lowest   -1.00 sd         x")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Text of two kinds in tokens of a trained tokenizer."""
    root = tmp_path_factory.mktemp("bpe")
    source = root / "text.jsonl"
    texts = [f"number {n} and word{n % 7} again {n * n} " * 12 for n in range(400)]
    rows = [{"text": text, "domain": "ab"[n % 2]} for n, text in enumerate(texts)]
    source.write_text("\n".join(json.dumps(row) for row in rows))
    made = {
        **TEXT, "mixture": None, "source": f"jsonl:{source}", "tokenizer": "bpe:400",
        "target_domain": None,
    }  # fmt: skip
    return {"name": "text", "root": root / "shards", "text": made, "pool": 16, "target_batch": 8}


def test_a_run_shows_the_text_of_its_extremes(tmp_path, bpe, capsys):
    """What an evaluation prints is what the ledger of its stretch says; W&B gets the same."""
    track = {"samples": 2, "wandb": "offline"}
    run_dir = run(configured(tmp_path, bpe, KINDS["gpt2"], track=track))
    printed = capsys.readouterr().out
    tables = re.findall(
        r"(scores of the pools up to step \d+|mean scores.*)\n((?:  .*\n)+)", printed
    )
    assert [title[-1] for title, _ in tables] == ["4", "8", "n"]
    tokenizer = open_tokenizer(bpe["root"])
    rows = [row for row in read_ledger(run_dir).to_pylist() if row["step"] > 4]
    found = {}
    for step in range(5, 9):
        of_step = [row for row in rows if row["step"] == step]
        values = in_sd([row["score"] for row in of_step])
        for row, value in zip(of_step, values, strict=True):
            found[row["key"]] = max(value, found.get(row["key"], value))
    best = sorted(found, key=found.get, reverse=True)[:2]
    samples = read_samples(bpe["root"], "train", best)
    for key, line in zip(best, tables[1][1].splitlines(), strict=False):
        text = one_line(tokenizer.decode(samples[key]["npy"]))
        assert re.match(re.escape(f"  highest  {found[key]:+.2f} sd  ") + "[ab]  ", line)
        assert line.endswith(text) or line.rstrip("…").endswith(text[:40])
        assert "number" in text or "word" in text
    logged = [record for record in offline_records(run_dir) if record["type"] == "history"]
    assert sum("recent/table" in json.dumps(record) for record in logged) == 2


def test_the_page_shows_text_of_any_tokenizer(tmp_path, bpe):
    run_dir = run(configured(tmp_path, bpe, KINDS["gpt2"]))
    (examined,) = examine_groups(groups(load_runs([str(run_dir)])))
    tokenizer = open_tokenizer(bpe["root"])
    found = read_samples(bpe["root"], "train", [shown.sample.key for shown in examined.best])
    for shown in examined.best:
        assert shown.text == tokenizer.decode(found[shown.sample.key]["npy"])[:280]
    assert any("word" in shown.text for shown in examined.best)


def test_a_table_is_whole_after_a_resumption(tmp_path, bpe, capsys):
    """The stretch in which a run was killed, up to its checkpoint, is in the table."""
    printed = []
    for name in ("whole", "broken"):
        track = {"samples": 3}
        config = configured(tmp_path / name, bpe, KINDS["gpt2"], track=track)
        if name == "broken":
            with pytest.raises(Killed):
                train(config, killed_at(7, TRAINER["build_task"](config)))
            capsys.readouterr()
        run(config)
        out = capsys.readouterr().out
        table = out[out.index("scores of the pools up to step 8") :]
        printed.append(re.sub(r"  [\d.]+ (steps/s|s/step).*", "", table))  # the pace is of now
    assert printed[0] == printed[1]


@pytest.mark.parametrize("select", [{"strategy": "uniform"}, {"horizon": float("inf")}])
def test_scores_that_say_nothing_are_not_shown(tmp_path, bpe, capsys, select):
    """Those of uniform are random; offline, the pools were selected before."""
    select = {"keep": 8, "record_steps": 4} | select
    run(configured(tmp_path, bpe, KINDS["gpt2"], track={"samples": 2}, select=select))
    out = capsys.readouterr().out
    assert "scores of the pools" not in out
    assert ("mean scores of the whole run" in out) == (select.get("horizon") is not None)


def test_the_tokenizer_of_remote_shards_is_fetched_with_them(bpe, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTFLOW_CACHE", str(tmp_path / "cache"))
    remote = open_tokenizer(f"file://{bpe['root']}")
    assert remote.vocabulary() == open_tokenizer(bpe["root"]).vocabulary()


# --- of the whole run -------------------------------------------------------------------------


def test_scores_are_standardised_step_by_step():
    scores = np.array([1.0, 2.0, 6.0, 0.1, 0.1, 0.1, 300.0, 100.0])
    steps = np.array([1, 1, 1, 2, 2, 2, 5, 5])
    sd = (14 / 3) ** 0.5
    expected = [-2 / sd, -1 / sd, 3 / sd, 0, 0, 0, 1, -1]
    assert standardised(scores, steps) == pytest.approx(expected)
    assert standardised(scores[3:6], steps[3:6]).tolist() == [0, 0, 0]  # equal, to the last bit
    assert standardised(scores[:0], steps[:0]).size == 0


@pytest.fixture(scope="module")
def noisy_digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


def test_samples_are_found_by_key(noisy_digits):
    keys = list(read_metadata(noisy_digits, "train"))
    wanted = [keys[700], keys[3], "nothing"]
    found = read_samples(noisy_digits, "train", wanted)
    assert set(found) == set(wanted[:2])
    assert found[keys[3]]["npy"].shape == (1, 8, 8)


def test_extremes_are_shown_as_pictures_with_what_is_known(noisy_digits, tmp_path):
    made = read_metadata(noisy_digits, "train")
    keys = list(made)[:6]
    write_ledger(tmp_path, [{key: float(place) for place, key in enumerate(keys)}])
    ranked = rank_samples([sum_samples(table) for table in read_scored(tmp_path)])
    best, worst = extremes(ranked, noisy_digits, made, num=2)
    assert [shown.sample.key for shown in best] == [keys[5], keys[4]]
    assert [shown.sample.key for shown in worst] == keys[:2]
    for shown in [*best, *worst]:
        assert shown.png.startswith(b"\x89PNG")
        assert shown.altered == made[shown.sample.key]["altered"]
        assert ("really" in shown.facts[0]) == shown.altered
    assert best[0].facts[1:] == ["score +1.46 sd", "kept 1 of 1"]
    rows = extreme_rows(tmp_path, noisy_digits, num=2)
    assert [(row["end"], row["key"]) for row in rows] == [
        ("highest", keys[5]), ("highest", keys[4]), ("lowest", keys[0]), ("lowest", keys[1]),
    ]  # fmt: skip
    assert rows[0]["score"] == pytest.approx(2.5 / (35 / 12) ** 0.5)
    assert extreme_rows(tmp_path / "nothing", noisy_digits) == []


def test_text_is_shown_as_text():
    sample = Sample("a", 0.5, 4, 1)
    tokens = np.frombuffer("naïve <b>".encode(), np.uint8)
    made = {"domain": "prose", "origin": "prose", "altered": False}
    shown = show(sample, {"npy": tokens}, made)
    assert (shown.text, shown.png) == ("naïve <b>", None)
    assert shown.facts == ["prose", "score +0.50 sd", "kept 1 of 4"]
    made = {"domain": "prose", "origin": "shuffled", "altered": True}
    assert show(sample, {"npy": tokens}, made).facts[:2] == ["prose", "shuffled"]
    assert show(sample, {"txt": "x" * 999}, {}).text == "x" * 280
    assert show(sample, {"npy": np.array([5, 7])}, {}).text == "tokens 5 7"
