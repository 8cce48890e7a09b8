"""The cells of a sweep as a table and as a map, against a hand calculation."""

import csv
from dataclasses import replace

import pytest

from selectflow.report.tables import write_csv
from selectflow.tune.cells import Cell, Cells, cost, draw_map, print_cells, sort_cells, to_records


def cell(horizon, lr, values=(), state="complete", last=None, error=None, steps=30):
    return Cell(
        setting={"select.horizon": horizon, "optimizer.lr": lr, "steps": 10},
        horizon=horizon,
        lr=lr,
        state=state,
        values=tuple(values),
        last=last,
        steps=steps,
        seconds=1.5,
        relative_error=error,
        note="loss must be finite" if state == "failed" else "",
    )


GOOD = cell(0, 1e-3, [0.4, 0.6], error=0.1)  # 0.5 ± 0.1414
NEAR = cell(1, 1e-3, [0.63, 0.65], error=0.3)  # 0.64, within
FAR = cell(0, 1e-2, [0.6, 0.7], error=0.9)  # 0.65, not within
STOPPED = cell(1, 1e-2, [0.9], "stopped", last=0.95, steps=14)
EARLY = cell(4, 1e-2, [], "stopped", last=0.2, steps=5)  # a low value early on says nothing
FAILED = cell(4, 1e-3, [], "failed", steps=2)
ALL = [FAILED, EARLY, FAR, STOPPED, NEAR, GOOD]


def cells(members=ALL, goal="minimize"):
    return Cells(sort_cells(members, goal), "target/loss", goal, full_steps=180)


def test_complete_cells_come_first_by_their_mean():
    assert cells().cells == (GOOD, NEAR, FAR, STOPPED, EARLY, FAILED)
    assert cells(goal="maximize").cells == (FAR, NEAR, GOOD, STOPPED, EARLY, FAILED)


def test_what_is_near_the_best_is_within_its_standard_deviation():
    found = cells()
    assert found.best is GOOD
    assert (GOOD.mean, GOOD.sd) == (pytest.approx(0.5), pytest.approx(0.02**0.5))
    assert found.near_best() == [GOOD, NEAR]
    assert cells([STOPPED, FAILED]).best is None


def test_the_cost_is_in_steps_and_as_a_share_of_the_whole_grid():
    assert cost(cells()) == (
        "6 cells, 2 of them stopped early: 111 optimizer steps, 62% of 180, 9.0 s of training"
    )
    assert "111 optimizer steps, 9.0 s" in cost(replace(cells(), full_steps=None))


def test_the_table_says_what_is_best_and_what_is_not_told_apart(capsys):
    print_cells(cells())
    text = capsys.readouterr().out
    assert "best: select.horizon=0 optimizer.lr=0.001, target/loss 0.5000 ± 0.1414 over 2" in text
    assert "1 more within its standard deviation: no difference seen between those" in text
    assert "stopped at 0.95" in text
    assert "failed: loss must be finite" in text
    print_cells(cells([FAILED]))
    assert "there is no best one" in capsys.readouterr().out


def test_the_csv_has_every_digit(tmp_path):
    write_csv(to_records(cells()), tmp_path / "cells.csv")
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert [row["select.horizon"] for row in rows] == ["0", "1", "0", "1", "4", "4"]
    assert float(rows[0]["target/loss_sd"]) == GOOD.sd
    assert (rows[3]["state"], rows[3]["target/loss_mean"], rows[3]["last"]) == (
        "stopped", "", "0.95",
    )  # fmt: skip


def texts(axes):
    return {
        (round(text.get_position()[0]), round(text.get_position()[1])): text.get_text()
        for text in axes.texts
    }


def test_the_map_has_each_cell_at_its_place():
    figure = draw_map(cells())
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.001", "0.01"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "4"]
    assert texts(axes) == {
        (0, 0): "★ 0.5",
        (1, 0): "0.65",
        (0, 1): "0.64",
        (1, 1): "0.95 after\n14 steps",
        (0, 2): "x",
        (1, 2): "0.2 after\n5 steps",
    }
    assert axes.get_xlabel()
    assert axes.get_ylabel() == "horizon H (optimizer updates)"


def test_the_line_goes_round_what_is_predicted_safe():
    # safe: GOOD at (0, 0) and NEAR at (0, 1), one above the other: a perimeter of six edges
    lines = draw_map(cells(), tolerance=0.35).axes[0].lines
    edges = {tuple(sorted(zip(line.get_xdata(), line.get_ydata(), strict=True))) for line in lines}
    expected = {((-0.5, y), (-0.5, y + 1)) for y in (-0.5, 0.5)}
    expected |= {((0.5, y), (0.5, y + 1)) for y in (-0.5, 0.5)}
    expected |= {((-0.5, y), (0.5, y)) for y in (-0.5, 1.5)}
    assert edges == expected
    assert len(draw_map(cells(), tolerance=0.2).axes[0].lines) == 4
    assert len(draw_map(cells(), tolerance=0.05).axes[0].lines) == 0


def test_other_parameters_show_their_best_cell():
    better = cell(0, 1e-2, [0.3, 0.3])
    assert texts(draw_map(cells([GOOD, FAR, better])).axes[0])[1, 0] == "★ 0.3"


def test_many_learning_rates_share_columns_and_words_are_horizons():
    many = [cell("auto" if i % 2 else i, 1e-5 * 1.3**i, [1 + i]) for i in range(30)]
    axes = draw_map(cells(many)).axes[0]
    assert len(axes.get_xticks()) == 12
    assert axes.get_yticklabels()[-1].get_text() == "auto"
    assert draw_map(cells([FAILED])).axes  # nothing to colour
