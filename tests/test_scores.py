"""Ranked samples, of offline scores or of a ledger, and the shards made of the best."""

import json
import math
import shutil

import fsspec
import pyarrow.parquet
import pytest
import torch
from small_datasets import make_small
from test_run import config, digits, task

from selectflow.cli import main
from selectflow.data import DataError, PoolStream, read_manifest, read_split
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import train
from selectflow.run.scores import (
    SampleScores,
    kept_keys,
    mean_scores,
    write_scores,
    write_selected,
)

__all__ = ["digits"]  # the fixture


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
