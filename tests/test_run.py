"""Configuration in, run directory out: what is in it, that it repeats, and what it refuses."""

import dataclasses
import json
import math
import re
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import run_program
from torch import nn

from selectflow.control.horizon import as_horizon
from selectflow.data import (
    PoolStream,
    make_digits,
    read_batches,
    read_metadata,
)
from selectflow.report.runs import end, load_run
from selectflow.run import ledger as ledger_module
from selectflow.run.build import build_horizon, build_schedule
from selectflow.run.config import RunConfig
from selectflow.run.ledger import read_ledger
from selectflow.run.log import Stopwatch
from selectflow.run.loop import RunError, Task, resolve_device, train
from selectflow.run.sections import ScheduleConfig, SelectConfig
from selectflow.run.terminal import progress_bar, show_progress

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_digits(root, label_noise=0.4)
    return root


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def evaluate(model, batches):
    return {"loss": sum(float(loss_fn(model, b).sum()) for b in batches)}


def task(root, pools=None):
    torch.manual_seed(0)
    metadata = read_metadata(root, "train")
    return Task(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        loss_fn=loss_fn,
        evaluate=evaluate,
        pools=pools or PoolStream(root, pool=32, seed=0),
        target=read_batches(root, "target", 200),
        test=read_batches(root, "test", 400),
        kinds={"altered": frozenset(key for key, made in metadata.items() if made["altered"])},
    )


