"""The page of a comparison, whole in one file and true to the runs, and what runs selected."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from synthetic_runs import POOLS, make_run, write_ledger

from selectflow.data import make_digits, read_metadata
from selectflow.offline.score import SampleScores
from selectflow.report import figures
from selectflow.report.compare import summarize
from selectflow.report.figures import EDGES, domains
from selectflow.report.page import describe_task, examine, read_selected, render
from selectflow.run.offline import write_scores
from selectflow.run.sections import DataConfig
from selectflow.run.yaml import flat


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


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
        assert attributes.get("xlink:href", "#").startswith("#"), (tag, attributes)
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_no_id_is_used_twice_and_none_is_missing(page):
    _, text = page
    ids = [attributes["id"] for _, attributes in Page(text).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = re.findall(r'url\(#(.*?)\)|xlink:href="#(.*?)"', text)
    assert {one or other for one, other in named} <= set(ids)


def test_the_page_escapes_what_runs_are_called(page):
    _, text = page
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_every_picture_has_units_on_both_axes(page):
    comparison, text = page
    pictures = re.findall(r'<svg viewBox="[^"]*" role="img".*?</svg>', text, re.DOTALL)
    assert len(pictures) >= 10  # quality and two losses over four axes, and more
    for picture in pictures:
        labels = re.findall(r"<text [^>]*>([^<]+\([^<]+\))</text>", picture)
        assert len(labels) == 2, labels
        assert not re.search("#[0-9a-fA-F]{6}", picture)  # colours are the page's, light or dark
    for axis in figures.axes_of(comparison):
        for panel in figures.curves(comparison, axis):
            assert f'aria-label="{panel.y_label} over {panel.x_label}"' in text


def test_the_head_names_only_settings_of_the_task(page):
    comparison, text = page
    assert describe_task(comparison) == "4 runs; data.name digits, data.label_noise 0.4"
    assert "4 runs; data.name digits, data.label_noise 0.4" in " ".join(Page(text).text)
    defaults = flat({"data": DataConfig().model_dump(mode="json")})
    digits = replace(comparison, task=dict(defaults) | {"model.name": "mlp", "model.width": 32})
    assert describe_task(digits) == "4 runs; data.name digits, model.name mlp, model.width 32"
    written = digits.task | {"data.name": "text", "data.text.block": 64}
    assert describe_task(replace(digits, task=written)) == (
        "4 runs; data.name text, data.text.block 64, model.name mlp, model.width 32"
    )


def test_the_page_begins_with_the_verdict(page):
    _, text = page
    read = " ".join(" ".join(Page(text).text).split())
    verdict = "test accuracy is better by 25.0 points (p < 0.001, 2 seeds)"
    assert 0 < read.index(verdict) < read.index("Learning curves")


def test_the_page_has_the_tables_the_samples_and_dark_colours(page):
    comparison, text = page
    read = " ".join(" ".join(Page(text).text).split())
    assert "62.5" not in read  # a mean of nothing that was asked for
    assert "75.0 ± 0.0" in read
    assert "50.0 ± 0.0" in read
    assert comparison.rows[0].tests["at_equal_steps"].mean == 0.25
    assert "better +25.0 +25.0 to +25.0 &lt; 0.001".replace("&lt;", "<") in read
    images = [attributes for tag, attributes in Page(text).found if tag == "img"]
    assert len(images) == 16
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in images)
    assert "prefers-color-scheme: dark" in text


# --- what runs selected -----------------------------------------------------------------------


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
    ranked = found.ranked.to_pylist()
    assert [sample["key"] for sample in ranked] == ["c", "a", "d", "b"]
    for sample in ranked:
        score, times, kept = expected[sample["key"]]
        assert sample["score"] == pytest.approx(score), sample
        assert (sample["times"], sample["kept"]) == (times, kept), sample
    assert {name: int(counts.sum()) for name, counts in found.histograms.items()} == {
        "kept": 4,
        "rejected": 2,
    }


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
    assert found.domains["code"] == [(1, 1.0), (2, 0.5)]
    assert found.domains["prose"] == [(1, 0.0), (2, 0.5)]
    drawn = {panel.title: panel for panel in domains({"loss": found.domains}, ["uniform", "loss"])}
    line = drawn["domain code among the kept"].lines[0]
    assert (line.place, line.curve.mean.tolist()) == (1, [100, 50])


def test_a_run_without_a_ledger_has_selected_nothing_known(tmp_path):
    assert read_selected(tmp_path, {}) is None


def test_offline_selection_is_read_from_its_scores(tmp_path):
    scores = SampleScores(["a", "b"], torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    (tmp_path / "selected").mkdir()
    write_scores(tmp_path / "selected", scores, ["b"])
    found = read_selected(tmp_path, {})
    assert found.ranked.to_pylist() == [
        {"key": "b", "score": 1.0, "times": 1, "kept": 1},
        {"key": "a", "score": -1.0, "times": 1, "kept": 0},
    ]


def test_a_run_whose_data_are_gone_is_shown_without_samples(tmp_path):
    data = {"name": "digits", "root": str(tmp_path / "gone"), "label_noise": 0.4}
    run = make_run(tmp_path / "run", [0.5], data=data)
    write_ledger(run.folder, POOLS)
    found = examine("online", run)
    assert len(found.selected.ranked) == 4
    assert (found.best, found.worst) == ([], [])
    assert "samples are not shown: root must be a dataset directory" in found.note


def test_the_ledger_of_a_run_is_summed_as_a_slow_loop_sums_it(tmp_path):
    """Over several parts of the ledger, with samples and domains that come and go."""
    generator = np.random.default_rng(0)
    pools = [
        {f"k{n}": 10.0**step * generator.normal() for n in generator.permutation(90)[:8]}
        for step in range(-45, 45)
    ]
    for place, part in enumerate((pools[:50], pools[50:])):
        write_ledger(tmp_path, part, first=1 + 50 * place)
    made = {f"k{n}": {"altered": n % 3 == 0} | ({"domain": "ab"[n % 2]} if n > 9 else {})
            for n in range(80)}  # fmt: skip
    found = read_selected(tmp_path, made)
    scores, times, kept = {}, {}, {}
    kinds = dict.fromkeys(("kept", "rejected", "altered", "clean"), 0)
    shares = []
    for step, pool in enumerate(pools, 1):
        values = np.array(list(pool.values()))
        best = set(sorted(pool, key=pool.get)[-2:])
        for key, z in zip(pool, (values - values.mean()) / values.std(), strict=True):
            scores.setdefault(key, []).append(z)
            times[key], kept[key] = times.get(key, 0) + 1, kept.get(key, 0) + (key in best)
            altered = made.get(key, {}).get("altered", False)
            for kind in ("kept" if key in best else "rejected", "altered" if altered else "clean"):
                kinds[kind] += 1
        if domains_kept := [made[key]["domain"] for key in best if "domain" in made.get(key, {})]:
            shares.append((step, domains_kept))
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    ranked = found.ranked.to_pylist()
    assert [row["key"] for row in ranked] == sorted(means, key=lambda key: (-means[key], key))
    for row in ranked:
        assert row["score"] == pytest.approx(means[row["key"]], rel=1e-9)
        assert (row["times"], row["kept"]) == (times[row["key"]], kept[row["key"]])
    assert {kind: int(counts.sum()) for kind, counts in found.histograms.items()} == kinds
    size = -(-len(shares) // 40)
    for name in "ab":
        expected = []
        for start in range(0, len(shares), size):
            part = shares[start : start + size]
            of = [domain for _, each in part for domain in each]
            middle = sum(step for step, _ in part) / len(part)
            expected.append((middle, of.count(name) / len(of)))
        assert found.domains[name] == [pytest.approx(point) for point in expected]
