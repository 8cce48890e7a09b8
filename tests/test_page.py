"""What runs selected, and the page of a comparison: whole in one file, true to the runs."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from synthetic_runs import make_run

from selectflow.data import make_digits, read_metadata, read_samples
from selectflow.offline.score import SampleScores
from selectflow.report import panels, svg
from selectflow.report.align import Curve
from selectflow.report.compare import summarize
from selectflow.report.page import render
from selectflow.report.panels import Line, Panel
from selectflow.report.samples import examine, extremes, show
from selectflow.report.selected import EDGES, Sample, read_selected, standardised
from selectflow.run.ledger import Ledger
from selectflow.run.scores import write_scores
from selectflow.strategies import Selection


def write_ledger(run_dir, pools):
    """A ledger of pools given as {key: score}, of each the two largest kept."""
    ledger = Ledger(run_dir)
    for step, pool in enumerate(pools, 1):
        scores = torch.tensor(list(pool.values()), dtype=torch.float64)
        best = scores.argsort(descending=True)[:2]
        ledger.add(
            step,
            Selection(
                pool={"key": list(pool)}, indices=best, scores=scores, losses=None, step=step - 1,
                horizon=0, age=0, target_loss=None, lookahead_s=0.0, seconds=0.0,
            ),
        )  # fmt: skip
    ledger.flush()


POOLS = [{"a": 1.0, "b": 2.0, "c": 6.0}, {"a": 300.0, "b": 100.0, "d": 200.0}]


def test_scores_are_averaged_in_units_of_their_pools(tmp_path):
    write_ledger(tmp_path, POOLS)
    found = read_selected(tmp_path, {})
    # first pool: mean 3, sd sqrt(14 / 3); second: mean 200, sd sqrt(20000 / 3)
    sd, sd2 = math.sqrt(14 / 3), math.sqrt(20000 / 3)
    expected = {
        "a": ((-2 / sd + 100 / sd2) / 2, 2, 1),
        "b": ((-1 / sd - 100 / sd2) / 2, 2, 1),
        "c": (3 / sd, 1, 1),
        "d": (0.0, 1, 1),
    }
    for key, (score, times, kept) in expected.items():
        sample = found.samples[key]
        assert sample.score == pytest.approx(score), key
        assert (sample.times, sample.kept) == (times, kept), key
    assert [sample.key for sample in found.ranked()] == ["c", "a", "d", "b"]
    assert {name: int(counts.sum()) for name, counts in found.histograms.items()} == {
        "kept": 4,
        "rejected": 2,
    }
    assert standardised(np.array([2.0, 2.0])).tolist() == [0, 0]


def test_histograms_tell_altered_from_clean_and_count_what_lies_beyond(tmp_path):
    pool = {str(i): 0.0 for i in range(99)} | {"far": 1000.0}  # 9.9 standard deviations away
    write_ledger(tmp_path, [pool])
    made = {key: {"altered": key in ("0", "far")} for key in pool}
    found = read_selected(tmp_path, made).histograms
    assert (int(found["altered"].sum()), int(found["clean"].sum())) == (2, 98)
    assert found["altered"][-1] == 1
    bin_of_rest = np.searchsorted(EDGES, -10 / math.sqrt(9900), side="right") - 1
    assert found["clean"][bin_of_rest] == 98


def test_domains_are_shares_of_the_kept_over_steps(tmp_path):
    write_ledger(tmp_path, POOLS)  # kept: b, c; then a, d
    made = {key: {"domain": "code" if key in "abc" else "prose"} for key in "abcd"}
    found = read_selected(tmp_path, made)
    assert found.domain_share("code") == [(1, 1.0), (2, 0.5)]
    assert found.domain_share("prose") == [(1, 0.0), (2, 0.5)]
    drawn = {panel.title: panel for panel in panels.domains({"loss": [found]}, ["uniform", "loss"])}
    line = drawn["domain code among the kept"].lines[0]
    assert (line.place, line.curve.mean.tolist()) == (1, [100, 50])


def test_a_run_without_a_ledger_has_selected_nothing_known(tmp_path):
    assert read_selected(tmp_path, {}) is None


def test_offline_selection_is_read_from_its_scores(tmp_path):
    scores = SampleScores(["a", "b"], torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    (tmp_path / "selected").mkdir()
    write_scores(tmp_path / "selected", scores, ["b"])
    found = read_selected(tmp_path, {})
    assert [(s.key, s.score, s.kept) for s in found.ranked()] == [("b", 1.0, 1), ("a", -1.0, 0)]


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
    best, worst = extremes(read_selected(tmp_path, made), digits, made, num=2)
    assert [shown.key for shown in best] == [keys[5], keys[4]]
    assert [shown.key for shown in worst] == keys[:2]
    for shown in [*best, *worst]:
        assert shown.png.startswith(b"\x89PNG")
        assert shown.altered == made[shown.key]["altered"]
        assert ("really" in shown.facts[0]) == shown.altered
    assert best[0].facts[1:] == ["score +1.46 sd", "kept 1 of 1"]


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


def test_a_run_whose_data_are_gone_is_shown_without_samples(tmp_path):
    data = {"name": "digits", "root": str(tmp_path / "gone"), "label_noise": 0.4}
    run = make_run(tmp_path / "run", [0.5], data=data)
    write_ledger(run.folder, POOLS)
    found = examine("online", run)
    assert len(found.selected.samples) == 4
    assert (found.best, found.worst) == ([], [])
    assert "samples are not shown: root must be a dataset directory" in found.note


VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Tags and attributes of a page; an unclosed or crossed tag fails."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(digits, tmp_path_factory):
    """A page of two groups of two seeds, one of which kept a ledger."""
    root, runs = tmp_path_factory.mktemp("runs"), []
    data = {"name": "digits", "label_noise": 0.4, "root": str(digits)}
    for seed in (0, 1):
        own = {"seed": seed, "data": data}
        runs.append(make_run(root / f"i{seed}", [0.5, 0.75], **own))
        runs.append(make_run(root / f"u{seed}", [0.25, 0.5], strategy="uniform", **own))
    keys = list(read_metadata(digits, "train"))[:40]
    write_ledger(runs[0].folder, [{key: float(place) for place, key in enumerate(keys)}])
    name = "<script>alert(1)</script>"
    comparison = summarize(runs, baseline="uniform")
    comparison.notes.append(name)
    return comparison, render(comparison, [examine("online H=1 K=1", runs[0])])


def test_the_page_needs_nothing_but_itself(page):
    _, text = page
    for tag, attributes in Page(text).found:
        assert tag not in ("iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?:|@import|url\(", text)


def test_the_page_escapes_what_runs_are_called(page):
    _, text = page
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_every_picture_has_units_on_both_axes(page):
    _, text = page
    pictures = re.findall(r"<svg viewBox=.*?</svg>", text, re.DOTALL)
    assert len(pictures) >= 10  # quality and two losses over four axes, and more
    for picture in pictures:
        labels = re.findall(r'<text class="(?:name|title)"[^>]*>(.*?)</text>', picture)
        assert len(labels) == 2, picture
        assert all(re.search(r"\(.+\)$", text) for text in labels), labels


def test_the_page_has_the_tables_the_samples_and_dark_colours(page):
    comparison, text = page
    read = " ".join(" ".join(Page(text).text).split())
    assert "62.5" not in read  # a mean of nothing that was asked for
    assert "75.0 ± 0.0" in read
    assert "50.0 ± 0.0" in read
    assert comparison.rows[0].at_equal_steps.mean == 0.25
    assert "better +25.0 +25.0 to +25.0 &lt; 0.001".replace("&lt;", "<") in read
    images = [attributes for tag, attributes in Page(text).found if tag == "img"]
    assert len(images) == 16
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
    assert "prefers-color-scheme: dark" in text


def test_lines_are_drawn_where_the_numbers_are():
    line = Line("a & b", 1, Curve(np.array([0.0, 10.0]), np.array([0.0, 5.0]), np.zeros(2)))
    picture = svg.draw(Panel("loss", "steps (count)", "loss (nats)", [line], from_zero=True))
    x0, x1, left, right, y0, y1, bottom, top = map(
        float, re.search(r'data-box="(.*?)"', picture)[1].split()
    )
    points = re.search(r'class="line g1" data-label="a &amp; b" points="(.*?)"', picture)[1]
    read = [
        (
            x0 + (float(x) - left) / (right - left) * (x1 - x0),
            y0 + (bottom - float(y)) / (bottom - top) * (y1 - y0),
        )
        for x, y in (point.split(",") for point in points.split())
    ]
    assert read == [pytest.approx((0, 0), abs=0.01), pytest.approx((10, 5), abs=0.01)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.31, 2.3, [0.5, 1, 1.5, 2]),
        (-4, 4, [-4, -2, 0, 2, 4]),
        (1e-5, 2e-5, [1e-5, 1.2e-5, 1.4e-5, 1.6e-5, 1.8e-5, 2e-5]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_horizon_and_learning_rate_are_drawn_over_steps(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.6], horizon="auto")
    lines = [
        json.dumps({"train/step": step, "select/horizon": step / 10, "select/lr_multiplier": 2})
        for step in (10, 20)
    ]
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines[1:]) + "\n")
    comparison = summarize([type(run)(**{**vars(run), "metrics": list(map(json.loads, lines))})])
    drawn = {panel.title: panel for panel in panels.selection(comparison)}
    horizon = drawn["horizon H"].lines[0]
    assert (horizon.label, horizon.curve.mean.tolist()) == ("adaptive", [1, 2])
    assert drawn["horizon H"].y_label == "horizon H (optimizer updates)"
    # a multiplier that never moves is no picture
    assert list(drawn) == ["horizon H"]


def test_the_palette_is_told_apart_by_the_colour_blind():
    """Any two of the first six groups differ under simulated deuteranopia and protanopia."""
    # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    simulated = {
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
    }
    style = (panels.__file__.rpartition("/")[0]) + "/page.css"
    with open(style, encoding="utf-8") as file:
        text = file.read()
    palettes = [re.findall(r"--c\d: (#\w{6})", part)[:6] for part in text.split("@media")[:2]]
    assert all(len(palette) == 6 for palette in palettes)
    for palette in [*palettes, panels.COLOURS[:6]]:
        for matrix in simulated.values():
            seen = [lab(np.clip(np.array(matrix) @ linear(colour), 0, 1)) for colour in palette]
            for i, one in enumerate(seen):
                for j, two in enumerate(seen[:i]):
                    # lines of close colours also differ in their dashes
                    close = np.linalg.norm(one - two) < 10
                    same = panels.DASHES[i % 4] == panels.DASHES[j % 4]
                    assert not (close and same), (palette[i], palette[j])


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB, white D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = (np.array(to_xyz) @ rgb) / np.array([0.9505, 1.0, 1.089])
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
