"""A run that diverges: it has no number, from its metrics to the verdict, and comes last."""

import csv
import json
import math
import re

import numpy as np
import pytest
from synthetic_runs import make_run

from selectflow.cli import main
from selectflow.report import figures, runs
from selectflow.report.compare import holm, paired, stat, summarize
from selectflow.report.page import to_report, write_outputs
from selectflow.report.runs import (
    ReportError,
    broken_at,
    end,
    fetch_run,
    load_run,
    series,
    value_at,
)
from selectflow.report.tables import grids, sentences, to_records
from selectflow.run.wandb import RemoteRun, log_report

NAN = float("nan")


def diverged(path, accuracies=(0.5,), seed=0, **options):
    """A run whose loop was ended by a loss that is not finite, in the step after its last line."""
    make_run(path, list(accuracies), status="failed", seed=seed, **options)
    file = path / "summary.json"
    at = 10 * len(accuracies) + 1
    file.write_text(json.dumps(json.loads(file.read_text()) | {"diverged_at": at}))
    return load_run(path)


def append(path, *lines):
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    return load_run(path)


def cells(comparison, title):
    """The cells of a table by group and head."""
    (grid,) = [grid for grid in grids(comparison) if grid.title.startswith(title)]
    return {line[0]: dict(zip(grid.head, line, strict=True)) for line in grid.cells}


@pytest.mark.parametrize("mark", ["NaN", "Infinity", "-Infinity", "null", '"NaN"', '"-Infinity"'])
def test_a_value_that_is_not_finite_is_told_from_none(tmp_path, mark):
    """As this version writes them, as earlier ones did, and as json.dumps does by default."""
    make_run(tmp_path / "a", [0.5])
    run = append(tmp_path / "a", f'{{"train/step": 20, "test/loss": {mark}}}')
    assert math.isnan(end(run, "test/loss"))
    assert end(run, "test/accuracy") == 0.5  # step 20 says nothing of it
    assert (broken_at(run, "test/loss"), broken_at(run, "test/accuracy")) == (20, None)
    assert value_at(run, "test/loss", 19) == 0.5
    assert math.isnan(value_at(run, "test/loss", 20))


def test_a_metric_that_is_a_word_is_named(tmp_path):
    make_run(tmp_path / "a", [0.5])
    run = append(tmp_path / "a", '{"train/step": 20, "test/loss": "high"}')
    with pytest.raises(ReportError, match="test/loss must be a number, got 'high' at step 20 of"):
        end(run, "test/loss")


def test_rows_at_wandb_have_none_where_nothing_was_measured(monkeypatch):
    rows = [
        {"train/step": 1, "test/loss": 2.0, "test/accuracy": 0.5},
        {"train/step": 2, "test/loss": "NaN", "test/accuracy": None},
    ]
    monkeypatch.setattr(runs, "download_run", lambda _: RemoteRun({}, rows, {}, "finished"))
    run = fetch_run("a/b/c")
    assert math.isnan(end(run, "test/loss"))
    assert end(run, "test/accuracy") == 0.5


def test_a_run_is_not_judged_by_its_last_finite_value(tmp_path):
    """Losses far below the baseline's at step 10, and from step 20 on none."""
    members = []
    for seed in range(3):
        members.append(make_run(tmp_path / f"o{seed}", [0.6, NAN, NAN], seed=seed))
        better = [0.3, 0.32, 0.34 + seed / 100]
        members.append(make_run(tmp_path / f"u{seed}", better, seed=seed, strategy="uniform"))
    comparison = summarize(members)
    assert list(comparison.runs) == ["uniform", "online H=1 K=1"]  # last, though named first
    quality = cells(comparison, "test accuracy")
    assert quality["online H=1 K=1"]["at the end"] == "not finite"
    assert quality["online H=1 K=1"]["at step 30"] == "not finite"
    assert quality["uniform"]["at the end"] == "35.0 ± 1.0"
    assert cells(comparison, "how soon")["online H=1 K=1"]["steps to it"] == "not finite"
    assert cells(comparison, "difference")["online H=1 K=1"]["seen"] == "not finite"
    text = sentences(comparison)[0]
    assert "test loss is not finite with 3 of 3 seeds" in text
    assert "better" not in text
    for seed in range(3):
        assert (
            f"test/loss is not finite from step 20 on: {tmp_path / f'o{seed}'}" in comparison.notes
        )
    assert math.isnan(to_records(comparison)[1]["quality_mean"])


def test_one_seed_of_three_is_said_and_no_mean_is_made(tmp_path):
    members = [
        make_run(tmp_path / f"o{seed}", [0.6, 0.7 if seed else NAN], seed=seed) for seed in range(3)
    ]
    members += [
        make_run(tmp_path / f"u{seed}", [0.3, 0.4], seed=seed, strategy="uniform")
        for seed in range(3)
    ]
    comparison = summarize(members)
    assert (
        cells(comparison, "test accuracy")["online H=1 K=1"]["at the end"] == "not finite in 1 of 3"
    )
    assert "with 1 of 3 seeds" in sentences(comparison)[0]


