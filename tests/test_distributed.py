"""Selection in several processes: equal to one process that sees all their data."""

import copy

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from selectflow import Selector
from selectflow.core.batches import join, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate, look_ahead
from selectflow.core.passes import Objective
from selectflow.core.sweep import Window
from selectflow.core.torch_optim import OptimizerReader

POOL, KEEP, TARGET = 12, 4, 6


@pytest.fixture(scope="module")
def two():
    processes = Processes(2)
    yield processes
    processes.stop()


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
    found = two.run(in_parallel, wrapper, horizon, 12, clip)
    seen, weights = alone(horizon, 12, clip)
    assert all(torch.equal(found[0][1], each[1]) for each in found)
    for rank, (steps, _) in enumerate(found):
        for (scores, keys), expected in zip(steps, seen, strict=True):
            expected_scores, expected_keys = expected[rank]
            gap = torch.tensor(scores) - torch.tensor(expected_scores)
            assert gap.norm() < 1e-6 * torch.tensor(expected_scores).norm()
            assert keys == expected_keys
    assert (found[0][1] - weights).abs().max() < 1e-10
