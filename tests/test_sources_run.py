"""Runs whose pools come from several sources: live shares resumed, replayed, logged and drawn."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from test_resume import OPTIONS, Killed, assert_same, killed_at, ledger_files, outcome
from test_run import config, digits, read_lines, task

from selectflow.cli import main
from selectflow.data import AutoShares, PoolStream, find_splits, make_digits
from selectflow.report import figures
from selectflow.report.compare import summarize
from selectflow.report.runs import load_run
from selectflow.run.config import ConfigError, load
from selectflow.run.ledger import read_ledger
from selectflow.run.log import read_decisions
from selectflow.run.loop import RunError, train

__all__ = ["digits"]  # the fixture

ROOT = Path(__file__).parents[1]
BY = "json.altered"  # two sources, one of wrong labels alone


def mixed(root, **options):
    """The task with live shares that soon move."""
    shares = AutoShares(delay=6, memory=20, prior=16)
    return task(root, PoolStream(root, pool=32, seed=0, by=BY, shares=shares, **options))


@pytest.mark.parametrize("select", [{"horizon": 0}, {"horizon": 3, "interval": 2}])
@pytest.mark.parametrize("at", [4, 11])
def test_a_killed_run_resumes_to_the_same_end(digits, tmp_path, select, at):
    """Also the shares of what a look-ahead had peeked at."""
    train(config(tmp_path, name="whole", select=select, **OPTIONS), mixed(digits))
    killed = config(tmp_path, name="killed", select=select, **OPTIONS)
    with pytest.raises(Killed):
        train(killed, killed_at(at, mixed(digits)))
    train(killed, mixed(digits, num_workers=2, memory_gib=0))
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "killed"))
    shares = [line["data/share/True"] for line in read_lines(tmp_path / "whole/metrics.jsonl")]
    assert shares[0] > 2 * shares[-1]


def run_of_a_rank(digits, folder, name, at=None):
    """Train in all processes, which are killed at a step; the shares at the end."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    made = mixed(digits, rank=rank, world_size=size)
    options = config(folder, name=name, select={"horizon": 2, "interval": 2}, **OPTIONS)
    try:
        train(options, made if at is None else killed_at(at, made))
    except Killed:
        torch.distributed.barrier()
    return made.pools.shares


@pytest.mark.slow
def test_two_processes_resume_with_one_share(digits, tmp_path, two):
    whole = two.run(run_of_a_rank, digits, tmp_path, "whole")
    two.run(run_of_a_rank, digits, tmp_path, "killed", 11)
    killed = two.run(run_of_a_rank, digits, tmp_path, "killed")
    assert whole[0] == whole[1] == killed[0] == killed[1]
    assert ledger_files(tmp_path / "whole") == ledger_files(tmp_path / "killed")
    first, again = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    for line, other in zip(first, again, strict=True):
        kept = [key for key in line if not key.startswith("perf/")]
        assert {key: line[key] for key in kept} == {key: other[key] for key in kept}
    assert first[0]["data/share/True"] > 2 * first[-1]["data/share/True"]


@pytest.mark.parametrize(
    "select", [{"horizon": 3, "interval": 2}, {"strategy": "uniform"}], ids=["ahead", "uniform"]
)
def test_a_replay_has_the_shares_of_the_recorded_run(digits, tmp_path, select):
    options = {"steps": 20, "eval_every": 5}
    train(config(tmp_path, name="first", select=select, **options), mixed(digits))
    for name, of in (("second", "first"), ("third", "second")):
        train(config(tmp_path, name=name, select={"replay": tmp_path / of}, **options),
              mixed(digits))  # fmt: skip
    first, third = outcome(tmp_path / "first"), outcome(tmp_path / "third")
    assert all(torch.equal(first[0][name], third[0][name]) for name in first[0])
    shares = [line["data/share/True"] for line in third[2]]
    assert shares == [line["data/share/True"] for line in first[2]]
    assert (len(set(shares)) == 1) is ("strategy" in select)


def test_metrics_ledger_and_decisions_say_what_became_of_each_source(digits, tmp_path):
    run_dir = train(config(tmp_path, steps=20, eval_every=10), mixed(digits))
    rows = read_ledger(run_dir, ["step", "key", "kept", "source"]).to_pylist()
    lines = read_lines(run_dir / "metrics.jsonl")
    altered = mixed(digits).kinds["altered"]
    assert all(row["source"] == str(row["key"] in altered) for row in rows)
    of = [row["kept"] for row in rows if row["step"] > 10 and row["source"] == "True"]
    assert lines[-1]["select/source_kept/True"] == pytest.approx(sum(of) / len(of), rel=1e-12)
    shares = [line["data/share/True"] for line in lines]
    assert shares[0] == pytest.approx(479 / 1197)
    made = list(read_decisions(run_dir))
    assert [(each.step, each.what) for each in made] == [(10, "share"), (20, "share")]
    assert [each.before for each in made] == pytest.approx([1 - x for x in shares[:2]])
    assert [each.after for each in made] == pytest.approx([1 - x for x in shares[1:]])
    part = lines[1]["select/source_kept/False"]
    why = f"of all sources, False rose most: {part:.1%} of its candidates were kept"
    assert made[0].reason == why


