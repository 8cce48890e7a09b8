"""The samples of the highest and lowest mean scores, as pictures and text."""

import numpy as np
import pytest
from synthetic_runs import write_ledger

from selectflow.data import make_digits, read_metadata, read_samples
from selectflow.run.sample_text import (
    Sample,
    extreme_rows,
    extremes,
    rank_samples,
    read_scored,
    show,
    standardised,
    sum_samples,
)


def test_scores_are_standardised_step_by_step():
    scores = np.array([1.0, 2.0, 6.0, 0.1, 0.1, 0.1, 300.0, 100.0])
    steps = np.array([1, 1, 1, 2, 2, 2, 5, 5])
    sd = (14 / 3) ** 0.5
    expected = [-2 / sd, -1 / sd, 3 / sd, 0, 0, 0, 1, -1]
    assert standardised(scores, steps) == pytest.approx(expected)
    assert standardised(scores[3:6], steps[3:6]).tolist() == [0, 0, 0]  # equal, to the last bit
    assert standardised(scores[:0], steps[:0]).size == 0


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


def test_samples_are_found_by_key(digits):
    keys = list(read_metadata(digits, "train"))
    wanted = [keys[700], keys[3], "nothing"]
    found = read_samples(digits, "train", wanted)
    assert set(found) == set(wanted[:2])
    assert found[keys[3]]["npy"].shape == (1, 8, 8)


def test_extremes_are_shown_as_pictures_with_what_is_known(digits, tmp_path):
    made = read_metadata(digits, "train")
    keys = list(made)[:6]
    write_ledger(tmp_path, [{key: float(place) for place, key in enumerate(keys)}])
    ranked = rank_samples([sum_samples(table) for table in read_scored(tmp_path)])
    best, worst = extremes(ranked, digits, made, num=2)
    assert [shown.sample.key for shown in best] == [keys[5], keys[4]]
    assert [shown.sample.key for shown in worst] == keys[:2]
    for shown in [*best, *worst]:
        assert shown.png.startswith(b"\x89PNG")
        assert shown.altered == made[shown.sample.key]["altered"]
        assert ("really" in shown.facts[0]) == shown.altered
    assert best[0].facts[1:] == ["score +1.46 sd", "kept 1 of 1"]
    rows = extreme_rows(tmp_path, digits, num=2)
    assert [(row["end"], row["key"]) for row in rows] == [
        ("highest", keys[5]), ("highest", keys[4]), ("lowest", keys[0]), ("lowest", keys[1]),
    ]  # fmt: skip
    assert rows[0]["score"] == pytest.approx(2.5 / (35 / 12) ** 0.5)
    assert extreme_rows(tmp_path / "nothing", digits) == []


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
