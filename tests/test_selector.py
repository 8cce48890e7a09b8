"""The selector: what it keeps, when it looks ahead, and that it leaves no trace."""

import copy
import random
from itertools import islice

import numpy as np
import pytest
import torch
from problems import PROBLEMS, image_loss, images
from reference import slopes
from torch import nn

from selectflow import HorizonSchedule, Selector
from selectflow.options import SelectOptions

MLP, CNN, TRANSFORMER = PROBLEMS


def setting(problem=MLP, dtype=torch.float64, num_pools=12, size=10, lr=3e-3, seed=0):
    model, make = problem.make(dtype, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    pools, target = [make(size) for _ in range(num_pools)], [make(9), make(7)]
    return model, optimizer, pools, target


def train(model, optimizer, loss_fn, batches, steps=None):
    """The user's loop; returns the batches it was given."""
    seen = []
    for batch in islice(batches, steps):
        seen.append(batch)
        loss = loss_fn(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


def selector_for(model, optimizer, target, loss_fn=image_loss, **options):
    return Selector(model, optimizer, loss_fn, target=target, **({"keep": 4} | options))


def snapshot(model, optimizer):
    """Everything that a selection must leave alone."""
    return copy.deepcopy(
        (
            {n: (p.detach(), p.requires_grad, p.grad) for n, p in model.named_parameters()},
            dict(model.named_buffers()),
            [m.training for m in model.modules()],
            optimizer.state_dict(),
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002
        )
    )


def same(first, second):
    if isinstance(first, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(first) == torch.as_tensor(second)).all())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# --- what is kept ---------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_keeps_the_examples_with_the_largest_influence(problem, horizon):
    """Removing what scores high, from a batch that trained on it, raises the target loss."""
    model, optimizer, pools, target = setting(problem)
    model.eval()
    selector = selector_for(
        model, optimizer, target, problem.loss_fn, horizon=horizon, derivative="exact"
    )
    batches = selector.stream(pools)
    train(model, optimizer, problem.loss_fn, batches, 5)
    next(batches)
    gamma = selector.state.ahead.sensitivities[0]
    expected = -slopes(model, problem.loss_fn, pools[5], gamma)
    scores = selector.last.scores
    assert torch.allclose(scores.double(), expected, rtol=1e-8, atol=1e-12)
    assert selector.last.indices.tolist() == expected.argsort(descending=True)[:4].tolist()
    assert selector.last.horizon == horizon


def test_a_batch_is_the_pools_best_first_with_its_keys():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, keep=0.3)
    batch = selector.select(pools[0])
    kept = selector.last.indices
    assert len(kept) == 3
    assert torch.equal(batch["image"], pools[0]["image"][kept])
    assert batch["key"] == [pools[0]["key"][i] for i in kept]
    scores = selector.last.scores
    assert scores[kept].tolist() == sorted(scores.tolist(), reverse=True)[:3]


def test_strategies_by_name_and_by_function():
    model, optimizer, pools, target = setting()
    loss = selector_for(model, optimizer, target, strategy="loss")
    loss.select(pools[0])
    expected = image_loss(model, pools[0]).detach()
    assert torch.equal(loss.last.scores, expected)
    assert torch.equal(loss.last.losses, expected)
    assert loss.last.horizon is None

    own = selector_for(model, optimizer, target, strategy=lambda c: -c.losses())
    own.select(pools[0])
    assert torch.equal(own.last.scores, -expected)

    odd = selector_for(model, optimizer, target, strategy=lambda c: torch.arange(c.size) % 2 == 1)
    odd.select(pools[0])
    assert odd.last.indices.tolist() == [1, 3, 5, 7]
    assert odd.last.scores.mean() == 0.5

    kept = [
        selector_for(model, optimizer, target, strategy="uniform", seed=seed).select(pools[0])[
            "key"
        ]
        for seed in (0, 0, 1)
    ]
    assert kept[0] == kept[1] != kept[2]


