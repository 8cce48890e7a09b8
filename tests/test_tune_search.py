"""Sweeps that are run here: their values, who is stopped, that they resume, and what fails."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from optuna.trial import TrialState
from programs import run_program

from selectflow.cli import main
from selectflow.data import make_digits
from selectflow.run.config import load
from selectflow.run.yaml import dump_yaml
from selectflow.tune.cells import write_outputs
from selectflow.tune.search import open_study, read_cells, tune
from selectflow.tune.space import TuneError, load_sweep
from selectflow.tune.wandb import cells_of_runs

TOY = Path(__file__).with_name("toy_trainer.py")
LRS = [1e-4, 1e-3, 1e-2, 1e-1]
GRID = {
    "optimizer.lr": {"values": LRS},
    "select.horizon": {"values": [0, 1]},
    "seed": {"values": [0, 1]},
}
HYPERBAND = {"type": "hyperband", "min_iter": 2, "eta": 2}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


def writer(digits, folder):
    """Writes a sweep of the toy trainer, 12 steps evaluated every third; returns its path."""
    base = {"name": "base", "steps": 12, "eval_every": 3, "device": "cpu", "checkpoint_every": 3}
    base |= {"data": {"root": str(digits), "pool": 32}, "select": {"keep": 8}}

    def write(parameters=GRID, **keys):
        (folder / "base.yaml").write_text(dump_yaml(base))
        macros = ["${env}", "${interpreter}", "${program}"]
        values = {
            "name": "toy",
            "program": str(TOY),
            "command": [*macros, str(folder / "base.yaml"), "${args_no_hyphens}"],
            "method": "grid",
            "metric": {"name": "target/loss", "goal": "minimize"},
            "parameters": parameters,
        }
        path = folder / "sweep.yaml"
        path.write_text(dump_yaml(values | keys))
        return path

    return write


@pytest.fixture
def write(digits, tmp_path):
    return writer(digits, tmp_path)


@pytest.fixture(scope="module")
def full(digits, tmp_path_factory):
    """The directory of the whole grid, what it came to, and what it said."""
    folder = tmp_path_factory.mktemp("full")
    return folder, *run(writer(digits, folder)(), folder / "out")


def run(path, out, jobs=2):
    sweep, lines = load_sweep(path), []
    study = tune(sweep, out, jobs, lines.append)
    return read_cells(sweep, study, out), lines


def place(cell):
    return cell.setting["optimizer.lr"], cell.setting["select.horizon"]


def curves(out):
    """The metric of every run by (lr, horizon, seed), from its metrics.jsonl."""
    found = {}
    for path in (out / "runs").glob("*/metrics.jsonl"):
        config = load(path.with_name("config.yaml"))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        key = config.optimizer.lr, config.select.horizon, config.seed
        found[key] = [row["target/loss"] for row in rows]
    return found


def test_a_grid_gives_every_cell_the_values_that_its_runs_have_alone(full, tmp_path):
    folder, found, lines = full
    assert sorted(map(place, found.cells)) == [(lr, horizon) for lr in LRS for horizon in (0, 1)]
    means = [cell.mean for cell in found.cells]
    assert means == sorted(means)
    assert all(cell.steps == 24 for cell in found.cells)
    assert found.full_steps == 8 * 24
    assert len(lines) == 8
    # one run again, from the command line of a person
    overrides = ["optimizer.lr=1e-2", "select.horizon=1", "seed=1", f"root={tmp_path / 'alone'}"]
    done = run_program(TOY, folder / "base.yaml", *overrides, "num_threads=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "alone" / "base" / "summary.json").read_text())
    (cell,) = [cell for cell in found.cells if place(cell) == (1e-2, 1)]
    assert cell.values[1] == summary["target/loss"]


def halved(order, full, first, eta):
    """Who is stopped after how many evaluations, one cell after the other; None: run to its end."""
    brackets, stopped = {}, {}
    for lr, horizon in order:
        seeds = [full[lr, horizon, seed] for seed in (0, 1)]
        values = seeds[0] + [(seeds[0][-1] + value) / 2 for value in seeds[1]]
        stopped[lr, horizon] = None
        rung = first
        for number, value in enumerate(values, 1):
            if number < rung or number == len(values):
                continue
            there = brackets.setdefault(rung, [])
            there.append(value)
            if value > sorted(there)[max(0, len(there) // eta - 1)]:
                stopped[lr, horizon] = number
                break
            rung *= eta
    return stopped


def test_who_is_stopped_is_what_successive_halving_says(full, write, tmp_path):
    full = curves(full[0] / "out")
    found, lines = run(write(early_terminate=HYPERBAND), tmp_path / "early", jobs=1)
    texts = [re.match(r"optimizer.lr=(\S+) select.horizon=(\d): (.*)", line) for line in lines]
    order = [(float(text[1]), int(text[2])) for text in texts]
    expected = halved(order, full, first=2, eta=2)
    assert [text[3] for text in texts if text[3].startswith("stopped")] == [
        f"stopped after {number} evaluations" for number in expected.values() if number
    ]
    assert 0 < sum(number is not None for number in expected.values()) < 8
    # what was run to its end has the same values as in the full grid
    for cell in found.cells:
        lr, horizon = place(cell)
        assert (cell.state == "complete") == (expected[lr, horizon] is None)
        if cell.state == "complete":
            assert list(cell.values) == [full[lr, horizon, seed][-1] for seed in (0, 1)]
    assert sum(cell.steps for cell in found.cells) < 8 * 24


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_no_finished_cell(write, tmp_path):
    path, out = write(early_terminate=HYPERBAND | {"min_iter": 6}), tmp_path / "out"
    command = [sys.executable, "-m", "selectflow", "tune", str(path), "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done = [process.stdout.readline() for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert all(": " in line for line in done)
    summaries = {path: path.read_text() for path in (out / "runs").glob("*/summary.json")}
    ended = {p: (p.stat().st_mtime_ns) for p, s in summaries.items() if '"finished"' in s}
    assert ended

    found, lines = run(path, out)
    assert {p: p.stat().st_mtime_ns for p in ended} == ended
    begun = {line.split(":")[0] for line in done}
    assert not begun & {line.split(":")[0] for line in lines}
    assert sorted(map(place, found.cells)) == [(lr, horizon) for lr in LRS for horizon in (0, 1)]
    study = open_study(load_sweep(path), out)
    good = [trial for trial in study.trials if trial.state != TrialState.FAIL]
    assert len(good) == 8  # every cell has ended once
    for cell in found.cells:
        if cell.state == "complete":
            assert len(cell.values) == 2

    again, lines = run(path, out)  # a third start has nothing to do
    assert (lines, again) == ([], found)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_runs_save_and_end_when_the_sweep_does(write, tmp_path, number, code):
    path, out = write(GRID | {"steps": {"value": 100000}}), tmp_path / "out"
    command = [sys.executable, "-m", "selectflow", "tune", str(path), "--out", str(out)]
    process = subprocess.Popen([*command, "--jobs", "1"], stdout=subprocess.DEVNULL)
    until(lambda: list((out / "runs").glob("*/metrics.jsonl")))
    os.kill(process.pid, number)
    assert process.wait() == code
    (summary,) = until(lambda: list((out / "runs").glob("*/summary.json")))
    assert json.loads(summary.read_text())["status"] == "stopped by SIGTERM"


def until(check, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_proposed_settings_are_in_their_ranges_and_no_more_than_asked_for(write, tmp_path, method):
    parameters = {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "select.interval": {"min": 1, "max": 3},
        "model.hidden": {"values": [[8], [8, 8]]},
        "steps": {"value": 3},
    }
    path, out = write(parameters, method=method, run_cap=3), tmp_path / "out"
    first, _ = run(path, out)
    more, lines = run(write(parameters, method=method, run_cap=5), out)
    assert (len(first.cells), len(more.cells), len(lines)) == (3, 5, 2)
    lrs = {cell.setting["optimizer.lr"] for cell in more.cells}
    assert len(lrs) == 5  # a resumed sweep proposes other settings
    assert all(1e-4 <= lr <= 1e-1 for lr in lrs)
    assert all(cell.setting["select.interval"] in (1, 2, 3) for cell in more.cells)
    assert all(cell.setting["model.hidden"] in ([8], [8, 8]) for cell in more.cells)


def test_the_command_writes_table_map_and_a_configuration_that_runs(write, tmp_path, capsys):
    parameters = {"optimizer.lr": {"values": [1e-4, 1e-2]}, "seed": {"values": [0, 1]}}
    path, out = write(parameters), tmp_path / "out"
    assert main(["tune", str(path), "--local", "--jobs", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 cells, 0 of them stopped early: 48 optimizer steps, 100% of 48" in text
    rows = list(csv.DictReader((out / "cells.csv").read_text().splitlines()))
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-2, 1e-4]
    assert (out / "map.png").read_bytes().startswith(b"\x89PNG")
    best = load(out / "best.yaml", ["seed=1"])
    assert (best.optimizer.lr, best.run_name) == (1e-2, "toy-best-s1")
    assert (best.steps, best.select.keep, best.data.pool) == (12, 8, 32)  # the base's


def test_the_best_configuration_runs_whatever_the_sweep_is_called(write, tmp_path):
    """Values that Python calls equal are run each; the name is text in the file's head alone."""
    parameters = {"select.keep": {"values": [1, 1.0]}, "steps": {"value": 3}}
    path, out = write(parameters, name="Sweep: lr\nsteps: 99"), tmp_path / "out"
    found, lines = run(path, out)
    assert sorted(str(cell.setting["select.keep"]) for cell in found.cells) == ["1", "1.0"]
    assert len({cell.mean for cell in found.cells}) == 2  # one example is not the whole pool
    assert len(list((out / "runs").glob("*/summary.json"))) == len(lines) == 2
    write_outputs(load_sweep(path), found, out)
    best = load(out / "best.yaml", ["seed=0"])
    assert (best.steps, type(best.select.keep)) == (3, type(found.best.setting["select.keep"]))
    assert re.fullmatch(r"Sweep-lr-steps-99-[0-9a-f]{8}-best-s0", best.run_name)


