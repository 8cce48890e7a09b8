"""The comparison of runs whose answers can be calculated by hand, and the command."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import ttest_rel
from synthetic_runs import make_run

from selectflow.cli import main
from selectflow.report import tables
from selectflow.report.compare import Paired, holm, paired, stat, summarize
from selectflow.report.runs import ReportError, load_run
from selectflow.report.tables import grids, sentences


@pytest.fixture
def four_runs(tmp_path):
    """Two seeds of influence, 0.2 s a step; two of uniform, 0.1 s a step and longer."""
    return [
        make_run(tmp_path / "i0", [0.5, 0.7, 0.9], seed=0, step_s=0.2),
        make_run(tmp_path / "i1", [0.6, 0.8, 0.8], seed=1, step_s=0.2),
        make_run(tmp_path / "u0", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], strategy="uniform", seed=0),
        make_run(tmp_path / "u1", [0.1, 0.2, 0.3, 0.4, 0.9, 1.0, 1.0], strategy="uniform", seed=1),
    ]


def test_spread_is_the_sample_standard_deviation():
    found = stat([1.0, 2.0, 6.0])
    assert (found.mean, found.sd, found.num) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert stat([2.0]).sd is None
    assert stat([1.0, None]) is None  # the mean over the seeds that happen to have it would mislead
    assert stat([]) is None


def test_the_paired_test_is_students_t():
    # two differences: t has one degree of freedom, and p is an arc tangent
    two = paired([0.4, 0.5])
    assert two.p == pytest.approx(1 - 2 * math.atan(0.45 / 0.05) / math.pi)
    half = 0.05 * math.tan(0.475 * math.pi)
    assert (two.low, two.high) == pytest.approx((0.45 - half, 0.45 + half))
    # three: t / sqrt(t^2 + 2)
    three = paired([1.0, 2.0, 6.0])
    t = 3 / math.sqrt(7 / 3)
    assert (three.mean, three.num) == (3, 3)
    assert three.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    ours, theirs = [0.91, 0.95, 0.90, 0.97, 0.93], [0.90, 0.91, 0.91, 0.92, 0.90]
    known = ttest_rel(ours, theirs)
    found = paired(np.subtract(ours, theirs).tolist())
    assert found.p == pytest.approx(known.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval(0.95)))


def test_the_paired_test_at_its_limits():
    assert paired([]) is None
    assert paired([0.3]) is None
    assert paired([0.0, 0.0, 0.0]).p == 1
    assert paired([0.5, 0.5]).p == 0


def test_holm_corrects_for_the_number_of_groups():
    tests = [None, *(Paired(0, 0, 0, p, p, 3) for p in (0.01, 0.04, 0.03, 0.5))]
    found = holm(tests)
    assert found[0] is None
    # 0.01 x 4, 0.03 x 3, then 0.04 x 2 raised to the one before, 0.5 x 1
    corrected = [test.corrected_p for test in found[1:]]
    assert corrected == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert [test.p for test in found[1:]] == [0.01, 0.04, 0.03, 0.5]
    assert [test.is_seen for test in found[1:]] == [True, False, False, False]


def test_groups_at_their_ends_at_equal_steps_and_at_equal_time(four_runs):
    comparison = summarize(four_runs)
    influence, uniform = comparison.rows
    assert (influence.label, uniform.label) == ("online H=1 K=1", "uniform")
    assert (comparison.baseline, comparison.quality) == ("uniform", "test/accuracy")
    assert (comparison.step, comparison.time_s) == (30, pytest.approx(6.0))
    assert (influence.num_runs, uniform.num_runs) == (2, 2)
    # Two values differ by d: their sample standard deviation is d / sqrt(2).
    expected = {
        "steps": (30, 65),
        "samples_seen": (480, 1040),
        "samples_scored": (1920, 0),
        "wall_s": (6.0, 6.5),
        "quality": (0.85, 0.9),
        "quality_at_step": (0.85, 0.4),
        "quality_at_time": (0.85, 0.9),
        "loss": (0.15, 0.1),
        "kept_altered": (0.2, 0.375),
        "select_share": (0.25, 0.25),
        "overhead": (2.0, 1.0),
    }
    for name, means in expected.items():
        found = tuple(row.stats[name].mean for row in comparison.rows)
        assert found == pytest.approx(means), name
    assert influence.stats["quality"].sd == pytest.approx(0.1 / math.sqrt(2))
    assert uniform.stats["quality_at_step"].sd == pytest.approx(0.2 / math.sqrt(2))
    # Both influence runs end at 6 s, when the uniform runs had reached 0.8 and 1.0.
    assert influence.stats["baseline_in_same_time"].mean == pytest.approx(0.9)
    assert influence.stats["baseline_in_same_time"].sd == pytest.approx(0.2 / math.sqrt(2))
    assert (uniform.stats["baseline_in_same_time"], influence.stats["tokens_seen"]) == (None, None)


def test_differences_are_paired_by_seed(four_runs):
    influence, uniform = summarize(four_runs).rows
    # at step 30: 0.9 - 0.5 and 0.8 - 0.3; at 6 s: 0.9 - 0.8 and 0.8 - 1.0
    steps, time = influence.tests["at_equal_steps"], influence.tests["in_same_time"]
    assert (steps.mean, time.mean) == pytest.approx((0.45, -0.05))
    assert steps.p == pytest.approx(1 - 2 * math.atan(9) / math.pi)
    assert time.p == pytest.approx(1 - 2 * math.atan(1 / 3) / math.pi)
    assert (uniform.tests["at_equal_steps"], uniform.tests["in_same_time"]) == (None, None)
    shuffled = summarize([four_runs[i] for i in (1, 3, 0, 2)]).rows[0]
    assert shuffled.tests["at_equal_steps"].p == pytest.approx(steps.p)


def test_no_difference_is_said_where_none_is_seen(tmp_path):
    def row(found):
        runs = [
            make_run(tmp_path / f"{name}{seed}", [value], strategy=name, seed=seed)
            for name, values in {"uniform": [0.50, 0.52, 0.54], "loss": found}.items()
            for seed, value in enumerate(values)
        ]
        comparison = summarize(runs)
        verdict = tables.verdict(comparison.rows[1].tests["at_equal_steps"], comparison.quality)
        shutil.rmtree(tmp_path)
        return verdict

    assert row([0.60, 0.62, 0.63]) == "better"
    assert row([0.40, 0.42, 0.43]) == "worse"
    assert row([0.60, 0.50, 0.54]) == "no difference seen"


def test_less_of_a_loss_is_better(four_runs):
    comparison = summarize(four_runs, quality="test/loss")
    assert comparison.rows[0].tests["at_equal_steps"].mean == pytest.approx(-0.45)
    sure = Paired(-0.45, -0.5, -0.4, 0.01, 0.01, 3)
    assert tables.verdict(sure, comparison.quality) == "better"


def test_the_verdict_is_a_sentence_on_loss_and_quality(tmp_path):
    values = {"uniform": [0.50, 0.52, 0.54], "loss": [0.60, 0.62, 0.63], "influence": [0.4, 0.6]}
    runs = [
        make_run(tmp_path / f"{name}{seed}", [value], strategy=name, seed=seed)
        for name, found in values.items()
        for seed, value in enumerate(found)
    ]
    comparison = summarize(runs)
    _, loss, online = comparison.rows
    # the test loss is 1 - accuracy: its differences are those of the accuracy, of the other sign
    for question in ("at_equal_steps", "in_same_time"):
        mirrored, test = loss.tests[f"loss_{question}"], loss.tests[question]
        assert mirrored.mean == pytest.approx(-test.mean)
        assert mirrored.corrected_p == pytest.approx(test.corrected_p)
    # two differences of online, -0.1 and 0.08: t = 1 / 9 on one degree of freedom
    assert online.tests["at_equal_steps"].p == pytest.approx(1 - 2 * math.atan(1 / 9) / math.pi)
    p, p2 = (f"{row.tests['at_equal_steps'].corrected_p:.2g}" for row in (loss, online))
    better = (
        f"loss against uniform: test loss is better by 0.097 nats (p = {p}, 3 seeds), "
        f"test accuracy is better by 9.7 points (p = {p}, 3 seeds)."
    )
    unclear = (
        f"online H=1 K=1 against uniform: test loss is not told apart with 2 seeds (+0.010 nats, "
        f"p = {p2}), test accuracy is not told apart with 2 seeds (-1.0 points, p = {p2})."
    )
    assert sentences(comparison) == [
        f"At step 10, {better}",
        f"In the time of loss, {better}",
        f"At step 10, {unclear}",
        f"In the time of online H=1 K=1, {unclear}",
        "p: paired t test over seeds, corrected by Holm's method for the number of groups (2); "
        "below 0.05 is called better or worse. Values are those of the step or second named, not "
        "the best before it.",
    ]
    assert sentences(summarize(runs, quality="test/loss"))[0].count("test loss is better") == 1
    worse = sentences(summarize(runs, baseline="loss"))[0]
    assert worse.startswith("At step 10, uniform against loss: test loss is worse by 0.097 nats (p")
    alone = summarize([run for run in runs if run.seed == (0, 0)])
    assert sentences(alone) == [
        "loss against uniform: not tested, as fewer than 2 seeds pair.",
        "online H=1 K=1 against uniform: not tested, as fewer than 2 seeds pair.",
    ]


def test_time_and_steps_to_a_loss(four_runs):
    influence, uniform = summarize(four_runs, reach=0.31).rows
    assert (influence.stats["reach_step"].mean, influence.stats["reach_s"].mean) == pytest.approx(
        (20, 4.0)
    )
    assert (uniform.stats["reach_step"].mean, uniform.stats["reach_s"].mean) == pytest.approx(
        (50, 5.0)
    )
    # By default what uniform with the same seed ends with: 0.2 for seed 0, which i0 has at step
    # 30; 0 for seed 1, which i1 never has and u1 has at step 60.
    influence, uniform = summarize(four_runs).rows
    assert (influence.num_reached, influence.stats["reach_step"]) == (1, None)
    assert tables.reached(influence, "reach_step") == "1 of 2 runs"
    assert (uniform.num_reached, uniform.stats["reach_step"].mean) == (2, 60)
    never = summarize(four_runs, reach=-1.0).rows[0]
    assert tables.reached(never, "reach_step") == "never"


def test_what_offline_selection_took_counts(tmp_path):
    plain = make_run(tmp_path / "u", [0.5] * 20, strategy="uniform")
    run = make_run(tmp_path / "o", [0.4, 0.6], horizon=math.inf, upfront_s=10)
    report = {"upfront_s": 10.0, "samples_scored": 500}
    (tmp_path / "o" / "offline.json").write_text(json.dumps(report))
    comparison = summarize([plain, load_run(run.folder)])
    uniform, offline = comparison.rows
    assert (offline.label, offline.stats["upfront_s"].mean, uniform.stats["upfront_s"]) == (
        "offline",
        10,
        None,
    )
    assert offline.stats["wall_s"].mean == pytest.approx(12)
    assert offline.stats["samples_scored"].mean == 500 + 1280
    assert offline.stats["overhead"].mean == pytest.approx(
        6
    )  # 12 s for 20 steps, against 20 s for 200
    assert offline.stats["baseline_in_same_time"].mean == 0.5
    assert comparison.time_s == 12


def test_a_group_is_blank_where_one_of_its_runs_has_no_value(tmp_path):
    make_run(tmp_path / "a", [0.5, 0.6], seed=0, step_s=0.3)
    make_run(tmp_path / "b", [0.7, 0.8], seed=1, step_s=0.5)
    make_run(tmp_path / "c", [0.1, 0.2], strategy="uniform", seed=0, step_s=0.4)
    make_run(tmp_path / "d", [0.3, 0.4], strategy="uniform", seed=1, step_s=0.4)
    rows = summarize([load_run(tmp_path / name) for name in "acd"]).rows
    assert (
        rows[0].stats["baseline_in_same_time"].mean == 0.1
    )  # at 6 s: evaluated after 4 s and after 8 s
    # b ends at 10 s, but uniform with its seed was stopped at 8 s.
    comparison = summarize([load_run(tmp_path / name) for name in "abcd"])
    assert comparison.rows[0].stats["baseline_in_same_time"] is None
    assert "uniform was not run with all seeds for as long as online H=1 K=1: give it more" in (
        " ".join(comparison.notes)
    )


def test_the_baseline_can_be_chosen(four_runs):
    comparison = summarize(four_runs, baseline="online H=1 K=1")
    assert comparison.rows[1].tests["at_equal_steps"].mean == pytest.approx(-0.45)
    with pytest.raises(ReportError, match="baseline must be one of 'online H=1 K=1', 'uniform'"):
        summarize(four_runs, baseline="random")


def test_unfinished_runs_are_left_out_and_said(tmp_path):
    whole = [make_run(tmp_path / f"a{seed}", [0.5, 0.6], seed=seed) for seed in (0, 1)]
    ends = {"crashed": None, "failed": "failed", "stopped": "stopped by SIGTERM"}
    others = [
        make_run(tmp_path / name, [0.1], seed=2 + place, status=status)
        for place, (name, status) in enumerate(ends.items())
    ]
    comparison = summarize([*whole, *others])
    (row,) = comparison.rows
    assert (comparison.step, row.num_runs, row.num_left_out) == (20, 2, 3)
    assert tables.runs_of(row) == "2 (-3)"
    assert comparison.notes == [
        f"left out, crashed at step 10 of 100: {tmp_path / 'crashed'}",
        f"left out, failed at step 10 of 100: {tmp_path / 'failed'}",
        f"left out, stopped by a signal at step 10 of 100: {tmp_path / 'stopped'}",
    ]
    partial = summarize([*whole, *others], partial=True)
    assert (partial.step, partial.rows[0].num_runs) == (10, 5)
    assert partial.notes[0] == f"as far as it got, crashed at step 10 of 100: {others[0].where}"
    assert "runs of online H=1 K=1 are of different lengths, 10 to 20 steps" in partial.notes[3]
    alone = summarize(others)
    assert alone.notes[0] == "no run has finished yet: all are compared as far as they got"
    assert alone.rows[0].num_runs == 3


def compare(*args: object) -> int:
    return main(["compare", *map(str, args)])


def test_compare_prints_tables_and_writes_csv_and_pictures(tmp_path, four_runs, capsys):
    out = tmp_path / "out"
    assert compare(tmp_path / "*", "--out", out) == 0
    text = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "online H=1 K=1 2 85.0 ± 7.1 85.0 ± 7.1 85.0 ± 7.1 90.0 ± 14.1" in rows
    assert "uniform 2 90.0 ± 14.1 40.0 ± 14.1 90.0 ± 14.1 -" in rows
    same_time = "online H=1 K=1 in the same time no difference seen -5.0 -195.6 to +185.6 0.8 0.8 2"
    assert same_time in rows
    assert "uniform 65 1040 0 6.5 ± 0.7 25 ± 0 x 1.00" in rows
    assert rows[-4:-1] == sentences(summarize(four_runs))
    assert rows[-1].startswith("wrote ")
    with (out / "compare.csv").open() as file:
        found = {row["label"]: row for row in csv.DictReader(file)}
    assert float(found["uniform"]["quality_at_step_mean"]) == pytest.approx(0.4)
    assert float(found["uniform"]["quality_at_step_sd"]) == pytest.approx(0.2 / math.sqrt(2))
    assert float(found["online H=1 K=1"]["at_equal_steps_mean"]) == pytest.approx(0.45)
    assert found["uniform"]["at_equal_steps_mean"] == ""
    # Blue and vermilion lines, drawn: colours that are in the picture and not only in the legend.
    picture = (imread(out / "compare.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        rows_with = (picture == colour).all(axis=2)
        columns = np.flatnonzero(rows_with[: len(picture) * 3 // 4].any(axis=0)) / picture.shape[1]
        assert {0, 1, 2} == {int(3 * column) for column in columns}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing*"], "no runs found: {}/nothing* matches no directory with metrics.jsonl"),
        (["nowhere"], "no runs found: {}/nowhere is not a directory"),
        (["runs"], "{}/runs has no metrics.jsonl; it holds runs, compare '{}/runs/*'"),
        (["empty"], "{}/empty has no metrics.jsonl; is it a run directory?"),
        (["early"], "{}/early/metrics.jsonl has no complete line yet"),
        (["noconfig"], "{}/noconfig/config.yaml: config must be an existing file"),
    ],
)
def test_what_cannot_be_compared_is_said_without_a_traceback(tmp_path, capsys, args, message):
    make_run(tmp_path / "runs" / "a", [0.1])
    for name in ("empty", "early", "noconfig"):
        (tmp_path / name).mkdir()
    (tmp_path / "early" / "metrics.jsonl").touch()
    (tmp_path / "noconfig" / "metrics.jsonl").write_text(json.dumps({"train/step": 1}) + "\n")
    assert compare(*(tmp_path / arg for arg in args), "--out", tmp_path) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: " + message.replace("{}", str(tmp_path)))
    assert not (tmp_path / "compare.csv").exists()


def test_a_metric_that_no_run_has_leaves_blanks(tmp_path):
    run = make_run(tmp_path / "a", [0.5])
    (tmp_path / "a" / "metrics.jsonl").write_text('{"train/step": 1, "train/loss": 2.0}\n')
    comparison = summarize([load_run(run.folder)])
    assert grids(comparison)[0].cells == [["online H=1 K=1", "1", "-", "-", "-", "-"]]
    assert compare(tmp_path / "a", "--out", tmp_path) == 0


def test_shards_are_made_by_the_command_line(tmp_path, capsys):
    root = tmp_path / "digits"
    assert main(["shards", "make", "digits", "--root", str(root), "--label-noise", "0.4"]) == 0
    assert list(root.glob("train-*.tar"))
    assert main(["shards", "make", "digits", "--root", str(root), "--label-noise", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: label_noise must be in [0, 1], got 2.0")