def test_influence_keeps_clean_labels():
    """Half of the labels are shifted: at the same loss scale, influence tells them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def noisy():
        while True:
            pool = images(40)
            pool["wrong"] = torch.arange(40) < 20
            pool["label"] = torch.where(pool["wrong"], (pool["label"] + 3) % 10, pool["label"])
            yield pool

    selector = selector_for(model, optimizer, [images(100)], keep=10)
    batches = train(model, optimizer, image_loss, selector.stream(noisy()), 60)
    kept_wrong = torch.cat([batch["wrong"] for batch in batches[10:]]).float().mean()
    assert kept_wrong < 0.25  # half of their share in the pools


# --- when it looks ahead --------------------------------------------------------------------


def test_every_pool_is_trained_on_once_in_order_however_far_it_peeks():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, horizon=4, interval=3)
    horizons, drawn = [], []

    def source():
        for index, pool in enumerate(pools):
            drawn.append({**pool, "pool": torch.full((10,), index)})
            yield drawn[-1]

    order = []
    for batch in selector.stream(source()):
        assert selector.last.pool is drawn[len(order)]  # peeking copies nothing
        order.append(int(batch["pool"][0]))
        horizons.append((selector.last.horizon, selector.last.age, len(drawn)))
        train(model, optimizer, image_loss, [batch])
    assert order == list(range(12))
    # a look-ahead every 3 steps draws 3 pools beyond its own; the last one ends with the stream
    expected = [(horizon, age) for horizon in (4, 4, 4, 3) for age in range(3)]
    assert [entry[:2] for entry in horizons] == expected
    assert [entry[2] for entry in horizons] == [4, 4, 4, 7, 7, 7, 10, 10, 10, 12, 12, 12]


def test_steps_between_use_the_sensitivities_of_the_same_sweep():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, horizon=2, interval=4, derivative="exact")
    batches = selector.stream(pools)
    for step in range(4):
        pool = pools[step]
        train(model, optimizer, image_loss, [], 0)
        batch = next(batches)
        gammas = selector.state.ahead.sensitivities
        assert len(gammas) == 2
        gamma = gammas[min(step, 1)]  # beyond the horizon: the last one
        assert torch.allclose(selector.last.scores, -slopes(model, image_loss, pool, gamma))
        train(model, optimizer, image_loss, [batch])


@pytest.mark.parametrize("horizon", [0, 1])
def test_a_look_ahead_at_a_learning_rate_of_0_serves_no_later_step(horizon):
    """A warm-up from 0: the first update does nothing, by any example; and decides no form."""
    model, optimizer, pools, target = setting()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
    options = {"horizon": horizon, "interval": 4, "lr_scheduler": scheduler}
    selector = selector_for(model, optimizer, target, **options)
    found = []
    for batch in selector.stream(pools[:6]):
        found.append((selector.last.age, bool(selector.last.scores.any()), bool(selector.forms)))
        image_loss(model, batch).mean().backward()
        optimizer.step()
        scheduler.step()
    served = [(age, True, True) for age in (0, 1, 2, 3, 0)]
    assert found == [(0, False, False), *served]


@pytest.mark.parametrize("params", [None, ["*"]])
def test_a_look_ahead_is_due_when_other_parameters_are_trained(params):
    model, optimizer, pools, target = setting()
    options = {"horizon": 2, "interval": 100, "params": params}
    selector = selector_for(model, optimizer, target, **options)
    last = list(model.parameters())[-1]
    ages = []
    for step, batch in enumerate(selector.stream(pools[:6])):
        ages.append(selector.last.age)
        last.requires_grad_(step not in (1, 2))
        optimizer.zero_grad()
        image_loss(model, batch).mean().backward()
        optimizer.step()
    assert ages == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_micro_batches_of_one_step_share_a_look_ahead(kind):
    model, _, pools, target = setting()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-3)
        if kind == "adamw"
        else torch.optim.SGD(model.parameters(), lr=1e-2)
    )
    selector = selector_for(model, optimizer, target, interval=2)
    found = []
    for index, batch in enumerate(selector.stream(pools)):
        found.append((selector.last.step, selector.last.age, selector.last.lookahead_s > 1e-4))
        (image_loss(model, batch).mean() / 3).backward()
        if index % 3 == 2:  # three micro-batches to a step
            optimizer.step()
            optimizer.zero_grad()
    fresh = [index for index in range(12) if found[index][1] == 0 and index % 3 == 0]
    assert [entry[0] for entry in found] == [step for step in range(4) for _ in range(3)]
    assert [entry[1] for entry in found] == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]
    assert fresh == [0, 6]
    assert selector.state.num_lookaheads == 2


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("num_left", [5, 3])
def test_the_look_ahead_accumulates_as_the_loop_does(num_left, chunk_size):
    """Pools of which all is kept: the rollout of 2 updates from 3 pools each is the real training.

    Near the end of the stream the last update is made from what is left.
    """
    model, optimizer, pools, target = setting()
    train(model, optimizer, image_loss, pools[:2])
    selector = selector_for(
        model, optimizer, [target[0]], keep=1.0, horizon=2, pools_per_update=3,
        chunk_size=chunk_size,
    )  # fmt: skip
    drawn = iter(pools[3 : 3 + num_left])
    selector.select(pools[2], drawn)
    assert selector.last.horizon == 2
    assert next(drawn, None) is None  # 5 more pools make 2 updates, no more are drawn
    whole = [{k: torch.cat([p[k] for p in part]) for k in ("image", "label")}
             for part in (pools[2:5], pools[5 : 3 + num_left])]  # fmt: skip
    with torch.no_grad():
        before = image_loss(model, target[0]).mean().item()
    train(model, optimizer, image_loss, whole)
    with torch.no_grad():
        after = image_loss(model, target[0]).mean().item()
    assert selector.last.target_loss == pytest.approx(after, rel=1e-9)
    assert abs(after - before) > 1e-4


def test_micro_batches_of_an_update_may_differ_in_length():
    """As padded texts do: gamma of one update is that of the mean over all their examples."""
    model, _ = TRANSFORMER.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pools = [{"tokens": torch.randint(17, (num, length))} for num, length in ((4, 9), (6, 5))]
    selector = selector_for(
        model, optimizer, pools, TRANSFORMER.loss_fn, keep=1.0, horizon=1, pools_per_update=2
    )
    selector.select(pools[0], pools[1:])
    model.eval()  # dropout
    train(model, optimizer, lambda m, b: torch.cat([TRANSFORMER.loss_fn(m, p) for p in b]), [pools])
    with torch.no_grad():
        after = TRANSFORMER.loss_fn(model, pools[0]).mean().item()
    assert selector.last.target_loss == pytest.approx(after, rel=1e-9)


def test_policy_simulates_what_it_would_keep():
    """With a pool of which all is kept there is nothing to choose: both rollouts agree."""
    model, optimizer, pools, target = setting()
    losses = {}
    for keep in (4, 1.0):
        for nominal in ("random", "policy"):
            selector = selector_for(
                model, optimizer, [target[0]], keep=keep, horizon=3, nominal=nominal
            )
            selector.select(pools[0], pools[1:])
            losses[keep, nominal] = selector.last.target_loss
    assert losses[1.0, "random"] == pytest.approx(losses[1.0, "policy"], rel=1e-12)
    # What the policy keeps lowers the target loss more than a random part does.
    assert losses[4, "policy"] < losses[4, "random"]


# --- no trace -------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("derivative", ["exact", "central"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_a_selection_leaves_no_trace(problem, derivative, fails):
    calls = 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        if fails and calls > 5:
            raise RuntimeError("out of memory")
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return problem.loss_fn(model, batch)

    model, optimizer, pools, target = setting(problem)
    model.train()
    train(model, optimizer, problem.loss_fn, pools[:2])
    before = snapshot(model, optimizer)
    selector = selector_for(model, optimizer, target, loss_fn, horizon=3, derivative=derivative)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(islice(selector.stream(pools), 3))
    else:
        next(selector.stream(pools))
    assert calls > 0
    assert same(before, snapshot(model, optimizer))


# --- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_resumes_bit_for_bit(stop, kind, tmp_path):
    options = {"horizon": 3, "interval": 2, "nominal": "random", "seed": 3}

    def fresh():
        model, optimizer, pools, target = setting(dtype=torch.float32)
        if kind == "sgd":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, pools, selector_for(model, optimizer, target, **options)

    model, optimizer, pools, selector = fresh()
    whole = train(model, optimizer, image_loss, selector.stream(pools))
    final = [p.detach().clone() for p in model.parameters()]

    model, optimizer, pools, selector = fresh()
    source = iter(pools)
    first = train(model, optimizer, image_loss, selector.stream(source), stop)
    saved = [model.state_dict(), optimizer.state_dict(), selector.state_dict()]
    torch.save(saved, tmp_path / "state.pt")

    model, optimizer, _, selector = fresh()
    for part, state in zip(
        (model, optimizer, selector), torch.load(tmp_path / "state.pt"), strict=True
    ):
        part.load_state_dict(state)
    rest = train(model, optimizer, image_loss, selector.stream(source))
    assert [batch["key"] for batch in first + rest] == [batch["key"] for batch in whole]
    assert all(map(torch.equal, final, model.parameters()))


def test_a_resumed_selector_checks_its_derivatives_when_the_other_would():
    """Horizons above 1 alone use Hessian products: they wait for a check that fell due before."""

    def fresh():
        model, optimizer, pools, target = setting()
        horizon = HorizonSchedule([(0, 2), (1, 1), (4, 2)])
        selector = selector_for(model, optimizer, target, horizon=horizon)
        return model, optimizer, pools, selector

    model, optimizer, pools, selector = fresh()
    train(model, optimizer, image_loss, selector.stream(pools[:2]))
    selector.state.forms.recheck()
    train(model, optimizer, image_loss, selector.stream(pools[2:4]))
    assert selector.state_dict()["forms"]["unchecked"] == ["gradients"]
    *_, resumed = fresh()
    resumed.load_state_dict(selector.state_dict())
    assert resumed.state_dict()["forms"]["unchecked"] == ["gradients"]


def test_a_state_of_other_options_or_another_model_is_refused():
    model, optimizer, pools, target = setting()
    selector = selector_for(model, optimizer, target, horizon=2)
    selector.select(pools[0])
    state = selector.state_dict()
    with pytest.raises(ValueError, match="horizon: 2 saved, 3 here"):
        selector_for(model, optimizer, target, horizon=3).load_state_dict(state)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    with pytest.raises(ValueError, match=r"fit the trained parameters.*1\.bias"):
        selector_for(
            other, torch.optim.AdamW(other.parameters()), target, horizon=2
        ).load_state_dict(state)


# --- sensitivities of 0 -----------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_a_loss_that_does_not_use_the_parameters_is_refused(horizon):
    model, optimizer, pools, target = setting()

    def loss_fn(model, batch):
        return image_loss(model, batch).detach() + 0 * image_loss(model, batch)

    selector = selector_for(model, optimizer, target, loss_fn, horizon=horizon)
    with pytest.raises(ValueError, match=r"all 0 at a learning rate of 0\.003; check that loss_fn"):
        selector.select(pools[0], pools[1:])


def test_scored_parameters_without_a_say_are_refused():
    """As the inner half of an adapter whose outer half is still 0."""
    model, optimizer, pools, target = setting()
    torch.nn.init.zeros_(model[3].weight)
    selector = selector_for(model, optimizer, target, params=["1.*"], horizon=0)
    with pytest.raises(ValueError, match="`params` leaves some that it uses"):
        selector.select(pools[0])


def test_at_a_learning_rate_of_0_any_are_kept_and_it_is_said_once(caplog):
    model, optimizer, pools, target = setting(lr=0.0)
    kept = []
    for seed in (0, 0, 1):
        selector = selector_for(model, optimizer, target, horizon=0, seed=seed)
        caplog.clear()
        kept.append([selector.select(pool) and selector.last.indices.tolist() for pool in pools])
        said = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert said == [
            "the learning rate is 0: no example is better than another, and any are kept"
        ]
        assert not selector.last.scores.any()
    assert kept[0] == kept[1] != kept[2]
    assert {i for row in kept[0] for i in row} == set(range(10))


def test_a_target_that_is_fitted_later_ends_no_run():
    """The loss of a margin is flat once it is kept: any examples will do."""
    model, optimizer, pools, target = setting()
    flat = []

    def loss_fn(model, batch):
        return image_loss(model, batch) * (0.0 if flat else 1.0)

    selector = selector_for(model, optimizer, target, loss_fn, horizon=0)
    selector.select(pools[0])
    flat.append(True)
    selector.state.ahead = None
    selector.select(pools[1])
    assert not selector.last.scores.any()
    assert selector.last.indices.tolist() != [0, 1, 2, 3]


def test_options_that_are_objects_are_the_same_in_another_process():
    """What is shown of an object without a name of its own has its address in it."""

    class Longer:
        largest = 1

        def at(self, step):
            return 1

    shown = [SelectOptions(keep=4, horizon=Longer()).plain()["horizon"] for _ in range(2)]
    assert shown[0] == shown[1]
    assert "0x" not in shown[0]