def test_a_baseline_that_diverged_leaves_nothing_to_reach(tmp_path):
    members = []
    for seed in range(2):
        members.append(make_run(tmp_path / f"o{seed}", [0.6, 0.7], seed=seed))
        members.append(make_run(tmp_path / f"u{seed}", [0.3, NAN], seed=seed, strategy="uniform"))
    comparison = summarize(members)
    assert cells(comparison, "how soon")["online H=1 K=1"]["steps to it"] == "-"
    assert "test loss of uniform is not finite with 2 of 2 seeds" in sentences(comparison)[0]


def test_a_run_that_the_loop_ended_is_compared_and_is_not_a_survivors_mean(tmp_path):
    """One of two diverges in step 11: the group has no mean, and the others go on to step 30."""
    members = [diverged(tmp_path / "o0"), make_run(tmp_path / "o1", [0.6, 0.7, 0.8], seed=1)]
    members += [
        make_run(tmp_path / f"u{seed}", [0.3, 0.4, 0.5], seed=seed, strategy="uniform")
        for seed in range(2)
    ]
    comparison = summarize(members)
    assert comparison.step == 30
    shown = cells(comparison, "test accuracy")["online H=1 K=1"]
    assert shown["at the end"] == shown["at step 30"] == "not finite in 1 of 2"
    note = f"diverged at step 11, no values from there on: {tmp_path / 'o0'}"
    assert note in comparison.notes
    run = members[0]
    assert value_at(run, "test/accuracy", 10) == 0.5  # still what it was there
    assert math.isnan(value_at(run, "test/accuracy", 11))
    assert value_at(run, "perf/wall_s", 11) == 1.0  # its costs are known
    assert series(run, "select/kept_altered") == [(10, 0.1)]


def test_a_gap_that_a_run_recovers_from_is_a_note_alone(tmp_path):
    comparison = summarize([make_run(tmp_path / "a", [0.5, NAN, 0.7])])
    assert cells(comparison, "test accuracy")["online H=1 K=1"]["at the end"] == "70.0"
    assert f"test/loss is not finite at step 20: {tmp_path / 'a'}" in comparison.notes


def test_statistics_of_no_number_are_none(tmp_path):
    assert stat([1.0, math.inf]).num_broken == 1
    assert math.isnan(stat([1.0, math.inf, -math.inf]).mean)
    assert stat([1.0, None]) is None
    # a test without a number takes no part in the correction of the others
    others = [paired([1.0, 2.0, 3.5]), paired([0.1, -0.2, 0.4])]
    broken = (
        summarize(
            [
                make_run(tmp_path / f"{name}{seed}", [0.5, value], seed=seed, strategy=name)
                for seed in range(2)
                for name, value in (("uniform", 0.5), ("loss", NAN))
            ]
        )
        .rows[1]
        .tests["at_equal_steps"]
    )
    corrected = holm([others[0], broken, None, others[1]])
    assert [corrected[0], corrected[3]] == holm(others)
    assert math.isnan(corrected[1].corrected_p)
    assert not corrected[1].is_seen


def test_a_line_ends_where_the_run_diverged(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.6, NAN, NAN])
    line = figures.curve([run], "test/loss")
    assert line.x.tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(line.mean, [0.5, 0.4, NAN, NAN])
    panel = figures.Panel("loss", "steps", "loss", [figures.Line("a", 0, line)])
    (axes,) = figures.draw([panel]).axes
    _, cross = axes.lines
    assert cross.get_xydata().tolist() == [[20, 0.4]]
    (chart, *_) = to_report(summarize([run]), []).charts.values()
    assert list(chart.lines.values()) == [([10, 20], [50.0, 60.0])]


def test_runs_that_never_had_a_number_are_drawn_as_nothing(tmp_path):
    comparison = summarize([make_run(tmp_path / "a", [NAN, NAN])])
    written = write_outputs(comparison, [], tmp_path / "out")
    report = to_report(comparison, written)
    assert report.charts == {}
    assert math.isnan(report.summary["online H=1 K=1/quality_mean"])
    assert log_report(report, tmp_path, mode="offline")


def test_the_command_says_it_everywhere(tmp_path, capsys):
    """Two runs each, evaluated before and after their only step, which diverges for one group."""
    for seed in range(2):
        make_run(tmp_path / f"d{seed}", [0.5, NAN], seed=seed, strategy="uniform")
        make_run(tmp_path / f"k{seed}", [0.5, 0.4], seed=seed, strategy="loss")
    args = ["compare", str(tmp_path / "[dk]*"), "--metric", "test/loss", "--baseline", "loss"]
    assert main([*args, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "note: test/loss is not finite from step 20 on" in out
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "not finite" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["loss", "uniform"]
    assert rows[1]["quality_mean"] == "nan"  # and not "", which is: not recorded
    assert json.loads((tmp_path / "d0" / "summary.json").read_text())["test/loss"] == "NaN"


def test_a_label_is_text_and_no_markup(tmp_path, capsys):
    """A label is made of a user's values: neither rich's marks nor TeX's are looked for in it."""
    for name in ("[/red]", "$a$ [b] $\\x$"):
        make_run(tmp_path / name.replace("/", ""), [0.5, 0.6], strategy=name)
    assert main(["compare", *map(str, tmp_path.glob("*a*")), *map(str, tmp_path.glob("*red*")),
                 "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "[/red]" in out
    assert "$a$ [b] $\\x$" in out
