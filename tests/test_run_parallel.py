"""Our own loop in several processes: what is trained, logged, saved, resumed and refused.

torchrun is started a few times for all tests of this file; `parallel_worker.py` is what it runs.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import parallel_worker as worker
import pytest
import torch
from filelock import FileLock
from test_resume import ledger_files
from torch import nn

from selectflow.core.batches import take
from selectflow.data import PoolStream, read_batches
from selectflow.distributed import ALONE, Group
from selectflow.models.language import untrained_lm, with_lora
from selectflow.run.build import resolve_device
from selectflow.run.ledger import read_ledger
from selectflow.run.parallel import evaluation_share
from selectflow.run.replay import ReplayError
from selectflow.run.spread import repeated_blocks
from selectflow.run.target import divided
from selectflow.run.task import RunError

PROGRAM = Path(worker.__file__)
both = pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])


def torchrun(folder, *cases, processes=2, **environment):
    """Run cases; the exit status and what was printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launcher, str(PROGRAM), str(folder), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All cases, run once for all of pytest's workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "parallel"
    with FileLock(shared / "parallel.lock"):
        if not (folder / "said").exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            (folder / "said").write_text(run_cases(folder))
    return folder


def run_cases(folder):
    """Those of one and of three processes first, which two then go on with: what they printed."""
    worker.make_data(folder)
    for parallel in ("ddp", "fsdp2"):
        config = worker.config_of(folder, f"from-one-{parallel}", parallel=parallel, resume="auto")
        worker.trained(folder, config, stop_at=5)
    with ThreadPoolExecutor() as at_once:
        killed = at_once.submit(torchrun, folder, "killed")
        begun = at_once.submit(torchrun, folder, "begun", processes=3)
    status, said = begun.result()
    assert status == 0, said
    status, said = killed.result()
    assert status != 0
    assert "SIGKILL" in said
    cases = (
        "whole", "resumed", "several", "mixed", "scored", "replayed", "refused", "unequal",
        "damaged", "not_finite", "changed", "shortened", "revived",
    )  # fmt: skip
    status, said = torchrun(folder, *cases)
    assert status == 0, said
    return said


def found(folder, case, rank=0):
    return torch.load(folder / f"{case}-rank{rank}.pt")


def difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def metrics_of(folder, name):
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def reference(folder, name, mixed=None, model=None):
    """One process that trains a model on what the ledger says was kept: weights, each step's loss.

    Beside it on what `mixed` has for a step, counted from 0.

    The gradient is that of the mean loss over all that was kept, whoever had it.
    """
    table = read_ledger(folder / name).to_pylist()
    torch.manual_seed(0)
    model = model or worker.Blocks()
    config = worker.config_of(folder, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)
    (samples,) = islice(PoolStream(worker.digits(folder), pool=1197, seed=0), 1)
    place = {key: index for index, key in enumerate(samples["key"])}
    losses = []
    for step in range(1, 1 + max(row["step"] for row in table)):
        rows = [row for row in table if row["step"] == step]
        pools = [rows[at : at + worker.POOL] for at in range(0, len(rows), worker.POOL)]
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        others = worker.loss_fn(model, mixed(step - 1)) if mixed else torch.zeros(0)
        num = worker.KEEP * len(pools) + len(others)
        if mixed:
            (others.sum() / num).backward()
            total += others.detach().sum() / num
        for pool in pools:
            kept = torch.tensor([place[row["key"]] for row in pool if row["kept"]])
            if len(kept):  # of the best of all pools, none may be of this one
                loss = worker.loss_fn(model, take(samples, kept)).sum() / num
                loss.backward()
                total += loss.detach()
        assert sum(row["kept"] for row in rows) == worker.KEEP * len(pools)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(float(total))
    return {name: param.detach() for name, param in model.named_parameters()}, losses


# --- training -------------------------------------------------------------------------------------

RUNS = [name for name, *_ in worker.RUNS]


@pytest.mark.parametrize("name", RUNS)
def test_processes_train_as_one_on_the_mean_of_their_gradients(folder, name):
    weights, losses = reference(folder, name)
    for rank in (0, 1):
        trained = found(folder, "whole", rank)[name]
        assert trained.keys() == weights.keys()
        assert difference(trained, weights) < 1e-10
    assert difference(*(found(folder, "whole", rank)[name] for rank in (0, 1))) == 0
    lines = metrics_of(folder, name)
    assert [line["train/step"] for line in lines] == [0, 4, 8, 9]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 9))]
    assert [line["train/loss"] for line in lines[1:]] == pytest.approx(means, abs=1e-10)