def test_a_setting_that_diverges_is_no_defect_of_the_sweep(write, tmp_path):
    """The first three cells diverge, the sweep goes on, and their cells have no number."""
    parameters = {"optimizer.lr": {"values": [1e36, 1e37, 1e38, 1e-3]}, "steps": {"value": 6}}
    parameters["select.horizon"] = {"value": 0}
    found, lines = run(write(parameters), tmp_path / "out", jobs=1)
    assert len(lines) == 4
    assert found.best.lr == 1e-3
    for cell in found.cells[1:]:
        assert (cell.state, cell.values, cell.mean, cell.last) == ("failed", (), None, None)
        assert "finite" in cell.note
    study = open_study(load_sweep(tmp_path / "sweep.yaml"), tmp_path / "out")
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_metric_that_ends_not_finite_has_no_number(full, tmp_path):
    """Of runs of W&B's agents too, which are finished."""
    folder, _, _ = full
    sweep, dirs = load_sweep(folder / "sweep.yaml"), []
    for path in sorted((folder / "out" / "runs").glob("lr*-s[01]")):
        dirs.append(tmp_path / path.name)
        shutil.copytree(path, dirs[-1])
    broken = tmp_path / dirs[0].name
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 12, "target/loss": "NaN"}\n')
    found = cells_of_runs(sweep, dirs)
    last = found.cells[-1]
    assert [cell.state for cell in found.cells].count("failed") == 1
    assert (last.state, last.note, last.mean) == ("failed", "target/loss is not finite", None)
    write_outputs(sweep, found, tmp_path / "shown")


