"""A run with an infinite horizon, and chosen samples as shards, of offline scores or a ledger."""

import json
import math
import shutil
from dataclasses import replace

import fsspec
import pyarrow.parquet
import pytest
import torch
from small_datasets import make_small
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import ROOT, config, digits, loss_fn, read_lines, run_trainer, task

from selectflow.cli import main
from selectflow.data import DataError, PoolStream, read_manifest, read_metadata, read_split
from selectflow.offline.record import record
from selectflow.offline.score import SampleScores, score_samples
from selectflow.run.build import build_optimizer
from selectflow.run.ledger import kept_keys, mean_scores, read_ledger
from selectflow.run.loop import RunError, train
from selectflow.run.offline import write_scores, write_selected
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


# --- chosen samples as a dataset --------------------------------------------------------------


def scores_of(values):
    keys, score = [f"s{i}" for i in range(len(values))], torch.tensor(values, dtype=torch.float64)
    return SampleScores(keys, score, torch.ones(len(values), dtype=torch.int64))


def stored(root, split="train"):
    return {
        sample["__key__"]: (sample["npy"].tobytes(), sample["cls"], json.dumps(sample["json"]))
        for sample in read_split(root, split)
    }


def test_the_top_share():
    scores = scores_of([1.0, -2.0, 3.0, 1.0, 0.0])
    assert scores.top(0.4) == ["s2", "s0"]  # of equal scores the one met first
    assert scores.top(0.01) == ["s2"]
    assert scores.top(1.0) == ["s2", "s0", "s3", "s4", "s1"]
    for share in (0.0, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}; "):
            scores.top(share)


def test_the_score_file(tmp_path):
    path = write_scores(tmp_path, scores_of([0.1, -2 / 3, 1e-30]), ["s0", "s2"])
    assert path.name == "scores.parquet"
    assert pyarrow.parquet.read_table(path).to_pydict() == {
        "key": ["s0", "s2", "s1"],
        "score": [0.1, 1e-30, -2 / 3],
        "occurrences": [1, 1, 1],
        "kept": [True, True, False],
    }


def test_the_shards_hold_the_chosen_samples_as_they_were_and_say_where_from(tmp_path):
    source, root = tmp_path / "source", tmp_path / "selected"
    made = make_small(source, count=10, per_shard=4)
    scores = scores_of([float(i % 4) for i in range(9)])  # s9 was never met
    arguments = {"source": source, "made_from": {"share": 0.5}, "seed": 3}
    manifest = write_selected(root, scores, scores.top(0.5), **arguments)
    before, after = stored(source), stored(root)
    assert list(after) == ["s2", "s3", "s6", "s7"]  # 4 of 9, in stored order
    assert all(before[key] == sample for key, sample in after.items())
    assert manifest == read_manifest(root)
    assert (manifest.seed, manifest.fields) == (3, made.fields)
    options = manifest.options
    assert (options["name"], options["split"], options["share"]) == ("subset", "train", 0.5)
    assert options["source"] == made.fingerprint()
    table = pyarrow.parquet.read_table(root / "scores.parquet")
    assert set(table.filter(table["kept"])["key"].to_pylist()) == set(after)
    assert write_selected(root, scores, scores.top(0.5), **arguments) == manifest
    other = scores_of([0.0] * 9)
    with pytest.raises(DataError, match=r"scores_sha256 must be '.*' as in the dataset"):
        write_selected(root, other, other.top(0.5), **arguments)


def test_a_source_without_a_kept_sample_is_refused_and_nothing_is_kept(tmp_path):
    make_small(tmp_path / "source", count=4)
    root, scores = tmp_path / "selected", scores_of([0.0] * 6)
    with pytest.raises(DataError, match=r"got 's4' and 1 others that are not; .*was scored"):
        write_selected(root, scores, scores.keys, tmp_path / "source", {}, seed=0)
    with pytest.raises(DataError, match="root must be a dataset directory"):
        read_manifest(root)


# --- of a ledger ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    """A run of 60 steps over pools of 32: some 1.6 epochs."""
    root = tmp_path_factory.mktemp("runs")
    values = {"data": {"name": "shards", "root": digits}, "steps": 60, "eval_every": 20}
    return train(config(root, **values), task(digits))


