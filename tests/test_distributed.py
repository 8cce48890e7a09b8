"""Selection in several processes: equal to one process that sees all their data."""

from itertools import islice

import pytest
import torch
import torch.distributed as dist
from processes import Sent
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import join, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.exchange import share_out
from selectflow.core.lookahead import immediate, look_ahead
from selectflow.core.passes import Objective
from selectflow.core.sweep import Window
from selectflow.core.torch_optim import OptimizerReader

POOL, KEEP, TARGET = 12, 4, 6


class Net(nn.Module):
    """Blocks that fully_shard takes one by one; odd sizes, so that shards are uneven."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.GELU()) for _ in range(2)]
        )
        self.head = nn.Linear(7, 3)

    def forward(self, images):
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def data(rank, num, size, seed=0, noise=0.3):
    """Batches of one process; its own, and the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    found = []
    for _ in range(num):
        x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        y = x[:, :3].argmax(1)
        wrong = torch.rand(size, generator=generator) < noise
        random = torch.randint(0, 3, (size,), generator=generator)
        found.append(
            {
                "x": x,
                "y": torch.where(wrong, random, y),
                "key": [f"{rank}-{i}" for i in range(size)],
            }
        )
    return found


def make(wrapper="ddp", lr=1e-2, optimizer=torch.optim.AdamW):
    torch.manual_seed(0)
    model = Net().double()
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    how = {"weight_decay": 0.1} if optimizer is torch.optim.AdamW else {"momentum": 0.9}
    return model, optimizer(model.parameters(), lr, **how)


def whole(model):
    """All parameters, gathered, in one vector."""
    found = [p.detach() for p in model.parameters()]
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]
    return torch.cat([p.flatten() for p in full])


def train(selector, model, optimizer, pools, clip=None):
    """What was seen at each step: scores and keys; and the weights at the end."""
    seen = []
    for batch in selector.stream(pools):
        seen.append((selector.last.scores.tolist(), batch["key"]))
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return seen, whole(model)


def in_parallel(wrapper, horizon, num_steps=12, clip=None, **how):
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(
        model, optimizer, losses, target, keep=KEEP, horizon=horizon, max_grad_norm=clip,
        **{"derivative": "central", **how},
    )  # fmt: skip
    return train(selector, model, optimizer, data(rank, num_steps, POOL), clip)


def alone(horizon, num_steps=12, clip=None, num=2):
    """The slow way: one process that looks at everybody's pools and targets."""
    model, optimizer = make(None)
    reader = OptimizerReader(model, optimizer, None, clip)
    derivatives = Derivatives(Objective(model, losses), "exact")
    generators = [torch.Generator().manual_seed(0) for _ in range(num)]
    pools = [data(rank, num_steps, POOL) for rank in range(num)]
    targets = [data(rank, 3, TARGET, seed=1, noise=0) for rank in range(num)]
    seen = []
    for step in range(num_steps):
        target = join([each[step % 3] for each in targets])
        coming = range(step, min(step + horizon, num_steps))
        updates, state = reader.updates(max(1, len(coming))), reader.state()
        with derivatives.objective.scoring():
            if horizon == 0:
                ahead = immediate(derivatives, updates[0], state, target)
            else:
                batches = []
                for at in coming:
                    parts = []
                    for own, generator in zip(pools, generators, strict=True):
                        order = torch.randperm(POOL, generator=generator)
                        parts.append(take(own[at], order[:KEEP]))
                    batches.append(join(parts))
                window = Window(derivatives, updates, lambda i, _, batches=batches: batches[i])
                ahead = look_ahead(window, state, target)
            scores = [
                -derivatives.directional(state.params, ahead.gamma(0), own[step])[1]
                for own in pools
            ]
        kept = [
            take(own[step], each.argsort(descending=True, stable=True)[:KEEP])
            for own, each in zip(pools, scores, strict=True)
        ]
        seen.append(
            [(each.tolist(), batch["key"]) for each, batch in zip(scores, kept, strict=True)]
        )
        optimizer.zero_grad()
        losses(model, join(kept)).mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return seen, whole(model)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_are_one_that_sees_both_pools(two, wrapper, horizon, clip):
    check_equal(two, wrapper, horizon, 12, clip)


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_fifty_steps_of_two_and_of_four(two, four, wrapper, horizon):
    check_equal(two, wrapper, horizon, 50, None)
    check_equal(four, wrapper, horizon, 50, 0.3)


