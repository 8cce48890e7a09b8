"""Weights in two processes: the mean over them of each one's weighted mean, simulated too."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import POOL, TARGET, data, losses, make, whole

from selectflow import AutoRate, Selector
from selectflow.core.batches import join, take

STEPS, KEEP = 8, 7


def trained(wrapper):
    """Weights and what was kept of each step, the weights of the model, and of a replay."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    selector = Selector(
        model, optimizer, losses, data(rank, 3, TARGET, seed=1, noise=0), KEEP, 0,
        derivative="central", weighting="relu", lr=AutoRate(window=STEPS),
    )  # fmt: skip
    seen = []
    for batch in selector.stream(data(rank, STEPS, POOL)):
        weights = selector.last.weights
        seen.append((weights.tolist(), selector.last.indices.tolist()))
        assert selector.last.lr_multiplier == 1
        optimizer.zero_grad()
        (weights * losses(model, batch)).mean().backward()
        optimizer.step()
    rate = selector._controls._rate
    with selector._objective.placed(), selector._objective.scoring():
        end = rate.state.window.replay(rate._derivatives, 1.0).params
        now = selector._optimizer.values()
        apart = max(float((end[name] - now[name]).abs().max()) for name in now if now[name].numel())
    return seen, whole(model), apart


def by_hand(seen):
    """One process that trains on what both kept, with both's weights."""
    model, optimizer = make(None)
    pools = [data(rank, STEPS, POOL) for rank in range(2)]
    for step, both in enumerate(zip(*seen, strict=True)):
        parts = [take(pools[rank][step], torch.tensor(kept)) for rank, (_, kept) in enumerate(both)]
        weights = torch.tensor([each for own, _ in both for each in own], dtype=torch.float64)
        optimizer.zero_grad()
        (weights * losses(model, join(parts))).mean().backward()
        optimizer.step()
    return whole(model)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_train_on_the_mean_of_their_weighted_means(two, wrapper):
    found = two.run(trained, wrapper, limit_s=240)
    expected = by_hand([seen for seen, _, _ in found])
    assert found[0][0] != found[1][0]
    for _, weights, apart in found:
        assert (weights - expected).abs().max() < 1e-10
        assert apart < 1e-10
