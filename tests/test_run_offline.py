"""A run with an infinite horizon: what it keeps, what it counts, that it resumes as the same."""

import json
from dataclasses import replace

import pytest
import torch
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import ROOT, config, digits, loss_fn, read_lines, run_trainer, task

from selectflow.data import PoolStream, read_manifest, read_metadata, read_split
from selectflow.offline.record import record
from selectflow.offline.score import score_samples
from selectflow.run.build import build_optimizer
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import RunError, train
from selectflow.run.sections import OptimizerConfig

__all__ = ["digits"]  # the fixture

OFFLINE = {
    "horizon": float("inf"),
    "record_steps": 40,
    "record_lr": 1e-3,
    "keep_samples": 0.25,
}


def offline_task(root, pools=None):
    return replace(task(root, pools), source=root)


def offline_config(tmp_path, **options):
    return config(tmp_path, select=OFFLINE | options.pop("select", {}), **options)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_run_keeps_what_the_sweep_over_a_run_on_everything_ranks_best(digits, tmp_path):
    options, made = offline_config(tmp_path), offline_task(digits)
    run_dir = train(options, made)
    by_hand, stream = task(digits), PoolStream(digits, pool=8, seed=0)  # pools of 32, cut into 8s
    optimizer = build_optimizer(by_hand.model, OptimizerConfig(lr=1e-3))
    batches = [next(stream) for _ in range(40)]
    scores = score_samples(record(by_hand.model, optimizer, loss_fn, batches), by_hand.target)
    assert len(scores.keys) == 320
    best = set(scores.top(0.25))
    kept = {sample["__key__"] for sample in read_split(run_dir / "selected", "train")}
    assert kept == best
    manifest = read_manifest(run_dir / "selected")
    assert manifest.options["source"] == read_manifest(digits).fingerprint()
    assert manifest.options["share"] == 0.25
    report = json.loads((run_dir / "offline.json").read_text())
    assert (report["record_steps"], report["batch_size"]) == (40, 8)
    assert (report["samples_scored"], report["samples_kept"]) == (320, 80)


def test_training_starts_afresh_on_the_kept_samples_alone(digits, tmp_path):
    """The same as a uniform run, from the same initial weights, on the selected shards."""
    made = offline_task(digits)
    run_dir = train(offline_config(tmp_path), made)
    kept = PoolStream(run_dir / "selected", pool=8, seed=0)
    plain = task(digits, kept)
    train(config(tmp_path, name="plain", select={"strategy": "uniform", "keep": 1.0}), plain)
    assert torch.equal(weights(made.model), weights(plain.model))
    assert read_ledger(run_dir).equals(read_ledger(tmp_path / "plain"))


def test_recording_and_sweeping_are_counted(digits, tmp_path):
    run_dir = train(offline_config(tmp_path), offline_task(digits))
    upfront_s = json.loads((run_dir / "offline.json").read_text())["upfront_s"]
    metrics = read_lines(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert upfront_s > 0
    assert metrics[0]["perf/wall_s"] == summary["perf/upfront_s"] == upfront_s
    assert upfront_s < metrics[1]["perf/select_s"] < metrics[1]["perf/wall_s"]
    trained_s = metrics[1]["perf/wall_s"] - upfront_s
    assert metrics[1]["perf/step_s"] == pytest.approx(trained_s / 3)


@pytest.mark.parametrize("at", [1, 11])
def test_a_killed_run_resumes_to_the_same_end_and_selects_once(digits, tmp_path, at):
    train(offline_config(tmp_path, name="whole", **OPTIONS), offline_task(digits))
    killed = offline_config(tmp_path, name="killed", **OPTIONS)
    with pytest.raises(Killed):
        # the recording is in evaluation mode, which `killed_at` does not count
        train(killed, killed_at(at, offline_task(digits)))
    report = (tmp_path / "killed" / "offline.json").read_bytes()
    train(killed, offline_task(digits))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))
    assert (tmp_path / "killed" / "offline.json").read_bytes() == report


def test_what_a_run_left_that_was_killed_while_it_selected_is_made_again(digits, tmp_path):
    whole = train(offline_config(tmp_path, name="whole", **OPTIONS), offline_task(digits))
    killed = offline_config(tmp_path, name="killed", **OPTIONS)
    selected = tmp_path / "killed" / "selected"
    selected.mkdir(parents=True)
    (selected / "train-000000.tar").write_bytes(b"half a shard")
    (selected / "manifest.json").write_text("{}")
    train(killed, offline_task(digits))
    assert read_manifest(selected) == read_manifest(whole / "selected")
    assert_same(outcome(whole), outcome(tmp_path / "killed"))


def test_a_task_without_a_source_is_refused(digits, tmp_path):
    with pytest.raises(
        RunError, match=r"source of the task must be .*got None; pass the directory"
    ):
        train(offline_config(tmp_path), task(digits))


def test_pools_without_keys_are_refused(digits, tmp_path):
    pools = [{"image": torch.rand(32, 1, 8, 8), "label": torch.zeros(32, dtype=torch.int64)}] * 5
    with pytest.raises(ValueError, match="batches must be mappings with a list 'key'"):
        train(offline_config(tmp_path), offline_task(digits, pools))


def test_the_shipped_configuration_keeps_fewer_altered_labels_than_the_stream(tmp_path):
    done = run_trainer(
        tmp_path, ROOT / "configs/digits_offline.yaml", "steps=2", "track.wandb=disabled"
    )
    assert done.returncode == 0, done.stderr
    altered = {
        key
        for key, made in read_metadata(tmp_path / "data/digits-noise0.4-seed0", "train").items()
        if made["altered"]
    }
    run_dir = tmp_path / "runs/digits_offline-s0"
    kept = [sample["__key__"] for sample in read_split(run_dir / "selected", "train")]
    assert len(kept) == pytest.approx(1197 * 0.6, abs=1)
    assert sum(key in altered for key in kept) / len(kept) < 0.25
