"""The page of a comparison: whole in one file, true to the runs."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from synthetic_runs import make_run, write_ledger

from selectflow.data import make_digits, read_metadata
from selectflow.report import figures
from selectflow.report.compare import summarize
from selectflow.report.groups import flat
from selectflow.report.page import describe_task, render
from selectflow.report.samples import examine
from selectflow.run.sections import DataConfig


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
