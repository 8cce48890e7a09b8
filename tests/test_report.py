"""Comparison of runs whose answers can be calculated by hand."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from selectflow.cli import main
from selectflow.report.compare import (
    binned,
    curve,
    groups,
    label,
    series,
    stat,
    summarize,
    value_at,
)
from selectflow.report.runs import ReportError, Run, find_runs, load_run
from selectflow.tracking import Tracker
from selectflow.yaml_io import dump_yaml


def make_run(
    path: Path,
    accuracies: list[float],
    *,
    strategy: str = "influence",
    seed: int = 0,
    step_s: float = 0.1,
    finished: bool = True,
    **config: object,
) -> Run:
    """A run evaluated every 10 steps, each of `step_s` seconds, a quarter of them selecting."""
    select = {"strategy": strategy, "horizon": 1, "interval": 1, "keep": 16}
    config = {
        "name": path.name,
        "seed": seed,
        "steps": 100,
        "data": {"name": "digits", "label_noise": 0.4, "seed": 0},
        "select": select,
    } | config
    tracker = Tracker(path, config, name=path.name)
    (path / "config.yaml").write_text(dump_yaml(config))
    for number, accuracy in enumerate(accuracies, start=1):
        wall_s = 10 * number * step_s
        tracker.log(10 * number, {"test/accuracy": accuracy, "perf/wall_s": wall_s})
        tracker.log(10 * number, {"select/kept_altered": 0.1 * number, "perf/select_s": wall_s / 4})
    if finished:
        tracker.finish({"status": "finished", "steps": 10 * len(accuracies)})
    return load_run(path)


@pytest.fixture
def four_runs(tmp_path):
    """Two seeds of influence, 0.2 s a step; two of uniform, 0.1 s a step and longer."""
    return [
        make_run(tmp_path / "i0", [0.5, 0.7, 0.9], seed=0, step_s=0.2),
        make_run(tmp_path / "i1", [0.6, 0.8, 0.8], seed=1, step_s=0.2),
        make_run(tmp_path / "u0", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], strategy="uniform", seed=0),
        make_run(tmp_path / "u1", [0.1, 0.2, 0.3, 0.4, 0.9, 1.0, 1.0], strategy="uniform", seed=1),
    ]


def test_a_run_is_read_back_as_it_was_tracked(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.75])
    assert run.status == "finished"
    assert run.config["select"]["strategy"] == "influence"
    assert run.summary["test/accuracy"] == 0.75
    assert series(run, "test/accuracy") == [(10, 0.5), (20, 0.75)]
    assert series(run, "test/accuracy", over="perf/wall_s") == [(1.0, 0.5), (2.0, 0.75)]
    assert series(run, "train/loss") == []


def test_the_value_at_a_step_is_the_last_one_known_then(tmp_path):
    run = make_run(tmp_path / "a", [0.5, 0.75, 0.25])
    found = [value_at(run, "test/accuracy", at) for at in (9, 10, 19.9, 20, 1000, None)]
    assert found == [None, 0.5, 0.5, 0.75, 0.25, 0.25]
    assert value_at(run, "test/accuracy", 2.99, over="perf/wall_s") == 0.75


def test_null_values_are_not_known_values(tmp_path):
    run = make_run(tmp_path / "a", [0.5, float("nan")])
    assert value_at(run, "test/accuracy", None) == 0.5


def test_spread_is_the_sample_standard_deviation():
    found = stat([1.0, 2.0, 6.0])
    assert (found.mean, found.sd, found.num) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert stat([2.0]).sd is None
    assert stat([1.0, None]) is None  # the mean over the seeds that happen to have it would mislead
    assert stat([]) is None


def test_groups_at_their_ends_at_equal_steps_and_at_equal_time(four_runs):
    comparison = summarize(four_runs)
    influence, uniform = comparison.rows
    assert (influence.label, uniform.label) == ("influence H=1 K=1", "uniform")
    assert comparison.step == 30
    assert (influence.num_runs, uniform.num_runs) == (2, 2)
    # Two values differ by d: their sample standard deviation is d / sqrt(2).
    expected = {
        "steps": (30, 65),
        "wall_s": (6.0, 6.5),
        "accuracy": (0.85, 0.9),
        "accuracy_at_step": (0.85, 0.4),
        "kept_altered": (0.2, 0.375),
        "select_share": (0.25, 0.25),
    }
    for name, means in expected.items():
        found = tuple(getattr(row, name).mean for row in comparison.rows)
        assert found == pytest.approx(means), name
    assert influence.accuracy.sd == pytest.approx(0.1 / math.sqrt(2))
    assert uniform.accuracy_at_step.sd == pytest.approx(0.2 / math.sqrt(2))
    # Both influence runs end at 6 s, when the uniform runs had reached 0.8 and 1.0.
    assert influence.uniform_in_same_time.mean == pytest.approx(0.9)
    assert influence.uniform_in_same_time.sd == pytest.approx(0.2 / math.sqrt(2))
    assert uniform.uniform_in_same_time is None


def test_labels_say_what_decides_the_result():
    def of(**select: object) -> str:
        return label(Run(Path("a"), {"select": select}, [], {}, "finished"))

    assert of(strategy="influence", horizon=4, interval=8) == "influence H=4 K=8"
    assert of(strategy="uniform", horizon=4, interval=8) == "uniform"


def test_an_option_that_differs_within_a_label_divides_the_group(tmp_path):
    runs = [
        make_run(tmp_path / "a0", [0.1], seed=0, optimizer={"lr": 1e-3}),
        make_run(tmp_path / "a1", [0.2], seed=1, optimizer={"lr": 1e-3}),
        make_run(tmp_path / "b0", [0.3], seed=0, optimizer={"lr": 3e-3}),
        make_run(tmp_path / "c0", [0.4], seed=0, strategy="loss", optimizer={"lr": 3e-3}),
    ]
    found = {name: [run.path.name for run in members] for name, members in groups(runs).items()}
    assert found == {
        "influence H=1 K=1 lr=0.001": ["a0", "a1"],
        "influence H=1 K=1 lr=0.003": ["b0"],
        "loss": ["c0"],
    }


def test_look_ahead_options_do_not_divide_runs_that_do_not_look_ahead(tmp_path):
    for seed, horizon in enumerate((0, 4)):
        select = {"strategy": "uniform", "horizon": horizon}
        make_run(tmp_path / f"u{seed}", [0.1], seed=seed, select=select)
    assert list(groups([load_run(tmp_path / "u0"), load_run(tmp_path / "u1")])) == ["uniform"]


def test_a_seed_counted_twice_is_refused(tmp_path):
    runs = [make_run(tmp_path / name, [0.1], seed=3) for name in ("a", "again")]
    with pytest.raises(ReportError, match=r"must differ in their seeds, got seed 3 twice.*again"):
        groups(runs)


def test_runs_of_different_tasks_are_refused_with_the_difference(tmp_path):
    noised = make_run(tmp_path / "noised", [0.1])
    clean = make_run(tmp_path / "clean", [0.1], data={"name": "digits", "label_noise": 0.0})
    with pytest.raises(
        ReportError, match=r"data\.label_noise 0\.4 in .*noised and 0\.0 in .*clean"
    ):
        summarize([noised, clean])


def test_a_group_is_blank_where_one_of_its_runs_has_no_value(tmp_path):
    make_run(tmp_path / "a", [0.5, 0.6], seed=0, step_s=0.3)
    make_run(tmp_path / "b", [0.7, 0.8], seed=1, step_s=0.5)
    make_run(tmp_path / "c", [0.1, 0.2], strategy="uniform", seed=0, step_s=0.4)
    make_run(tmp_path / "d", [0.3, 0.4], strategy="uniform", seed=1, step_s=0.4)
    rows = summarize([load_run(tmp_path / name) for name in "acd"]).rows
    assert rows[0].uniform_in_same_time.mean == 0.1  # at 6 s: evaluated after 4 s and after 8 s
    # b ends at 10 s, but uniform with its seed was stopped at 8 s.
    assert summarize([load_run(tmp_path / n) for n in "abcd"]).rows[0].uniform_in_same_time is None


def test_a_mean_line_interpolates_over_the_range_that_all_runs_cover():
    def run(*points: tuple[float, float]) -> Run:
        lines = [{"perf/wall_s": x, "test/accuracy": y} for x, y in points]
        return Run(Path("a"), {}, lines, {}, "finished")

    line = curve([run((0, 0.0), (4, 0.4)), run((1, 0.5), (3, 0.7))], "test/accuracy", "perf/wall_s")
    assert line.x.tolist() == [1, 3]
    np.testing.assert_allclose(line.mean, [0.3, 0.5])
    np.testing.assert_allclose(line.sd, [0.4 / math.sqrt(2)] * 2)
    assert curve([run((0, 0.0)), run()], "test/accuracy", "perf/wall_s").x.size == 0


def test_binning_averages_neighbours_and_keeps_their_mean():
    points = [(float(x), x % 2) for x in range(10)]
    assert binned(points, 5) == [(0.5, 0.5), (2.5, 0.5), (4.5, 0.5), (6.5, 0.5), (8.5, 0.5)]
    assert binned(points, 100) == points
    assert binned([], 5) == []


def test_a_resumed_run_replaces_what_it_did_again(tmp_path):
    make_run(tmp_path, [0.1, 0.2, 0.3], finished=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 20, "test/accuracy": 0.9}\n')
        file.write('{"train/step": 25, "test/acc')  # still being written
    run = load_run(tmp_path)
    assert run.status == "unfinished"
    assert series(run, "test/accuracy") == [(10, 0.1), (20, 0.9)]
    assert value_at(run, "perf/wall_s", None) == 1.0


@pytest.mark.parametrize("text", ["{}", "[1]", '{"train/step": null}', '{"train/step": 3'])
def test_a_line_that_is_no_metrics_is_named(tmp_path, text):
    make_run(tmp_path, [0.1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl, line 3 must be a JSON object with"):
        load_run(tmp_path)


def test_runs_are_found_by_path_and_glob_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        make_run(tmp_path / "runs" / name, [0.1])
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs(["runs/b", "runs/*"]) == [Path("runs/b"), Path("runs/a")]


def compare(*args: object) -> int:
    return main(["compare", *map(str, args)])


def test_compare_prints_the_table_and_writes_csv_and_picture(tmp_path, four_runs, capsys):
    out = tmp_path / "out"
    assert compare(tmp_path / "*", "--out", out) == 0
    text = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in text.splitlines() if "±" in line]
    assert rows[:2] == [
        "influence H=1 K=1 2 30 6.0 85.0 ± 7.1 85.0 ± 7.1 90.0 ± 14.1 20.0 ± 0.0 25 ± 0",
        "uniform 2 65 6.5 90.0 ± 14.1 40.0 ± 14.1 - 37.5 ± 3.5 25 ± 0",
    ]
    with (out / "compare.csv").open() as file:
        rows = {row["group"]: row for row in csv.DictReader(file)}
    assert float(rows["uniform"]["accuracy_at_step_mean"]) == pytest.approx(0.4)
    assert float(rows["uniform"]["accuracy_at_step_sd"]) == pytest.approx(0.2 / math.sqrt(2))
    # Blue and vermilion lines, drawn: colours that are in the picture and not only in the legend.
    picture = (imread(out / "compare.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
        rows_with = (picture == colour).all(axis=2)
        columns = np.flatnonzero(rows_with[: len(picture) * 3 // 4].any(axis=0)) / picture.shape[1]
        assert {0, 1, 2} == {int(3 * column) for column in columns}


def test_an_unfinished_run_does_not_shorten_the_others(tmp_path, capsys):
    make_run(tmp_path / "a", [0.5, 0.6])
    make_run(tmp_path / "crashed", [0.5], seed=1, finished=False)
    assert compare(tmp_path / "*", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert f"left out, unfinished at step 10 of 100: {tmp_path / 'crashed'}" in text
    row = next(line for line in text.splitlines() if "influence" in line)
    assert row.split()[-8:] == ["1", "20", "2.0", "60.0", "60.0", "-", "15.0", "25"]
    assert compare(tmp_path / "crashed", "--out", tmp_path) == 0
    assert "no run has finished yet" in capsys.readouterr().out


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


def test_a_metric_that_no_run_has_leaves_a_blank_and_a_note(tmp_path, capsys):
    make_run(tmp_path / "a", [0.5])
    (tmp_path / "a" / "metrics.jsonl").write_text('{"train/step": 1, "train/loss": 2.0}\n')
    assert compare(tmp_path / "a", "--out", tmp_path) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "influence" in line)
    assert line.split()[-8:] == ["1", "1", "-", "-", "-", "-", "-", "-"]


def test_shards_are_made_by_the_command_line(tmp_path, capsys):
    root = tmp_path / "digits"
    assert main(["shards", "make", "digits", "--root", str(root), "--label-noise", "0.4"]) == 0
    assert list(root.glob("train-*.tar"))
    assert main(["shards", "make", "digits", "--root", str(root), "--label-noise", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: label_noise must be in [0, 1], got 2.0")