@pytest.mark.parametrize("name", RUNS)
def test_evaluation_is_over_all_examples_whoever_has_them(folder, name):
    model = worker.Blocks()
    model.load_state_dict(found(folder, "whole")[name])
    last = metrics_of(folder, name)[-1]
    for split, size in (("target", worker.TARGET_BATCH), ("test", worker.TEST_BATCH)):
        batches = read_batches(worker.digits(folder), split, size)
        with torch.no_grad():
            expected = worker.evaluate(model, batches)["loss"]
        assert last[f"{split}/loss"] == pytest.approx(expected, abs=1e-12)
    assert last["data/samples_seen"] == 2 * worker.STEPS * worker.KEEP


@pytest.mark.parametrize("name", RUNS)
def test_the_trained_model_is_saved_whole(folder, name):
    saved = torch.load(folder / name / "model/weights.pt")
    expected = found(folder, "whole")[name]
    assert saved.keys() == expected.keys()
    assert difference(saved, expected) == 0


def test_shards_train_as_whole_parameters_do(folder):
    runs = found(folder, "whole")
    assert difference(runs["uniform-ddp"], runs["uniform-fsdp2"]) < 1e-10


@both
def test_micro_batches_and_pools_of_an_update_are_one_batch(folder, parallel):
    weights, _ = reference(folder, f"s-{parallel}")
    assert difference(found(folder, "several")[parallel], weights) < 1e-10


@both
def test_what_is_mixed_in_is_shared_by_the_processes(folder, parallel):
    size = {"data": {"target_share": 0.25, "pool": 2 * worker.POOL}}
    alone = worker.config_of(folder, "alone", {"keep": 2 * worker.KEEP}, **size)
    _, mixed = divided(alone, worker.task_of(folder), ALONE, torch.device("cpu"))
    weights, losses = reference(folder, f"mixed-{parallel}", mixed.at)
    assert difference(found(folder, "mixed")[parallel], weights) < 1e-10
    last = metrics_of(folder, f"mixed-{parallel}")[-1]
    assert last["train/loss"] == pytest.approx(losses[-1], abs=1e-10)
    assert last["data/target_samples_seen"] == worker.STEPS * 4


@both
def test_a_scorer_learns_beside_the_model_and_goes_on_bit_for_bit(folder, parallel):
    name = f"scored-{parallel}-whole"
    expected = [reference(folder, name, model=model)[0] for model in (None, worker.small())]
    for rank in (0, 1):
        runs = found(folder, "scored", rank)
        for trained, again, weights in zip(
            runs[name], runs[f"scored-{parallel}-die_at"], expected, strict=True
        ):
            assert difference(trained, weights) < 1e-10
            assert difference(trained, again) == 0
    assert same_records(folder, name, f"scored-{parallel}-die_at")
    assert all(line["select/scorer_loss"] > 0 for line in metrics_of(folder, name)[1:])


def test_what_is_printed_is_printed_once(folder):
    said = (folder / "said").read_text()
    assert said.count("uniform-ddp 9/9") == 1


def test_the_ledger_has_the_pools_of_all_ranks_in_order(folder):
    table = read_ledger(folder / "uniform-ddp")
    whole = PoolStream(worker.digits(folder), pool=2 * worker.POOL, seed=0)
    pools = list(islice(whole, worker.STEPS))
    assert table["key"].to_pylist() == [key for pool in pools for key in pool["key"]]
    assert table["epoch"].to_pylist() == [epoch for pool in pools for epoch in pool["epoch"]]
    steps = [step for step in range(1, worker.STEPS + 1) for _ in range(2 * worker.POOL)]
    assert table["step"].to_pylist() == steps


def test_a_run_is_replayed_in_as_many_processes(folder):
    assert difference(found(folder, "replayed"), found(folder, "whole")["uniform-ddp"]) == 0
    config = worker.config_of(folder, "alone-again", {"replay": folder / "uniform-ddp"})
    with pytest.raises(ReplayError, match=r"as many processes as .*uniform-ddp, 2, got 1"):
        worker.trained(folder, config)


