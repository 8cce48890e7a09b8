"""A scorer in two processes: equal to one process that sees both pools and both targets."""

import pytest
import torch
import torch.distributed as dist
from test_distributed import KEEP, POOL, TARGET, data, losses, make, train, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from selectflow import Scorer, Selector
from selectflow.core.batches import join, take

STEPS = 8


def small():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()
    return model, torch.optim.AdamW(model.parameters(), 3e-2)


def in_parallel(wrapper, is_wrapped=True):
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    scoring, own = small()
    if is_wrapped:
        scoring = DistributedDataParallel(scoring)
    selector = Selector(
        model, optimizer, losses, data(rank, 3, TARGET, seed=1, noise=0), KEEP, 0,
        derivative="central", scorer=Scorer(scoring, own, max_grad_norm=0.3),
    )  # fmt: skip
    seen, weights = train(selector, model, optimizer, data(rank, STEPS, POOL))
    scored = torch.cat([param.detach().flatten() for param in scoring.parameters()])
    return seen, weights, scored, selector.last.scorer_loss


def alone():
    """The slow way, by two models in one process that looks at everybody's pools and targets."""
    model, optimizer = make(None)
    scoring, own = small()
    pools = [data(rank, STEPS, POOL) for rank in range(2)]
    targets = [join([data(r, 3, TARGET, seed=1, noise=0)[at] for r in range(2)]) for at in range(3)]
    itself = Selector(scoring, own, losses, targets, 2 * POOL, 0, derivative="central")
    seen = []
    for step in range(STEPS):
        itself.select(join([each[step] for each in pools]))
        scores = itself.last.scores.split(POOL)
        kept = [
            take(own_pools[step], each.argsort(descending=True, stable=True)[:KEEP])
            for own_pools, each in zip(pools, scores, strict=True)
        ]
        seen.append([(each, batch["key"]) for each, batch in zip(scores, kept, strict=True)])
        for trained, stepped, clip in ((model, optimizer, None), (scoring, own, 0.3)):
            stepped.zero_grad()
            loss = losses(trained, join(kept)).mean()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(trained.parameters(), clip)
            stepped.step()
    scored = torch.cat([param.detach().flatten() for param in scoring.parameters()])
    return seen, whole(model), scored, loss.item()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_with_a_scorer_are_one_that_sees_both_pools(two, wrapper):
    found = two.run(in_parallel, wrapper, limit_s=240)
    seen, weights, scored, loss = alone()
    for rank, (steps, own_weights, own_scored, own_loss) in enumerate(found):
        for (scores, keys), expected in zip(steps, seen, strict=True):
            expected_scores, expected_keys = expected[rank]
            gap = torch.tensor(scores, dtype=torch.float64) - expected_scores
            assert gap.norm() < 1e-6 * expected_scores.norm()
            assert keys == expected_keys
        assert (own_weights - weights).abs().max() < 1e-10
        assert (own_scored - scored).abs().max() < 1e-10
        assert own_loss == pytest.approx(loss, rel=1e-6)  # told in float32
    assert torch.equal(found[0][2], found[1][2])


def test_one_that_nothing_joins_is_refused(two):
    with pytest.raises(AssertionError, match="scorer must be whole and joined"):
        two.run(in_parallel, "ddp", False)