def test_the_cells_of_runs_that_others_made_are_those_of_the_sweep(full, tmp_path):
    """Gathered from the directories alone, as after W&B's agents: the same table."""
    folder, found, _ = full
    sweep = load_sweep(folder / "sweep.yaml")
    gathered = cells_of_runs(sweep, sorted((folder / "out" / "runs").glob("lr*-s[01]")))
    assert gathered == found
    one_seed = cells_of_runs(sweep, sorted((folder / "out" / "runs").glob("lr*-s0")))
    assert {cell.state for cell in one_seed.cells} == {"failed"}  # a seed is missing


@pytest.mark.slow
def test_what_wandbs_agent_would_run_becomes_the_table(write, tmp_path, monkeypatch, capsys):
    from wandb.sdk.launch.sweeps.utils import (  # noqa: PLC0415 - it takes seconds
        create_sweep_command,
        create_sweep_command_args,
    )

    """All but the server: the agent's part is done with W&B's own functions."""
    command = ["${env}", "${interpreter}", "${program}", str(tmp_path / "base.yaml")]
    command += ["track.wandb=disabled", f"root={tmp_path}", "${args_no_hyphens}"]
    path = write({"optimizer.lr": {"values": [1e-3, 1e-2]}}, command=command)
    sent = {}

    def sweep(spec, **options):
        sent.update(spec=spec, **options)
        return "abc"

    def agent(sweep_id, **_):
        assert sweep_id == "abc"
        for lr in sent["spec"]["parameters"]["optimizer.lr"]["values"]:
            chosen = {"optimizer.lr": {"value": lr}}
            given = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
            words = create_sweep_command(list(sent["spec"]["command"]))[3:-1]
            subprocess.run([sys.executable, str(TOY), *words, *given], check=True)

    monkeypatch.setattr(wandb, "sweep", sweep)
    monkeypatch.setattr(wandb, "agent", agent)
    assert main(["tune", str(path), "--wandb", "--out", str(tmp_path / "out")]) == 0
    assert (sent["project"], sent["spec"]["method"]) == ("selectflow", "grid")
    text = capsys.readouterr().out
    assert "wandb agent selectflow/abc" in text
    assert "2 cells, 0 of them stopped early" in text
    assert load(tmp_path / "out" / "best.yaml").optimizer.lr == 1e-2