# --- going on -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("strategy", worker.RESUMED)
def test_a_run_that_ended_goes_on_bit_for_bit(folder, strategy, parallel):
    """With dropout and batch norm; a signal to one process stops both after the same step."""
    for rank in (0, 1):
        runs, name = found(folder, "resumed", rank), f"{strategy}-{parallel}"
        assert difference(runs[f"{name}-whole"], runs[f"{name}-ended"]) == 0
        assert "norm.running_mean" in runs[f"{name}-whole"]
    assert same_records(folder, f"{name}-whole", f"{name}-ended")


def same_records(folder, first, second):
    """Whether metrics without times, and the ledger byte by byte, are the same."""
    metrics = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
        for lines in (metrics_of(folder, first), metrics_of(folder, second))
    ]
    files = [ledger_files(folder / name) for name in (first, second)]
    return metrics[0] == metrics[1] and files[0] == files[1] and len(files[0]) == 2


def test_a_run_of_which_one_process_was_killed_goes_on_bit_for_bit(folder):
    for rank in (0, 1):
        revived = found(folder, "revived", rank)
        assert difference(revived, found(folder, "whole", rank)["uniform-ddp"]) == 0
    assert same_records(folder, "killed", "uniform-ddp")


@both
@pytest.mark.parametrize("before", ["from-one", "from-three"])
def test_a_run_goes_on_in_another_number_of_processes(folder, before, parallel):
    """No sample of the epoch is lost or comes twice; the updates are those of one process."""
    name, num = f"{before}-{parallel}", {"from-one": 1, "from-three": 3}[before]
    (said,) = found(folder, "changed")[f"{name}-said"]
    assert f"resumed in 2 processes ({parallel}) what {num} " in said
    assert ("selector" in said) == (parallel == "fsdp2")
    check_order(folder, name, [num] * 5 + [2] * 4)
    weights, _ = reference(folder, name)
    assert difference(found(folder, "changed")[name], weights) < 1e-10


@both
def test_a_run_goes_on_in_one_process(folder, parallel):
    name = f"to-one-{parallel}"
    config = worker.config_of(folder, name, parallel=parallel, resume="auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = worker.trained(folder, config)
    assert any("resumed in 1 processes (alone) what 2" in str(each.message) for each in caught)
    check_order(folder, name, [2] * 5 + [1] * 4)
    weights, _ = reference(folder, name)
    assert difference(trained, weights) < 1e-10


def check_order(folder, name, numbers):
    """The pools are those of the one order; numbers of processes are those of each step."""
    table = read_ledger(folder / name)
    sizes = [number * worker.POOL for number in numbers]
    assert table["step"].to_pylist() == [i for i, n in enumerate(sizes, start=1) for _ in range(n)]
    (whole,) = islice(PoolStream(worker.digits(folder), pool=sum(sizes), seed=0), 1)
    assert table["key"].to_pylist() == whole["key"]
    seen = metrics_of(folder, name)[-1]["data/samples_seen"]
    assert seen == sum(numbers) * worker.KEEP


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("held", "RunError", "another is at work"),
        ("other", "RunError", "steps: 9 there, 10 here"),
        ("again", "RunError", "must be new"),
        ("offline", "RunError", "finite in 2 processes .* start the run in one process"),
        ("few", "RunError", "a pool for each of 2 processes, 2 x 700 samples, got 1197"),
        ("replay", "LedgerError", "must have a ledger"),
        ("compiled", "RunError", "compile must be false with parallel fsdp2"),
        ("patience", "RunError", "patience must be null with parallel fsdp2"),
    ],
)
def test_what_cannot_start_is_refused_in_all_processes(folder, case, kind, text):
    errors = [found(folder, "refused", rank)[case] for rank in (0, 1)]
    assert [error[0] for error in errors] == [kind, kind]
    assert all(re.search(text, said) for _, said in errors)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("steps", "configuration must .* got steps: 6 at rank 1 and 5 at rank 0"),
        ("model", r"parameters of the model .* got norm.bias: \(6,\) at rank 1 and None at rank 0"),
        ("target", r"target batches must .* sizes: \[67, 66\] at rank 1 and \[67, 67, 66\]"),
    ],
)
def test_processes_that_differ_are_refused_in_all_of_them(folder, case, text):
    for rank in (0, 1):
        kind, said = found(folder, "unequal", rank)[case]
        assert kind == "RunError"
        assert re.search(text, said)


