"""Mean lines over seeds, and the pictures of them."""

import json
import math
import re

import numpy as np
import pytest
from synthetic_runs import make_run

from selectflow.report import figures
from selectflow.report.compare import summarize
from selectflow.report.figures import Curve, Line, Panel, binned, curve, mean_curve


def test_a_mean_line_interpolates_over_the_range_that_all_runs_cover():
    line = mean_curve([[(0, 0.0), (4, 0.4)], [(1, 0.5), (3, 0.7)]])
    assert line.x.tolist() == [1, 3]
    np.testing.assert_allclose(line.mean, [0.3, 0.5])
    np.testing.assert_allclose(line.sd, [0.4 / math.sqrt(2)] * 2)
    assert mean_curve([[(0, 0.0)], []]).x.size == 0
    assert mean_curve([[(x, 0.0) for x in range(999)]]).x.size == 200


def test_over_seconds_runs_are_averaged_at_equal_steps(tmp_path):
    # the second began after the first had ended: no second is common to both
    early = make_run(tmp_path / "a", [0.2, 0.4], step_s=0.1)
    late = make_run(tmp_path / "b", [0.6, 0.6], seed=1, step_s=0.3, upfront_s=10)
    line = curve([early, late], "test/accuracy", "perf/wall_s")
    np.testing.assert_allclose(line.x, [(1 + 13) / 2, (2 + 16) / 2])
    np.testing.assert_allclose(line.mean, [0.4, 0.5])
    np.testing.assert_allclose(line.sd, [0.4 / math.sqrt(2), 0.2 / math.sqrt(2)])
    assert curve([early, late], "test/accuracy", "data/tokens_seen").x.size == 0


def test_binning_averages_neighbours_and_keeps_their_mean():
    points = [(float(x), x % 2) for x in range(10)]
    assert binned(points, 5) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5), (8.5, 0.5)]
    assert binned(points, 100) == points
    assert binned([], 5) == []


def test_lines_are_drawn_where_the_numbers_are():
    line = Line("a & b", 1, Curve(np.array([100.0, 110.0]), np.array([0.0, 5.0]), np.ones(2)))
    panel = Panel("loss", "steps (count)", "loss (nats)", [line], [(2.0, "level")], from_zero=True)
    figure = figures.draw([panel])
    (axes,) = figure.axes
    mean, level = axes.lines
    assert mean.get_xydata().tolist() == [[100, 0], [110, 5]]
    assert mean.get_color() == figures.COLOURS[1]
    assert set(level.get_ydata()) == {2}
    assert axes.collections[0].get_datalim(axes.transData).extents.tolist() == [100, -1, 110, 6]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a & b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps (count)", "loss (nats)")
    # in the SVG too: labelled ticks of both axes give the scale, by which the line is read off
    picture = figures.to_svg(panel, "p0")
    assert picture == figures.to_svg(panel, "p0")
    texts = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', picture)
    places = {text: (float(x), float(y)) for x, y, text in texts}
    ends = re.search(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*var\(--c1\)', picture
    )
    x0, y0, x1, y1 = map(float, ends.groups())
    assert (x0, x1) == pytest.approx((places["100"][0], places["110"][0]), abs=0.1)
    unit = (places["2"][1] - places["4"][1]) / 2
    assert (y0 - y1) / unit == pytest.approx(5, abs=0.01)


def test_horizon_and_learning_rate_are_drawn_over_steps(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.6], horizon="auto")
    lines = [
        json.dumps({"train/step": step, "select/horizon": step / 10, "select/lr_multiplier": 2})
        for step in (10, 20)
    ]
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write("\n".join(lines[1:]) + "\n")
    comparison = summarize([type(run)(**{**vars(run), "metrics": list(map(json.loads, lines))})])
    drawn = {panel.title: panel for panel in figures.selection(comparison, {})}
    horizon = drawn["horizon H"].lines[0]
    assert (horizon.label, horizon.curve.mean.tolist()) == ("adaptive", [1, 2])
    assert drawn["horizon H"].y_label == "horizon H (optimizer updates)"
    # a multiplier that never moves is no picture
    assert list(drawn) == ["horizon H"]


def test_a_scorer_has_its_loss_and_gain_drawn(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.6])
    metrics = [
        {"train/step": 10, "select/scorer_loss": 1.5, "select/scorer_gain": 0.25},
        {"train/step": 20, "select/scorer_loss": 1.0},  # the gain is measured now and then
        {"train/step": 30, "select/scorer_loss": 0.5, "select/scorer_gain": -0.125},
    ]
    comparison = summarize([type(run)(**{**vars(run), "metrics": metrics})])
    drawn = {panel.y_label: panel.lines[0].curve for panel in figures.selection(comparison, {})}
    loss = drawn["loss of the scorer on what is kept (nats)"]
    assert (loss.x.tolist(), loss.mean.tolist()) == ([10, 20, 30], [1.5, 1.0, 0.5])
    gain = drawn["target loss spared by the scorer's choice (%)"]
    assert (gain.x.tolist(), gain.mean.tolist()) == ([10, 30], [25, -12.5])


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
    style = (figures.__file__.rpartition("/")[0]) + "/page.css"
    with open(style, encoding="utf-8") as file:
        text = file.read()
    palettes = [re.findall(r"--c\d: (#\w{6})", part)[:6] for part in text.split("@media")[:2]]
    assert all(len(palette) == 6 for palette in palettes)
    for palette in [*palettes, figures.COLOURS[:6]]:
        for matrix in simulated.values():
            seen = [lab(np.clip(np.array(matrix) @ linear(colour), 0, 1)) for colour in palette]
            for i, one in enumerate(seen):
                for j, two in enumerate(seen[:i]):
                    # lines of close colours also differ in their dashes
                    close = np.linalg.norm(one - two) < 10
                    same = figures.DASHES[i % 4] == figures.DASHES[j % 4]
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
