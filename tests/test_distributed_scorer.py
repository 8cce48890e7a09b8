"""A scorer in two processes: equal to one process that sees both pools and both targets."""

from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import parallel_worker as worker
import pytest
import torch
import torch.distributed as dist
from test_distributed import KEEP, POOL, TARGET, alone, data, losses, make, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

from selectflow import Scorer, Selector
from selectflow.core.batches import join, take
from selectflow.data import PoolStream
from selectflow.run import loop
from selectflow.run.ledger import read_ledger
from selectflow.run.task import RunError

STEPS, CLIP = 8, 0.3
both = pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])


def flat(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def scored(wrapper, horizon, check_at=None):
    """What was seen, the weights of both models, the scorer's loss, and what it was worth."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper, optimizer=torch.optim.SGD)
    scoring, own = make("ddp")
    selector = Selector(
        model, optimizer, losses, data(rank, 3, TARGET, seed=1, noise=0), KEEP, horizon,
        derivative="central", max_grad_norm=CLIP, scorer=Scorer(scoring, own, max_grad_norm=CLIP),
    )  # fmt: skip
    if check_at is not None:
        selector.state.worth.next_at = check_at
    seen, gains = [], []
    for batch in selector.stream(data(rank, STEPS, POOL)):
        seen.append((selector.last.scores.tolist(), batch["key"]))
        gains.append(selector.last.scorer_gain)
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return seen, whole(model), flat(scoring), selector.last.scorer_loss, gains


def trained_on(seen):
    """The slow way to the other model: one process that steps on what was kept in both."""
    model, optimizer = make(None, optimizer=torch.optim.SGD)
    pools = [data(rank, STEPS, POOL) for rank in range(2)]
    for step, kept in enumerate(seen):
        places = [torch.tensor([int(key.partition("-")[2]) for key in keys]) for _, keys in kept]
        batches = [take(own[step], each) for own, each in zip(pools, places, strict=True)]
        optimizer.zero_grad()
        losses(model, join(batches)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return whole(model)


@both
@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_two_processes_with_a_scorer_are_one_that_sees_both_pools(two, wrapper, horizon):
    """The scorer is a model that trains on what it keeps; the other one follows."""
    found = two.run(scored, wrapper, horizon, limit_s=240)
    seen, scorer_weights = alone(horizon, STEPS, CLIP)
    weights = trained_on(seen)
    for rank, (steps, own_weights, own_scorer, _, _) in enumerate(found):
        for (scores, keys), expected in zip(steps, seen, strict=True):
            expected_scores, expected_keys = torch.tensor(expected[rank][0]), expected[rank][1]
            assert (torch.tensor(scores) - expected_scores).norm() < 1e-6 * expected_scores.norm()
            assert keys == expected_keys
        assert (own_weights - weights).abs().max() < 1e-10
        assert (own_scorer - scorer_weights).abs().max() < 1e-10
    assert torch.equal(found[0][2], found[1][2])
    assert found[0][3] == found[1][3] > 0  # the loss is everybody's


def test_what_it_is_worth_is_one_number_however_the_model_is_laid_out(two):
    replicas, shards = (two.run(scored, wrapper, 1, 3) for wrapper in ("ddp", "fsdp2"))
    for (_, *weights, _, gains), (_, *others, _, other_gains) in (replicas, shards):
        assert all(map(torch.equal, weights, others))
        assert gains == other_gains
        assert [step for step, gain in enumerate(gains) if gain is not None] == [3]
    assert replicas[0][-1][3] == pytest.approx(shards[0][-1][3], rel=1e-6)
    assert (replicas[0][1] - shards[0][1]).abs().max() < 1e-10


# --- what is refused ------------------------------------------------------------------------------


def refused(how):
    """Why the scorer is not taken."""
    model, optimizer = make("fsdp2" if how == "unjoined" else "ddp")
    scoring = nn.Linear(5, 3).double()
    if how == "sharded":
        fully_shard(scoring)
    own = torch.optim.AdamW(scoring.parameters())
    try:
        Selector(model, optimizer, losses, [], KEEP, 0, scorer=Scorer(scoring, own))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("how", "got"), [("unjoined", "got 1"), ("sharded", "got a sharded one")])
def test_one_that_nothing_joins_is_refused(two, how, got):
    for said in two.run(refused, how):
        assert "the scorer must be whole and joined in as many processes as the model, 2" in said
        assert f"{got}; give it as DistributedDataParallel makes it" in said


# --- runs -----------------------------------------------------------------------------------------

LR = {"model": 0.02, "scorer": 0.05}  # of the former, that of `worker.config_of`
MAX_NORM = 0.5


def configured(folder, name, wrapper):
    return worker.config_of(
        folder, name, worker.AHEAD, parallel=wrapper, resume="auto", checkpoint_every=3,
        scorer={"optimizer": {"lr": LR["scorer"], "max_grad_norm": MAX_NORM}},
    )  # fmt: skip


def blocks():
    """The model, and its scorer."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(worker.Blocks())
    return found


def run(folder, name, wrapper, die_at=None):
    """Weights of the scorer, once a run is over or was killed in a call of the loss."""
    made, calls = worker.task_of(folder), 0
    scorer = blocks()[1]

    def loss_fn(model, batch):
        nonlocal calls
        calls += model.training and torch.is_grad_enabled()
        if calls == die_at:
            raise worker.Killed
        return worker.loss_fn(model, batch)

    with suppress(worker.Killed):
        loop.train(configured(folder, name, wrapper), replace(made, scorer=scorer, loss_fn=loss_fn))
    return flat(scorer)


def reference(folder, name):
    """One process that trains both on what the ledger says was kept: their weights."""
    rows = [row for row in read_ledger(folder / name).to_pylist() if row["kept"]]
    (samples,) = islice(PoolStream(worker.digits(folder), pool=1197, seed=0), 1)
    place = {key: index for index, key in enumerate(samples["key"])}
    models = blocks()
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
        for model, lr in zip(models, LR.values(), strict=True)
    ]
    for step in range(1, 1 + worker.STEPS):
        kept = torch.tensor([place[row["key"]] for row in rows if row["step"] == step])
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            worker.loss_fn(model, take(samples, kept)).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
    return map(flat, models)