def check_equal(processes, wrapper, horizon, num_steps, clip):
    found = processes.run(in_parallel, wrapper, horizon, num_steps, clip, limit_s=240)
    seen, weights = alone(horizon, num_steps, clip, processes.num)
    assert all(torch.equal(found[0][1], each[1]) for each in found)
    for rank, (steps, _) in enumerate(found):
        for (scores, keys), expected in zip(steps, seen, strict=True):
            expected_scores, expected_keys = expected[rank]
            gap = torch.tensor(scores) - torch.tensor(expected_scores)
            assert gap.norm() < 1e-6 * torch.tensor(expected_scores).norm()
            assert keys == expected_keys
    assert (found[0][1] - weights).abs().max() < 1e-10


# --- what is decided, all decide alike ------------------------------------------------------------


def controlled(wrapper, num_steps, case):
    rank = dist.get_rank()
    model, optimizer = make(wrapper, lr=0.3 if case == "diverges" else 1e-2)
    state = {"calls": 0}

    def loss_fn(module, batch):
        found = losses(module, batch)
        if case != "not finite" or rank != 1 or len(found) != KEEP:
            return found  # pools and target batches must have losses, simulated steps need not
        state["calls"] += 1
        return found * float("nan") if state["calls"] in (10, 40) else found

    noise = 0.9 if case == "harder" and rank == 1 else 0.3
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(
        model,
        optimizer,
        loss_fn,
        target,
        keep=KEEP,
        lr="auto",
        # costs are measured, but where the very calls that are not finite depend on them
        horizon=AutoHorizon(
            gap=10,
            longest_gap=40,
            share=0.5,
            off=case != "not finite",
            costs={0: 1.5, 1: 2.5, 2: 3.0, 4: 4.0, 8: 6.0} if case == "not finite" else None,
        ),
        derivative="central",
    )
    decisions, pools = [], data(rank, num_steps, POOL, noise=noise)
    for batch in islice(selector.stream(pools), num_steps):
        decisions += [(d.step, d.before, d.after, d.moved) for d in selector.last.decisions]
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    assert case != "not finite" or rank != 1 or state["calls"] > 40
    return decisions, whole(model), selector.state.num_steps


@pytest.mark.parametrize(
    ("wrapper", "case", "num_steps"),
    [
        ("ddp", "harder", 150),
        ("ddp", "diverges", 40),
        ("ddp", "not finite", 40),
        ("fsdp2", "alike", 40),
        ("fsdp2", "not finite", 40),
        *(
            pytest.param(wrapper, case, 300, marks=pytest.mark.slow)
            for wrapper in ("ddp", "fsdp2")
            for case in ("alike", "harder", "diverges", "not finite")
        ),
    ],
)
def test_controllers_decide_alike_and_replicas_stay_one(two, wrapper, case, num_steps):
    (first, weights, num), (second, others, _) = two.run(
        controlled, wrapper, num_steps, case, limit_s=300
    )
    assert len(first) >= 3
    assert first == second
    assert any(moved for *_, moved in first)
    assert torch.equal(weights, others)
    assert weights.isfinite().all()
    assert num == num_steps - 1