def test_shares_and_kept_parts_are_drawn(digits, tmp_path):
    run_dir = train(config(tmp_path, steps=6, eval_every=2), mixed(digits))
    panels = figures.sources(summarize([load_run(run_dir)]))
    assert [panel.title for panel in panels] == [
        "share of source False", "kept of source False",
        "share of source True", "kept of source True",
    ]  # fmt: skip
    last = read_lines(run_dir / "metrics.jsonl")[-1]
    assert panels[2].lines[0].curve.mean[-1] == pytest.approx(100 * last["data/share/True"])


# --- the trainers and their configuration ---------------------------------------------------------


@pytest.fixture(scope="module")
def vision():
    """The exit status of the vision trainer, executed with a configuration."""
    run = runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"]

    def execute(folder, **values):
        path = folder / "run.yaml"
        default = {
            "name": "run", "root": str(folder), "device": "cpu", "steps": 12, "eval_every": 6,
            "select": {"keep": 8, "horizon": 0},
        }  # fmt: skip
        path.write_text(json.dumps(default | values))
        return run([str(path)])

    return execute


def test_sources_of_a_configuration(tmp_path, vision):
    for noise in (0.0, 0.8):
        make_digits(tmp_path / f"d{noise:g}", label_noise=noise)
    sources = {"good": str(tmp_path / "d0"), "bad": str(tmp_path / "d0.8")}
    data = {
        "name": "shards", "root": str(tmp_path / "d0"), "pool": 32, "sources": sources,
        "shares": "auto", "live_shares": {"delay": 2},
    }  # fmt: skip
    assert vision(tmp_path, data=data) == 0
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["data/share/good"] > 0.5 > last["data/share/bad"]
    assert last["select/kept_altered"] < 0.4  # of keys with the name of their source
    kept = read_ledger(tmp_path / "run", ["key", "kept"]).to_pylist()
    assert (
        main(["select", "write-shards", str(tmp_path / "run"), "--out", str(tmp_path / "k")]) == 0
    )
    stream = PoolStream(tmp_path / "k", pool=1, seed=0)
    assert stream.num_samples == len({row["key"] for row in kept if row["kept"]})
    assert find_splits(tmp_path / "k") == ["train"]


def test_offline_selection_takes_fixed_shares_alone(tmp_path, vision, capsys):
    data = {"root": str(tmp_path / "d"), "by": BY, "pool": 32, "label_noise": 0.4}
    select = {"keep": 16, "horizon": math.inf, "record_steps": 4}
    text = json.dumps({"name": "x", "data": data | {"shares": "auto"}, "select": {"keep": 16}})
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"data.shares must be fixed when select.horizon is .inf"):
        load(tmp_path / "x.yaml", ["select.horizon=.inf"])
    data["shares"] = {"False": 3, "True": 1}
    (tmp_path / "x.yaml").write_text(
        json.dumps({"name": "run", "root": str(tmp_path), "data": data, "steps": 6,
                    "device": "cpu", "select": select}).replace("Infinity", "1.0e+400")
    )  # fmt: skip
    assert runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"](
        [str(tmp_path / "x.yaml"), "select.horizon=.inf"]
    ) == 0, capsys.readouterr().err  # fmt: skip
    found = json.loads((tmp_path / "run" / "offline.json").read_text())
    assert found["samples_kept"] > 0


def test_a_look_ahead_beyond_the_delay_is_refused_before_the_first_step(digits, tmp_path):
    select = {"horizon": 8}  # peeks at 7 pools
    with pytest.raises(RunError, match="the 7 pools that a look-ahead peeks at, got room for 6"):
        train(config(tmp_path, select=select), mixed(digits))


def test_a_run_ends_where_its_sources_do(tmp_path, vision):
    data = {"root": str(tmp_path / "d"), "pool": 100, "max_epochs": 1}
    assert vision(tmp_path, data=data, steps=100) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 11)  # of 1197 samples


def test_shards_ls_lists_sources(digits, tmp_path, capsys):
    assert main(["shards", "ls", str(digits), "--by", BY]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["source", "shards", "samples", "share"]
    assert [line.split() for line in rest] == [
        ["False", "5", "718", "59.98%"], ["True", "5", "479", "40.02%"]
    ]  # fmt: skip
    assert main(["shards", "ls", f"a={digits}", f"b={digits}", "--split", "test"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["b", "2", "400", "50.00%"]
    with pytest.raises(SystemExit):
        main(["shards", "ls", str(digits), str(digits)])
    assert "must be NAME=ROOT where there are several" in capsys.readouterr().err
