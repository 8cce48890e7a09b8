"""Runs in which control switches selection on and off: ledger, metrics, replay, resumption."""

import functools

import numpy as np
import pytest
import torch
from test_resume import OPTIONS, Killed, assert_same, killed_at, outcome
from test_run import config, digits, read_lines, task

import selectflow.run.build
from selectflow import AutoHorizon
from selectflow.cli import main
from selectflow.control.ladder import HorizonRule
from selectflow.run.ledger import mean_scores, read_ledger, read_scored
from selectflow.run.log import read_decisions
from selectflow.run.loop import train

__all__ = ["digits"]  # the fixture

SELECT = {"horizon": "auto"}  # 8 of pools of 32
STEPS = 30


@pytest.fixture
def restless(monkeypatch):
    """A contest at every fourth step; each switches."""
    settings = AutoHorizon(
        largest=0,
        gap=4,
        longest_gap=4,
        contest_steps=2,
        share=1.0,
        early_share=1e6,
        late_share=1e6,
        costs={0: 1.0},
    )
    monkeypatch.setattr(selectflow.run.build, "build_horizon", lambda *_: settings)
    monkeypatch.setattr(
        HorizonRule,
        "_winner",
        lambda rule, cheap, dear, *_: (dear if rule.horizon == cheap else cheap, "in turn"),
    )


def made(tmp_path, **options):
    return config(tmp_path, **OPTIONS | {"select": SELECT, "steps": STEPS} | options)


@pytest.mark.usefixtures("restless")
def test_ledger_and_metrics_say_what_happened(digits, tmp_path):
    run_dir = train(made(tmp_path), task(digits))
    rows = read_ledger(run_dir)
    steps, scored = rows["step"].to_numpy(), rows["score"].is_valid().to_numpy()
    kept = rows["kept"].to_numpy()
    sizes = np.bincount(steps)[1:]
    on = np.bincount(steps, weights=scored)[1:] > 0
    assert set(sizes[on]) == {32}
    assert set(sizes[~on]) == {8}
    assert kept[~scored].all()
    assert set(np.bincount(steps, weights=kept)[1:][on]) == {8}
    assert 5 < on.sum() < STEPS - 5
    lines = read_lines(run_dir / "metrics.jsonl")
    assert lines[-1]["data/samples_seen"] == kept.sum()
    assert lines[-1]["data/samples_scored"] == 32 * on.sum()
    shares = [line["select/share_of_steps"] for line in lines[1:]]
    every = OPTIONS["eval_every"]
    assert shares == [
        pytest.approx(on[start : start + every].mean()) for start in range(0, STEPS, every)
    ]
    moved = [(made.before, made.after) for made in read_decisions(run_dir) if made.moved]
    assert moved[:2] == [("off", 0), (0, "off")]


@pytest.mark.usefixtures("restless")
def test_what_was_not_scored_has_no_part_in_scores(digits, tmp_path):
    run_dir = train(made(tmp_path), task(digits))
    rows = read_ledger(run_dir, ["key", "score"])
    scored = {key for key, score in zip(*rows.to_pydict().values(), strict=True) if score}
    assert set(mean_scores(run_dir).keys) == scored
    num = len(rows) - rows["score"].null_count
    assert sum(map(len, read_scored(run_dir))) == num < len(rows)
    assert main(["compare", str(run_dir), "--out", str(tmp_path / "report")]) == 0


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("pools_per_update", [1, 2])
@pytest.mark.parametrize("steps", [STEPS, 10])
def test_it_is_replayed(digits, tmp_path, steps, pools_per_update):
    select = SELECT | {"pools_per_update": pools_per_update}
    first = train(made(tmp_path, name="recorded", select=select, steps=steps), task(digits))
    replay = {"replay": first, "pools_per_update": pools_per_update}
    again = train(made(tmp_path, name="again", select=replay, steps=steps), task(digits))
    weights, others = outcome(first)[0], outcome(again)[0]
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    columns = ["step", "epoch", "key", "score", "kept"]
    assert read_ledger(again, columns).equals(read_ledger(first, columns))


@pytest.fixture(scope="module")
def wholes(digits, tmp_path_factory):
    """What selection, or its replay, selects and leads to, trained when it is asked for."""
    root = tmp_path_factory.mktemp("wholes")

    @functools.cache
    def whole(is_replay):
        select, name = SELECT, f"whole-{is_replay}"
        if is_replay:
            select = {"replay": train(made(root, name="recorded"), task(digits))}
        train(made(root, name=name, select=select), task(digits))
        return select, outcome(root / name)

    return whole


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("at", [3, 9, 14, 21, 26])
@pytest.mark.parametrize("is_replay", [False, True])
def test_killed_it_resumes_to_the_same_end(digits, tmp_path, wholes, at, is_replay):
    """Checkpoints come in the middle of pools, too."""
    select, expected = wholes(is_replay)
    killed = made(tmp_path, name="killed", select=select)
    with pytest.raises(Killed):
        train(killed, killed_at(at, task(digits)))
    train(killed, task(digits))
    assert_same(expected, outcome(tmp_path / "killed"))