def check_trained(folder, name, scorer):
    """Both models of a run are those that its ledger makes."""
    expected, expected_scorer = reference(folder, name)
    saved = torch.load(folder / name / "model" / "weights.pt")
    weights = torch.cat([saved[key].flatten() for key, _ in worker.Blocks().named_parameters()])
    assert (weights - expected).abs().max() < 1e-8
    assert (scorer - expected_scorer).abs().max() < 1e-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    worker.make_data(folder)
    return folder


@both
def test_a_run_in_two_processes_is_resumed_to_the_bit(two, folder, wrapper):
    names = f"whole-{wrapper}", f"killed-{wrapper}"
    first, second = two.run(run, folder, names[0], wrapper)
    assert torch.equal(first, second)
    check_trained(folder, names[0], first)
    two.run(run, folder, names[1], wrapper, 9)
    assert not (folder / names[1] / "model").exists()
    for scorer in two.run(run, folder, names[1], wrapper):
        assert torch.equal(scorer, first)
    ends = [Path(folder / name / "model" / "weights.pt") for name in names]
    one, other = map(torch.load, ends)
    assert all(torch.equal(value, other[key]) for key, value in one.items())


@both
def test_a_scorer_goes_on_in_one_process_or_says_that_it_cannot(two, folder, wrapper):
    """It is saved with the selector, whose look-ahead is of shards under fsdp2."""
    name = f"begun-{wrapper}"
    two.run(run, folder, name, wrapper, 9)
    if wrapper == "fsdp2":
        with pytest.raises(
            RunError, match=r"must be resumed as .* in 2 processes \(fsdp2\), got 1"
        ):
            run(folder, name, wrapper)
        return
    with pytest.warns(UserWarning, match="resumed in 1 processes"):
        scorer = run(folder, name, wrapper)
    check_trained(folder, name, scorer)