def test_mean_scores_and_kept_keys_are_those_of_a_slow_loop_over_the_ledger(run_dir):
    rows = read_ledger(run_dir).to_pylist()
    keys = list(dict.fromkeys(row["key"] for row in rows))
    scores = mean_scores(run_dir)
    assert scores.keys == keys
    for key, score, occurrences in zip(
        keys, scores.score.tolist(), scores.occurrences.tolist(), strict=True
    ):
        values = [row["score"] for row in rows if row["key"] == key]
        assert len(values) == occurrences
        assert score == pytest.approx(sum(values) / len(values), rel=1e-12)
    assert set(scores.occurrences.tolist()) == {1, 2}
    assert kept_keys(run_dir) == list(dict.fromkeys(row["key"] for row in rows if row["kept"]))


@pytest.mark.parametrize("top", [None, 0.25])
def test_write_shards(run_dir, digits, tmp_path, capsys, top):
    arguments = ["select", "write-shards", str(run_dir), "--out", str(tmp_path / "new")]
    arguments += ["--per-shard", "100"] + (["--top", str(top)] if top else [])
    assert main(arguments) == 0
    scores = mean_scores(run_dir)
    expected = scores.top(top) if top else kept_keys(run_dir)
    before, after = stored(digits), stored(tmp_path / "new")
    assert list(after) == [key for key in before if key in set(expected)]
    assert all(before[key] == sample for key, sample in after.items())
    for split in ("target", "test"):  # so that it can be trained on as it is
        assert stored(tmp_path / "new", split) == stored(digits, split)
    manifest = read_manifest(tmp_path / "new")
    options = manifest.options
    assert options["source"] == read_manifest(digits).fingerprint()
    assert (options["run"], options["steps"], options["per_shard"]) == ("trial", 60, 100)
    assert options.get("share") == top
    assert options["chosen"] == ("top" if top else "kept")
    assert f"train {len(expected)}, " in capsys.readouterr().out
    made = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert main(arguments) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == made


def test_write_shards_refuses_another_dataset_and_finds_one_that_moved(
    run_dir, digits, tmp_path, capsys
):
    make_small(tmp_path / "other")
    arguments = ["select", "write-shards", str(run_dir), "--out", str(tmp_path / "new")]
    assert main([*arguments, "--source", str(tmp_path / "other")]) == 2
    assert "source must be the dataset of the run, with fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    shutil.copytree(digits, tmp_path / "moved")
    assert main([*arguments, "--source", str(tmp_path / "moved")]) == 0
    with pytest.raises(SystemExit):
        main([*arguments, "--top", "1.5"])
    assert "argument --top: must be in (0, 1], got '1.5'" in capsys.readouterr().err


def test_write_shards_of_a_folder_without_a_manifest(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SELECTFLOW_CACHE", str(tmp_path / "cache"))
    root, out = tmp_path / "folder", tmp_path / "new"
    shutil.copytree(digits, root, ignore=lambda *_: ["manifest.json"])
    values = {"data": {"name": "shards", "root": root, "pool": 16}, "steps": 3}
    run_dir = train(config(tmp_path, **values), task(digits, PoolStream(root, pool=16, seed=0)))
    assert main(["select", "write-shards", str(run_dir), "--out", str(out)]) == 0
    assert list(stored(out)) == [key for key in stored(digits) if key in kept_keys(run_dir)]
    assert stored(out, "test") == stored(digits, "test")


def test_write_shards_of_a_dataset_that_is_remote(run_dir, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTFLOW_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    for path in digits.iterdir():
        files.pipe_file(f"/selected/{path.name}", path.read_bytes())
    arguments = ["select", "write-shards", str(run_dir)]
    source = ["--source", "memory://selected"]
    assert main([*arguments, "--out", str(tmp_path / "remote"), *source]) == 0
    assert main([*arguments, "--out", str(tmp_path / "local")]) == 0
    assert read_manifest(tmp_path / "remote") == read_manifest(tmp_path / "local")
    files.rm("/selected", recursive=True)


def test_write_shards_of_a_directory_without_a_ledger(tmp_path, capsys):
    assert main(["select", "write-shards", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "error: run must have a ledger, got" in capsys.readouterr().err


def test_what_was_written_can_be_trained_on(run_dir, tmp_path):
    arguments = ["select", "write-shards", str(run_dir), "--out", str(tmp_path / "new")]
    assert main(arguments) == 0
    again = train(config(tmp_path, steps=2, eval_every=2), task(tmp_path / "new"))
    assert set(read_ledger(again)["key"].to_pylist()) <= set(kept_keys(run_dir))