def test_lost_samples_count_once_whoever_meets_them(folder):
    for rank in (0, 1):
        results = found(folder, "damaged", rank)
        assert results["within"] is None  # five epochs, in which both meet them
        assert results["beyond"][0] == "DataError"
        assert "at most data.max_errors, 2, in all processes" in results["beyond"][1]
    summary = json.loads((folder / "within/summary.json").read_text())
    assert summary["errors_by_shard"] == {"train-000007.tar": 3}
    assert metrics_of(folder, "within")[-1]["data/errors"] == 3


def test_a_loss_that_is_infinite_in_one_process_stops_both(folder):
    at_fault = found(folder, "not_finite", 1)
    assert "got inf" in at_fault
    assert "on keys digit-" in at_fault
    assert "in the process of rank 1" in found(folder, "not_finite", 0)
    assert json.loads((folder / "infinite/summary.json").read_text())["status"] == "failed"


def test_each_process_has_the_device_of_its_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(RunError, match="must have no number in several processes, got 'cuda:0'"):
        resolve_device("cuda:0")


# --- parts ----------------------------------------------------------------------------------------


class Numbered(Group):
    """A process of some, none of which is there."""

    def __init__(self, rank, size):
        object.__setattr__(self, "processes", None)
        self.__dict__.update(at=rank, of=size)

    rank = property(lambda self: self.at)
    size = property(lambda self: self.of)


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("num", [1, 2, 6, 14])
def test_shares_of_a_batch_are_all_of_it_once(size, num):
    batch = {"x": torch.arange(num)}
    parts = [evaluation_share([batch], Numbered(rank, size))[0] for rank in range(size)]
    assert sum(count for _, count in parts) == num
    rows = [x for part, count in parts for x in part["x"][:count].tolist()]
    assert rows == list(range(num))
    assert all(len(part["x"]) == max(1, count) for part, count in parts)
    assert {count for _, count in parts} <= {math.floor(num / size), math.ceil(num / size)}


def test_blocks_are_those_of_the_models_we_build():
    gpt2 = untrained_lm("gpt2", 50, 16, 8, 3, 2, end=0)
    assert repeated_blocks(gpt2) == list(gpt2.transformer.h)
    llama = with_lora(untrained_lm("llama", 50, 16, 8, 2, 2, end=0), "llama", 2)
    assert repeated_blocks(llama) == list(llama.base_model.model.model.layers)
    blocks = worker.Blocks()
    assert repeated_blocks(blocks) == list(blocks.blocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


# --- kills at random ------------------------------------------------------------------------------

NUM_KILLS = 15  # in each layout


@pytest.mark.slow
@both
def test_runs_of_which_processes_are_killed_at_random_end_as_if_they_never_were(tmp_path, parallel):
    moments, kills = random.Random(0), 0
    worker.make_data(tmp_path)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "digits").symlink_to(tmp_path / "digits")
    began = time.perf_counter()
    status, said = torchrun(tmp_path / "whole", "at_random", PARALLEL=parallel, KILL_AFTER="0")
    assert status == 0, said
    longest = 0.5 * (time.perf_counter() - began)
    name, runs = f"random-{parallel}", 0
    while kills < NUM_KILLS:
        folder = tmp_path / str(runs)
        folder.mkdir()
        (folder / "digits").symlink_to(tmp_path / "digits")
        status = 1
        while status:
            seconds, victim = moments.uniform(0.01, longest), moments.randrange(2)
            status, said = torchrun(
                folder, "at_random", PARALLEL=parallel, KILL_AFTER=str(seconds), VICTIM=str(victim)
            )
            # torchrun names who ended first: gloo may abort the other before the kill is seen
            assert status == 0 or "SIGKILL" in said or "SIGABRT" in said, said
            kills += status != 0
        assert same_records(tmp_path, f"whole/{name}", f"{runs}/{name}")
        ends = [
            tmp_path / each / name / "checkpoints/step-00000300" for each in ("whole", str(runs))
        ]
        parts = [[torch.load(end / f"rank-{rank:05d}.pt") for rank in (0, 1)] for end in ends]
        for first, second in zip(*parts, strict=True):
            assert torch.equal(first["generators"]["torch"], second["generators"]["torch"])
        runs += 1
    print(f"{kills} kills in {runs} runs", flush=True)
