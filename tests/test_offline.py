"""Offline scores are those of the look-ahead over a whole run; what is kept is what ranks best."""

import csv
import json
import math

import pytest
import torch
from problems import PROBLEMS, image_loss
from reference import clone
from small_datasets import make_small

from selectflow import Selector
from selectflow.audit import influence, record
from selectflow.data import DataError, read_manifest, read_split
from selectflow.offline import SampleScores, score_samples, write_scores, write_selected

MLP, CNN, TRANSFORMER = PROBLEMS
SIZE, NUM = 6, 8


def keyed(batch, step):
    """The batch, its examples named apart from those of other steps."""
    num = len(next(iter(batch.values())))
    return batch | {"key": [f"{step}-{position}" for position in range(num)]}


def setting(problem=MLP, num=NUM):
    """A model at its start, its optimizer, batches and target."""
    model, make = problem.make(torch.float64)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1)
    return model, optimizer, [keyed(make(SIZE), step) for step in range(num)], make(5)


def recorded(model, optimizer, batches, problem=MLP, **options):
    return record(*clone(model, optimizer), problem.loss_fn, batches, **options)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("curvature", ["exact", "fisher", "none"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_scores_predict_the_removals_of_the_audit(problem, curvature):
    """A removal gives the example's weight to the others; a score leaves theirs as they are."""
    model, optimizer, batches, target = setting(problem)
    options = {"max_grad_norm": 0.5, "spacing": 3}
    trajectory = recorded(model, optimizer, batches, problem, **options)
    scores = score_samples(trajectory, [target], curvature=curvature)
    assert scores.keys == [key for batch in batches for key in batch["key"]]
    each = scores.score.view(NUM, SIZE)
    predicted = (SIZE * each - each.sum(1, keepdim=True)) / (SIZE - 1)
    pairs = [(step, position) for step in range(NUM) for position in range(SIZE)]
    removed = influence(trajectory, target, pairs, curvature=curvature, reduce="mean")
    assert relative(predicted.view(-1, 1), removed) < 1e-9


@pytest.mark.parametrize("problem", [MLP, TRANSFORMER], ids=lambda problem: problem.name)
def test_online_scores_with_the_rest_of_the_run_as_horizon_are_the_offline_ones(problem):
    model, optimizer, batches, target = setting(problem)
    scores = score_samples(recorded(model, optimizer, batches, problem), [target])
    for step, batch in enumerate(batches):
        selector = Selector(
            model, optimizer, problem.loss_fn, [target], 1.0, NUM - step, derivative="exact"
        )
        selector.select(batch, batches[step + 1 :])
        offline = SIZE * scores.score[step * SIZE : (step + 1) * SIZE]
        assert relative(selector.last.scores, offline) < 1e-6
        optimizer.zero_grad()
        problem.loss_fn(model, batch).mean().backward()
        optimizer.step()


def test_a_score_is_the_slope_of_the_target_loss_in_a_samples_weight():
    """By really training with the sample a little heavier and lighter, wherever it occurs."""
    model, optimizer, batches, target = setting()
    run = [*batches[:3], *batches[:2], batches[0]]
    scores = score_samples(recorded(model, optimizer, run), [target])
    assert scores.occurrences.tolist() == [3] * SIZE + [2] * SIZE + [1] * SIZE

    def final_loss(key, change):
        twin, its = clone(model, optimizer)
        for batch in run:
            weight = [1 + change * (name == key) for name in batch["key"]]
            weight = torch.tensor(weight, dtype=torch.float64)
            its.zero_grad()
            (weight * image_loss(twin, batch)).mean().backward()
            its.step()
        return image_loss(twin, target).mean().item()

    for key in ("0-2", "1-0", "2-5"):
        slope = (final_loss(key, 1e-4) - final_loss(key, -1e-4)) / 2e-4
        assert float(scores.score[scores.keys.index(key)]) == pytest.approx(-slope, rel=1e-5)


def test_occurrences_add_up():
    """The same run with its second epoch under other names: the two scores have the same sum."""
    model, optimizer, batches, target = setting(num=4)
    other = [{**batch, "key": [f"again-{key}" for key in batch["key"]]} for batch in batches]
    joined = score_samples(recorded(model, optimizer, batches * 2), [target])
    apart = score_samples(recorded(model, optimizer, batches + other), [target])
    first, second = apart.score.view(2, -1)
    assert relative(joined.score, first + second) < 1e-12
    assert joined.keys == apart.keys[: 4 * SIZE]
    assert joined.occurrences.tolist() == [2] * 4 * SIZE


def test_the_target_loss_is_the_mean_over_all_examples_of_all_batches():
    model, optimizer, batches, target = setting()
    trajectory = recorded(model, optimizer, batches)
    parts = [
        {name: leaf[part] for name, leaf in target.items()} for part in (slice(2), slice(2, 5))
    ]
    whole, split = (score_samples(trajectory, each) for each in ([target], parts))
    assert relative(split.score, whole.score) < 1e-12


def test_neither_snapshots_nor_the_memory_limit_change_the_scores():
    model, optimizer, batches, target = setting()
    full = score_samples(recorded(model, optimizer, batches), [target])
    size = 4 * 8 * sum(p.numel() for p in model.parameters())
    sparse = recorded(model, optimizer, batches, spacing=100)
    tight = score_samples(sparse, [target], memory_gib=5.5 * size / 2**30)
    assert relative(tight.score, full.score) < 1e-9


def test_batches_without_keys_are_refused():
    model, optimizer, batches, target = setting()
    for spoilt, named in (
        ({name: batches[3][name] for name in ("image", "label")}, "dict"),
        (batches[3] | {"key": batches[3]["key"][:-1]}, "list"),
    ):
        trajectory = recorded(model, optimizer, [*batches[:3], spoilt])
        with pytest.raises(
            ValueError, match=rf"list 'key' .*got {named} at update 3; .*PoolStream"
        ):
            score_samples(trajectory, [target])
    with pytest.raises(ValueError, match="target must yield at least one batch, got none"):
        score_samples(recorded(model, optimizer, batches), [])


# --- ranking and files ------------------------------------------------------------------------


def scores_of(values):
    keys, score = [f"s{i}" for i in range(len(values))], torch.tensor(values, dtype=torch.float64)
    return SampleScores(keys, score, torch.ones(len(values), dtype=torch.int64))


def test_the_top_share():
    scores = scores_of([1.0, -2.0, 3.0, 1.0, 0.0])
    assert scores.top(0.4) == ["s2", "s0"]  # of equal scores the one met first
    assert scores.top(0.01) == ["s2"]
    assert scores.top(1.0) == ["s2", "s0", "s3", "s4", "s1"]
    for share in (0.0, 1.5, -1, math.nan):
        with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], got {share}; "):
            scores.top(share)


def test_the_score_file_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("selectflow.offline.find_spec", lambda name: None)
    scores = scores_of([0.1, -2 / 3, 1e-30])
    path = write_scores(tmp_path, scores, ["s0", "s2"])
    assert path.name == "scores.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["key"], row["kept"]) for row in rows] == [
        ("s0", "true"), ("s2", "true"), ("s1", "false"),
    ]  # fmt: skip
    assert [float(row["score"]) for row in rows] == [0.1, 1e-30, -2 / 3]
    assert {row["occurrences"] for row in rows} == {"1"}