def unevenly(num_steps):
    """The decisions where pools have other sizes in each process, and some just what is kept."""
    rank = dist.get_rank()
    model, optimizer = make()
    settings = AutoHorizon(
        largest=0, gap=3, longest_gap=3, contest_steps=2, share=1.0, early_share=1e6, costs={0: 2.0}
    )
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(model, optimizer, losses, target, keep=KEEP, horizon=settings)
    sizes = [KEEP, POOL, 3 * KEEP] if rank else [POOL, 2 * KEEP, KEEP]
    pools = [data(rank, 1, sizes[at % 3], seed=at, noise=0.3)[0] for at in range(3 * num_steps)]
    decisions = []
    for batch in islice(selector.stream(pools), num_steps):
        decisions += [(d.step, d.before, d.after) for d in selector.last.decisions]
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return decisions, whole(model)


def test_processes_with_pools_of_other_sizes_decide_alike(two):
    (first, weights), (second, others) = two.run(unevenly, 40)
    assert len(first) >= 3
    assert first == second
    assert torch.equal(weights, others)


# --- the best of all pools ------------------------------------------------------------------------


def globally(wrapper, num_steps):
    """Scores, own positions kept, and keys trained on, of each step."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(model, optimizer, losses, target, keep=KEEP, horizon=0, scope="global")
    seen = []
    for batch in selector.stream(data(rank, num_steps, POOL, noise=0.9 * rank)):
        last = selector.last
        seen.append(
            (last.scores.tolist(), last.indices.tolist(), batch["key"], batch["y"].tolist())
        )
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return seen, whole(model)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_best_of_all_pools_are_trained_on(two, wrapper):
    (one, weights), (other, others) = two.run(globally, wrapper, 6)
    assert torch.equal(weights, others)
    pools = [data(rank, 6, POOL, noise=0.9 * rank) for rank in range(2)]
    num_moved = 0
    for step, steps in enumerate(zip(one, other, strict=True)):
        everyone = [(-s, rank, at) for rank, own in enumerate(steps) for at, s in enumerate(own[0])]
        best = sorted(everyone)[: 2 * KEEP]
        for rank, (_, indices, keys, _) in enumerate(steps):
            assert indices == [at for _, owner, at in best if owner == rank]
            own = [f"{rank}-{at}" for at in indices][:KEEP]
            assert keys[: len(own)] == own
            assert len(keys) == KEEP
            num_moved += sum(not key.startswith(f"{rank}-") for key in keys)
        trained = sorted(key for own in steps for key in own[2])
        assert trained == sorted(f"{rank}-{at}" for _, rank, at in best)
        labels = {
            f"{rank}-{at}": int(pools[rank][step]["y"][at])
            for rank in range(2)
            for at in range(POOL)
        }
        assert all(labels[k] == y for own in steps for k, y in zip(own[2], own[3], strict=True))
    assert num_moved > 0  # the second pools are mostly wrong labels


def now_and_then(wrapper, num_steps):
    """Whether each step was selected for, the keys trained on, and the weights at the end."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    selector = Selector(
        model, optimizer, losses, data(rank, 3, TARGET, seed=1), keep=KEEP, horizon=1,
        scope="global", score_every=2,
    )  # fmt: skip
    seen = []
    for batch in selector.stream(data(rank, num_steps, POOL)):
        seen.append((selector.last.scores is not None, batch["key"]))
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return seen, whole(model)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_processes_select_for_the_same_steps_and_take_any_of_their_own_else(two, wrapper):
    (one, weights), (other, others) = two.run(now_and_then, wrapper, 6)
    assert torch.equal(weights, others)
    for rank, steps in enumerate((one, other)):
        for number, (is_scored, keys) in enumerate(steps):
            assert is_scored == (number % 2 == 0)
            assert len(keys) == KEEP
            assert is_scored or all(key.startswith(f"{rank}-") for key in keys)


def test_shares_by_hand():
    """Equal scores: the lower rank, then the lower position; surplus goes to who has too few."""
    shares = share_out([[3.0, 1.0, 3.0], [0.0, 3.0, 2.0], [5.0, 4.0, 0.0]], [2, 1, 2])
    assert shares == [[(0, 0), (0, 2)], [(1, 1)], [(2, 0), (2, 1)]]
    shares = share_out([[9.0, 8.0, 7.0, 6.0], [0.0, 1.0], [5.0, 5.0]], [2, 2, 1])
    assert shares == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(2, 0)]]


