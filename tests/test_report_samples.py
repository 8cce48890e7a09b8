"""What runs selected, read from their ledgers."""

import math

import numpy as np
import pytest
import torch
from synthetic_runs import POOLS, make_run, write_ledger

from selectflow.offline.score import SampleScores
from selectflow.report.figures import domains
from selectflow.report.samples import EDGES, examine, read_selected
from selectflow.run.offline import write_scores


def test_scores_are_averaged_in_units_of_their_pools(tmp_path):
    write_ledger(tmp_path, POOLS)
    found = read_selected(tmp_path, {})
    # first pool: mean 3, sd sqrt(14 / 3); second: mean 200, sd sqrt(20000 / 3)
    sd, sd2 = math.sqrt(14 / 3), math.sqrt(20000 / 3)
    expected = {
        "a": ((-2 / sd + 100 / sd2) / 2, 2, 1),
        "b": ((-1 / sd - 100 / sd2) / 2, 2, 1),
        "c": (3 / sd, 1, 1),
        "d": (0.0, 1, 1),
    }
    ranked = found.ranked.to_pylist()
    assert [sample["key"] for sample in ranked] == ["c", "a", "d", "b"]
    for sample in ranked:
        score, times, kept = expected[sample["key"]]
        assert sample["score"] == pytest.approx(score), sample
        assert (sample["times"], sample["kept"]) == (times, kept), sample
    assert {name: int(counts.sum()) for name, counts in found.histograms.items()} == {
        "kept": 4,
        "rejected": 2,
    }


def test_histograms_tell_altered_from_clean_and_count_what_lies_beyond(tmp_path):
    pool = {str(i): 0.0 for i in range(99)} | {"far": 1000.0}  # 9.9 standard deviations away
    write_ledger(tmp_path, [pool])
    made = {key: {"altered": key in ("0", "far")} for key in pool}
    found = read_selected(tmp_path, made).histograms
    assert (int(found["altered"].sum()), int(found["clean"].sum())) == (2, 98)
    assert found["altered"][-1] == 1
    bin_of_rest = np.searchsorted(EDGES, -10 / math.sqrt(9900), side="right") - 1
    assert found["clean"][bin_of_rest] == 98


def test_domains_are_shares_of_the_kept_over_steps(tmp_path):
    write_ledger(tmp_path, POOLS)  # kept: b, c; then a, d
    made = {key: {"domain": "code" if key in "abc" else "prose"} for key in "abcd"}
    found = read_selected(tmp_path, made)
    assert found.domains["code"] == [(1, 1.0), (2, 0.5)]
    assert found.domains["prose"] == [(1, 0.0), (2, 0.5)]
    drawn = {panel.title: panel for panel in domains({"loss": found}, ["uniform", "loss"])}
    line = drawn["domain code among the kept"].lines[0]
    assert (line.place, line.curve.mean.tolist()) == (1, [100, 50])


def test_a_run_without_a_ledger_has_selected_nothing_known(tmp_path):
    assert read_selected(tmp_path, {}) is None


def test_offline_selection_is_read_from_its_scores(tmp_path):
    scores = SampleScores(["a", "b"], torch.tensor([1.0, 3.0]), torch.tensor([1, 1]))
    (tmp_path / "selected").mkdir()
    write_scores(tmp_path / "selected", scores, ["b"])
    found = read_selected(tmp_path, {})
    assert found.ranked.to_pylist() == [
        {"key": "b", "score": 1.0, "times": 1, "kept": 1},
        {"key": "a", "score": -1.0, "times": 1, "kept": 0},
    ]


def test_a_run_whose_data_are_gone_is_shown_without_samples(tmp_path):
    data = {"name": "digits", "root": str(tmp_path / "gone"), "label_noise": 0.4}
    run = make_run(tmp_path / "run", [0.5], data=data)
    write_ledger(run.folder, POOLS)
    found = examine("online", run)
    assert len(found.selected.ranked) == 4
    assert (found.best, found.worst) == ([], [])
    assert "samples are not shown: root must be a dataset directory" in found.note


def test_the_ledger_of_a_run_is_summed_as_a_slow_loop_sums_it(tmp_path):
    """Over several parts of the ledger, with samples and domains that come and go."""
    generator = np.random.default_rng(0)
    pools = [
        {f"k{n}": 10.0**step * generator.normal() for n in generator.permutation(90)[:8]}
        for step in range(-45, 45)
    ]
    for place, part in enumerate((pools[:50], pools[50:])):
        write_ledger(tmp_path, part, first=1 + 50 * place)
    made = {f"k{n}": {"altered": n % 3 == 0} | ({"domain": "ab"[n % 2]} if n > 9 else {})
            for n in range(80)}  # fmt: skip
    found = read_selected(tmp_path, made)
    scores, times, kept = {}, {}, {}
    kinds = dict.fromkeys(("kept", "rejected", "altered", "clean"), 0)
    shares = []
    for step, pool in enumerate(pools, 1):
        values = np.array(list(pool.values()))
        best = set(sorted(pool, key=pool.get)[-2:])
        for key, z in zip(pool, (values - values.mean()) / values.std(), strict=True):
            scores.setdefault(key, []).append(z)
            times[key], kept[key] = times.get(key, 0) + 1, kept.get(key, 0) + (key in best)
            altered = made.get(key, {}).get("altered", False)
            for kind in ("kept" if key in best else "rejected", "altered" if altered else "clean"):
                kinds[kind] += 1
        if domains_kept := [made[key]["domain"] for key in best if "domain" in made.get(key, {})]:
            shares.append((step, domains_kept))
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    ranked = found.ranked.to_pylist()
    assert [row["key"] for row in ranked] == sorted(means, key=lambda key: (-means[key], key))
    for row in ranked:
        assert row["score"] == pytest.approx(means[row["key"]], rel=1e-9)
        assert (row["times"], row["kept"]) == (times[row["key"]], kept[row["key"]])
    assert {kind: int(counts.sum()) for kind, counts in found.histograms.items()} == kinds
    size = -(-len(shares) // 40)
    for name in "ab":
        expected = []
        for start in range(0, len(shares), size):
            part = shares[start : start + size]
            of = [domain for _, each in part for domain in each]
            middle = sum(step for step, _ in part) / len(part)
            expected.append((middle, of.count(name) / len(of)))
        assert found.domains[name] == [pytest.approx(point) for point in expected]