def test_the_score_file_with_pyarrow(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = write_scores(tmp_path, scores_of([0.1, -2 / 3, 1e-30]), ["s0", "s2"])
    assert path.name == "scores.parquet"
    assert parquet.read_table(path).to_pydict() == {
        "key": ["s0", "s2", "s1"],
        "score": [0.1, 1e-30, -2 / 3],
        "occurrences": [1, 1, 1],
        "kept": [True, True, False],
    }


def stored(root):
    return {
        sample["__key__"]: (sample["npy"].tobytes(), sample["cls"], json.dumps(sample["json"]))
        for sample in read_split(root, "train")
    }


def test_the_shards_hold_the_top_samples_as_they_were_and_say_where_from(tmp_path):
    source = tmp_path / "source"
    made = make_small(source, count=10, per_shard=4)
    scores = scores_of([float(i % 4) for i in range(9)])  # s9 was never met
    root = write_selected(tmp_path, scores, 0.5, source, seed=3)
    before, after = stored(source), stored(root)
    assert list(after) == ["s2", "s3", "s6", "s7"]  # 4 of 9, in stored order
    assert all(before[key] == sample for key, sample in after.items())
    manifest = read_manifest(root)
    assert manifest.seed == 3
    assert manifest.fields == made.fields
    options = manifest.options
    assert (options["name"], options["split"], options["share"]) == ("subset", "train", 0.5)
    assert options["source"] == made.fingerprint()
    again = write_selected(tmp_path, scores, 0.5, source, seed=3)
    assert read_manifest(again) == manifest
    with pytest.raises(DataError, match=r"scores_sha256 must be '.*' as in the dataset"):
        write_selected(tmp_path, scores_of([0.0] * 9), 0.5, source, seed=3)


def test_a_source_without_a_kept_sample_is_refused_and_nothing_is_kept(tmp_path):
    make_small(tmp_path / "source", count=4)
    with pytest.raises(DataError, match=r"got 's4' and 1 others that are not; .*was scored"):
        write_selected(tmp_path, scores_of([0.0] * 6), 1.0, tmp_path / "source", seed=0)
    with pytest.raises(DataError, match="root must be a dataset directory"):
        read_manifest(tmp_path / "selected")