# --- bad input ------------------------------------------------------------------------------


def test_a_cell_that_fails_is_named_and_the_others_go_on(write, tmp_path):
    parameters = {"optimizer.lr": {"values": [1e-3, 1e-2, 1e38]}, "select.horizon": {"value": 0}}
    found, _ = run(write(parameters), tmp_path / "out")
    assert [cell.state for cell in found.cells] == ["complete", "complete", "failed"]
    assert found.cells[-1].lr == 1e38
    assert re.search(r"finite", found.cells[-1].note)


def test_a_sweep_whose_first_cells_all_fail_ends(write, tmp_path):
    parameters = {"optimizer.lr": {"values": LRS}, "data.root": {"value": str(tmp_path / "none")}}
    with pytest.raises(TuneError, match=r"a sweep's cells must run, got 3 that failed; .*none"):
        run(write(parameters), tmp_path / "out", jobs=1)


def test_another_sweep_in_the_same_directory_is_refused(write, tmp_path):
    parameters = {"optimizer.lr": {"values": [1e-3]}, "steps": {"value": 3}}
    run(write(parameters), tmp_path / "out")
    other = parameters | {"steps": {"value": 4}}
    with pytest.raises(TuneError, match=r"got other values of sweep\.parameters than in"):
        run(write(other), tmp_path / "out")


@pytest.mark.slow  # W&B takes its time to say no
def test_a_sweep_on_wandb_without_a_key_says_what_to_do(write, tmp_path):
    hidden = {"WANDB_API_KEY", "WANDB_BASE_URL"}
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "selectflow", "tune", str(write()), "--wandb"],
        check=False, env=env, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "a sweep on W&B must have a key and a network" in done.stderr
    assert "use --local" in done.stderr