def config(tmp_path, **options):
    values = {"name": "trial", "root": tmp_path, "steps": 7, "eval_every": 3, "device": "cpu"}
    select = {"keep": 8} | options.pop("select", {})
    return RunConfig.model_validate(values | {"select": select} | options)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_directory(digits, tmp_path):
    run_dir = train(config(tmp_path, name="trial-{seed}", seed=5), task(digits))
    assert run_dir == tmp_path / "trial-5"
    metrics = read_lines(run_dir / "metrics.jsonl")
    assert [line["train/step"] for line in metrics] == [0, 3, 6, 7]
    last = metrics[-1]
    assert last["data/samples_seen"] == 7 * 8
    assert last["data/samples_scored"] == 7 * 32
    assert last["select/horizon"] == 1
    assert last["select/kept_fraction"] == 0.25
    assert 0 < last["perf/select_s"] < last["perf/wall_s"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 7)
    assert summary["test/loss"] == last["test/loss"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000007.pt"]


def test_the_ledger_holds_every_decision(digits, tmp_path):
    made = task(digits)
    run_dir = train(config(tmp_path, select={"horizon": 2}), made)
    ledger = read_ledger(run_dir)
    assert ledger["step"].to_pylist() == [1 + row // 32 for row in range(7 * 32)]
    assert set(ledger["horizon"].to_pylist()) == {2}
    rows, pools = ledger.to_pylist(), PoolStream(digits, pool=32, seed=0)
    trained_on = []
    for step, pool in zip(range(7), pools, strict=False):
        of_step = rows[32 * step : 32 * (step + 1)]
        assert [row["key"] for row in of_step] == pool["key"]
        assert [row["epoch"] for row in of_step] == pool["epoch"]
        best = sorted(row["score"] for row in of_step)[-8:]
        assert sorted(row["score"] for row in of_step if row["kept"]) == best
        trained_on.append([row["loss"] for row in of_step if row["kept"]])
    metrics = read_lines(run_dir / "metrics.jsonl")
    # the loss of a decision is the loss that the step then trains on: the model has no dropout
    assert metrics[1]["train/loss"] == pytest.approx(np.mean(trained_on[:3]), rel=1e-5)
    first = ledger.slice(0, 3 * 32).filter(ledger["kept"].slice(0, 3 * 32))["key"].to_pylist()
    share = sum(key in made.kinds["altered"] for key in first) / len(first)
    assert metrics[1]["select/kept_altered"] == pytest.approx(share)


def test_the_same_configuration_gives_the_same_run(digits, tmp_path):
    weights = []
    for name in ("a", "b"):
        made = task(digits)
        train(config(tmp_path, name=name, select={"horizon": 2, "interval": 2}), made)
        weights.append([p.detach().clone() for p in made.model.parameters()])
    assert all(map(torch.equal, *weights))
    assert read_ledger(tmp_path / "a").equals(read_ledger(tmp_path / "b"))


def test_a_full_run_directory_is_refused(digits, tmp_path):
    train(config(tmp_path), task(digits))
    with pytest.raises(RunError, match=r"trial, which holds another run; .*overwrite=true"):
        train(config(tmp_path), task(digits))
    train(config(tmp_path, overwrite=True, steps=2), task(digits))
    assert len(read_ledger(tmp_path / "trial")) == 2 * 32


def test_a_wall_clock_limit_ends_the_run_early(digits, tmp_path):
    run_dir = train(config(tmp_path, steps=100_000, max_wall_s=0.05), task(digits))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] < 1000
    assert summary["perf/wall_s"] >= 0.05


@pytest.mark.parametrize("strategy", ["uniform", "influence"])
def test_a_nan_names_step_and_samples_and_keeps_the_weights_before(digits, tmp_path, strategy):
    def pools():
        for index, pool in enumerate(PoolStream(digits, pool=8, seed=0)):
            if index == 4:
                pool["image"][3] = math.nan
            yield pool

    made = task(digits, pools())
    with pytest.raises(FloatingPointError, match=r"must be finite.*step 4.*digit-|step 4.*digit-"):
        train(config(tmp_path, select={"strategy": strategy}), made)
    summary = json.loads((tmp_path / "trial" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["diverged_at"]) == ("failed", 4, 5)
    assert load_run(tmp_path / "trial").status == "diverged"
    saved = torch.load(tmp_path / "trial" / "checkpoints" / "step-00000004.pt")
    assert all(value.isfinite().all() for value in saved["model"].values())
    assert len(read_ledger(tmp_path / "trial")) == 4 * 8


def test_a_model_whose_outputs_are_no_numbers_has_no_accuracy(digits, tmp_path):
    """An argmax of NaN is class 0, which a tenth of the digits are."""
    means = {"loss": math.nan, "accuracy": 0.1}
    made = dataclasses.replace(task(digits), evaluate=lambda model, batches: means)
    run_dir = train(config(tmp_path, steps=1), made)
    last = read_lines(run_dir / "metrics.jsonl")[-1]
    assert last["test/loss"] == last["test/accuracy"] == "NaN"
    assert math.isnan(end(load_run(run_dir), "test/accuracy"))


def test_unreadable_samples_are_logged_and_counted_by_shard(tmp_path):
    root = tmp_path / "damaged"
    make_digits(root, label_noise=0.4)
    made = task(root, PoolStream(root, pool=32, seed=0, memory_gib=0, max_errors=256))
    shard = root / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])
    run_dir = train(config(tmp_path, steps=20), made)
    errors = [line["data/errors"] for line in read_lines(run_dir / "metrics.jsonl")]
    assert errors[0] == 0 < errors[1] < errors[-1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["errors_by_shard"] == {shard.name: errors[-1]}


class Slow(PoolStream):
    """Pools that come 10 ms apart."""

    def __next__(self):
        time.sleep(0.01)
        return super().__next__()


def test_the_wait_for_data_is_counted_and_goes_on_when_a_run_is_resumed(digits, tmp_path):
    options = {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "resume": "auto"}
    train(config(tmp_path, **options), task(digits, Slow(digits, pool=32, seed=0)))
    first, *_, last = read_lines(tmp_path / "trial" / "metrics.jsonl")
    assert first["perf/data_s"] == 0
    assert 0.04 <= last["perf/data_s"] < last["perf/wall_s"]
    (tmp_path / "trial" / "checkpoints" / "step-00000004.pt").unlink()
    (tmp_path / "trial" / "summary.json").unlink()
    train(config(tmp_path, **options), task(digits))  # pools that come at once
    *_, before, last = read_lines(tmp_path / "trial" / "metrics.jsonl")
    assert before["perf/data_s"] < last["perf/data_s"] < last["perf/wall_s"]
    assert before["perf/data_s"] >= 0.02


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_steps(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_PART_ROWS", 1 << 12)  # held until it is full: in 512 steps
    made, peaks = task(digits, PoolStream(digits, pool=8, seed=0)), []

    def evaluate_and_measure(model, batches):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
        return evaluate(model, batches)

    select = {"keep": 4, "horizon": 1, "interval": 8}
    options = config(tmp_path, steps=10_000, eval_every=500, checkpoint_every=500, select=select)
    train(options, Task(**{**vars(made), "evaluate": evaluate_and_measure}))
    before = peaks[len(peaks) // 5]
    grown = peaks[-1] - before
    print(f"from {before} KiB by {grown} KiB in 8,000 steps")
    assert grown < 12 * 1024  # less than if a pool of each step were kept


def test_an_unknown_device_is_named():
    with pytest.raises(RunError, match="device must be usable, got 'cuda:7'"):
        resolve_device("cuda:7")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"name": "linear", "final": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "cosine"}, [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
        ({"name": "linear", "warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.5, 0]),
        ({"name": "step", "milestones": (2, 4), "factor": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        ({"name": "step", "milestones": (1,), "warmup_steps": 2}, [1 / 3, 2 / 3, 0.1, 0.1, 0.1]),
    ],
)
def test_schedules(options, expected):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = build_schedule(optimizer, ScheduleConfig(**options), 5)
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, [4, 4, 4, 4, 4]),
        ({"name": "linear"}, [4, 3, 2, 1, 0]),
        ({"name": "linear", "final": 2}, [4, 4, 3, 3, 2]),
        ({"name": "step", "milestones": ((1, 2), (3, 0))}, [4, 2, 2, 0, 0]),
    ],
)
def test_horizon_schedules(schedule, expected):
    config = SelectConfig(horizon=4, horizon_schedule=schedule)
    horizon = as_horizon(build_horizon(config, 5))
    assert [horizon.at(step) for step in range(5)] == expected


def test_the_horizon_of_a_run_follows_its_schedule(digits, tmp_path):
    schedule = {"name": "step", "milestones": [[2, 3], [4, 1]]}
    select = {"horizon": 0, "horizon_schedule": schedule}
    train(config(tmp_path, select=select, eval_every=1), task(digits))
    rows = read_lines(tmp_path / "trial" / "metrics.jsonl")[1:]
    assert [row["select/horizon"] for row in rows] == [0, 0, 3, 3, 1, 1, 1]


def test_the_stopwatch_counts_only_between_start_and_stop(monkeypatch):
    times = iter([10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr("selectflow.run.log.time.perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.start()
    assert watch.stop() == 2.0
    watch.start()
    assert watch.stop() == watch.stop() == 2.5


def test_progress_is_a_plain_line_with_each_evaluation(digits, tmp_path, capsys):
    run_dir = train(config(tmp_path), task(digits))
    evaluated = read_lines(run_dir / "metrics.jsonl")[1:]
    expected = [
        f"trial {line['train/step']}/7 loss {line['train/loss']:.3f}  "
        f"kept {line['select/kept_fraction']:.0%}  H {line['select/horizon']:.3g}  "
        f"lr {line['train/lr']:.2g}  altered {line['select/kept_altered']:.3f}  "
        for line in evaluated
    ]
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(expected)
    for line, start in zip(shown, expected, strict=True):
        assert line.startswith(start)
        assert re.fullmatch(r"[\d.]+ (steps/s|s/step)(  \d+ s left)?", line.removeprefix(start))
    assert [line.split()[1] for line in expected] == ["3/7", "6/7", "7/7"]


def test_the_pace_counts_the_steps_of_this_process_alone(capsys):
    """A run that was resumed after 40 of 100 steps, 2 seconds each."""
    now = 0.0
    with progress_bar("a", 100, get_time=lambda: now) as bar:
        for step in range(41, 46):
            now += 2.0
            show_progress(bar, step, "loss 0.5", with_line=True)
        now += 0.0625
        show_progress(bar, 100, "loss 0.5", with_line=True)
    first, second, *_, fifth, last = capsys.readouterr().out.splitlines()
    assert first == "a 41/100 loss 0.5"
    assert second == "a 42/100 loss 0.5  2.0 s/step  116 s left"
    assert fifth == "a 45/100 loss 0.5  2.0 s/step  110 s left"
    assert last == "a 100/100 loss 0.5  7.3 steps/s"  # 59 steps in 8.0625 s


def test_progress_is_a_bar_at_a_terminal(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    train(config(tmp_path), task(digits))
    shown = capsys.readouterr().out
    assert "7/7" in shown
    assert "\x1b[" in shown  # drawn in place
    assert "trial 3/7" not in shown


def run_trainer(tmp_path, path, *overrides):
    return run_program(ROOT / "trainers/vision.py", ROOT / path, *overrides, cwd=tmp_path)