# --- what it costs in collectives -----------------------------------------------------------------


def counted(wrapper, horizon):
    """(collectives, bytes over those of the parameters) of a step, a look-ahead, and in between."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    target = data(rank, 3, TARGET, seed=1, noise=0)
    how = {"keep": KEEP, "horizon": horizon, "interval": 2, "derivative": "central"}
    selector = Selector(model, optimizer, losses, target, **how)
    pools, found = data(rank, 12, POOL), []
    for step in range(6):
        with Sent() as select:
            batch = selector.select(pools[step], pools[step + 1 :])
        with Sent() as train:
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
        found.append([(each.num, each.num_bytes / size) for each in (train, select)])
    (step, ahead), (_, between) = found[-2:]
    return step, ahead, between


@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_collectives_of_replicas(two, horizon):
    _, (ahead, _), (between, _) = two.run(counted, "ddp", horizon)[0]
    assert between == 0
    passes = 1 + horizon + 2 * max(0, horizon - 1)  # target, updates, Hessian products by two each
    assert ahead <= passes + (horizon > 1)


@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_collectives_of_shards(two, horizon):
    """A pass gathers each of three groups; backward gathers blocks again, and reduces all."""
    (step, _), (ahead, _), (between, _) = two.run(counted, "fsdp2", horizon)[0]
    forward = 3
    assert between <= 2 * forward + 1
    gradient = step + 1  # and the mean loss
    passes = 1 + horizon + 2 * max(0, horizon - 1)
    norms = 1 + 4 * horizon
    assert ahead <= passes * gradient + 2 * forward + norms + 3


# --- everything is put back -----------------------------------------------------------------------


def bits(model, optimizer):
    params = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    state = [v for s in optimizer.state.values() for v in s.values()]
    state = [v.to_local() if hasattr(v, "to_local") else v for v in state]
    return [t.detach().clone() for t in [*params, *state]]


def interrupted(horizon):
    """A loss_fn that fails in all processes at call n, for all n, under fully_shard."""
    rank = dist.get_rank()
    model, optimizer = make("fsdp2")
    pools, target = data(rank, 8, POOL), data(rank, 3, TARGET, seed=1, noise=0)
    for batch in pools[:2]:
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    before, calls = bits(model, optimizer), [0, 10**9]

    def loss_fn(module, batch):
        calls[0] += 1
        if calls[0] == calls[1]:
            module(batch["x"][:2])
            raise KeyError("broken off")
        return losses(module, batch)

    def select():
        selector = Selector(
            model, optimizer, loss_fn, target, keep=KEEP, horizon=horizon, derivative="central"
        )  # fmt: skip
        calls[0] = 0
        return selector.select(pools[2], pools[3:]), selector.last.scores

    _, expected = select()
    num, same = calls[0], True
    for at in range(1, num + 1):
        calls[1] = at
        try:
            select()
            same = False
        except KeyError:
            same &= all(map(torch.equal, before, bits(model, optimizer)))
    calls[1] = 10**9
    graph = losses(model, pools[0]).mean()  # built before a selection, run after it
    _, again = select()
    optimizer.zero_grad()
    graph.backward()
    grads = [p.grad.to_local().clone() for p in model.parameters()]
    optimizer.zero_grad()
    losses(model, pools[0]).mean().backward()
    same_grads = all(
        torch.equal(g, p.grad.to_local()) for g, p in zip(grads, model.parameters(), strict=True)
    )
    return num, same, torch.equal(expected, again), same_grads


@pytest.mark.parametrize("horizon", [0, 2])
def test_shards_are_put_back_to_the_bit(two, horizon):
    for num, same, repeated, same_grads in two.run(interrupted, horizon):
        assert num > 5
        assert same
        assert repeated
        assert same_grads
