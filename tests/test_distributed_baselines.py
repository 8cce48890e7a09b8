"""Baselines in several processes: the target is everybody's, the pool each one's own."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import KEEP, POOL, TARGET, data, losses, make

from selectflow import Selector
from selectflow.core.batches import join

BY_LOSSES = ("gradient", "target_path", "easiest")
BY_EXAMPLES = ("gradient_norm", "el2n", "adam", "greats", "opus_greedy")


def trained(wrapper):
    """A model that has made three steps on the same data in all processes."""
    model, optimizer = make(wrapper)
    for batch in data(7, 3, 8):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return model, optimizer


def select(model, optimizer, target, pool, strategy):
    selector = Selector(
        model, optimizer, losses, target, KEEP, strategy=strategy, derivative="central"
    )
    selector.select(pool)
    return selector


def scored(wrapper, strategy):
    """The scores of this process's own pool, or why there are none."""
    rank = dist.get_rank()
    target, pool = data(rank, 3, TARGET, seed=1, noise=0), data(rank, 1, POOL)[0]
    try:
        selector = select(*trained(wrapper), target, pool, strategy)
    except ValueError as error:
        return str(error)
    return selector.last.scores.tolist()


def alone(strategy):
    targets = [data(rank, 3, TARGET, seed=1, noise=0) for rank in range(2)]
    target = [join(pair) for pair in zip(*targets, strict=True)]
    pools = [data(rank, 1, POOL)[0] for rank in range(2)]
    return [select(*trained(None), target, pool, strategy).last.scores.tolist() for pool in pools]


@pytest.mark.parametrize(
    ("wrapper", "strategy"),
    [("ddp", name) for name in BY_LOSSES + BY_EXAMPLES] + [("fsdp2", name) for name in BY_LOSSES],
)
def test_scores_are_those_of_one_process_with_everybodys_target(two, wrapper, strategy):
    found, expected = (
        torch.tensor(two.run(scored, wrapper, strategy)),
        torch.tensor(alone(strategy)),
    )
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_the_irreducible_loss_model_is_one_and_does_not_depend_on_shards(two):
    """Each process holds out examples of its own; the gradients and the loss are everybody's."""
    replicas, shards = (two.run(scored, wrapper, "rho") for wrapper in ("ddp", "fsdp2"))
    assert torch.allclose(torch.tensor(replicas), torch.tensor(shards), rtol=1e-6)
    assert torch.tensor(replicas).abs().min() > 0


@pytest.mark.parametrize("strategy", BY_EXAMPLES)
def test_gradients_of_single_examples_of_shards_are_refused_by_name(two, strategy):
    for found in two.run(scored, "fsdp2", strategy):
        assert "parameters must be whole for gradients of single examples, got sharded" in found
        assert "use a strategy that needs no gradient of single examples" in found
