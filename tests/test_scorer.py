"""A scorer: it chooses as the model itself would where it is the same, and is trained beside it."""

import copy
import logging

import pytest
import torch
from torch import nn

from selectflow import AutoHorizon, Scorer, Selector
from selectflow.core.batches import tensors
from tests import reference
from tests.problems import PROBLEMS

PROBLEM = PROBLEMS[0]


class Dropped(nn.Module):
    """A small net with dropout, in float64."""

    def __init__(self, width=6):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, width), nn.GELU(), nn.Dropout(0.3), nn.Linear(width, 10)
        ).double()

    def forward(self, images):
        return self.net(images)


def adamw(model, lr=3e-3):
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)


def step(model, optimizer, batches, clip=None):
    optimizer.zero_grad()
    for batch in batches:
        (PROBLEM.loss_fn(model, batch).mean() / len(batches)).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("horizon", [0, 1, 3])
def test_a_twin_as_scorer_chooses_what_the_model_would(horizon, per):
    """The scorer has the model's weights and optimizer: every score is the same, to the bit."""
    model, make = PROBLEM.make()
    target, pools = [make(12), make(11)], [make(10) for _ in range(12)]
    seen = []
    for with_twin in (False, True):
        own = copy.deepcopy(model)
        optimizer = adamw(own)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
        scorer = None
        if with_twin:
            twin = copy.deepcopy(model)
            other = adamw(twin)
            schedule = torch.optim.lr_scheduler.StepLR(other, 2, 0.7)
            scorer = Scorer(twin, other, lr_scheduler=schedule, max_grad_norm=0.5)
        selector = Selector(
            own, optimizer, PROBLEM.loss_fn, target, 4, horizon, pools_per_update=per,
            lr_scheduler=scheduler, max_grad_norm=0.5, scorer=scorer,
        )  # fmt: skip
        parts, scores = [], []
        for batch in selector.stream(pools):
            scores.append(selector.last.scores)
            parts.append(batch)
            if len(parts) == per:
                step(own, optimizer, parts, 0.5)
                scheduler.step()
                parts = []
        seen.append((torch.stack(scores), weights(own)))
        if with_twin:
            assert torch.equal(weights(twin), weights(own))
            assert selector.last.scorer_loss > 0
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_frozen_scorer_ranks_by_products_of_its_gradients():
    model, make = PROBLEM.make()
    small = Dropped().eval()
    before = weights(small)
    target, pool = make(12), make(10)
    selector = Selector(model, adamw(model), PROBLEM.loss_fn, [target], 4, 0, scorer=Scorer(small))
    selector.select(pool)
    toward = reference.per_example_gradients(small, PROBLEM.loss_fn, target)
    toward = {name: sum(each[name] for each in toward) / len(toward) for name in toward[0]}
    expected = [
        float(reference.inner(toward, each))
        for each in reference.per_example_gradients(small, PROBLEM.loss_fn, pool)
    ]
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(selector.last.scores, expected, rtol=1e-6)
    assert torch.equal(weights(small), before)
    assert selector.last.scorer_loss is None
    assert selector.last.horizon == 0


def test_it_has_a_loss_and_a_view_of_its_own():
    """Scores are those of its own loss on its own view; the model never sees either."""
    model, make = PROBLEM.make()
    small = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).double()

    def half(batch):
        return {"small": nn.functional.avg_pool2d(batch["image"], 2), "label": batch["label"]}

    def loss_fn(module, batch):
        return nn.functional.cross_entropy(module(batch["small"]), batch["label"], reduction="none")

    target, pools = make(12), [make(10) for _ in range(3)]
    optimizer, other = adamw(model), adamw(small)
    selector = Selector(
        model, optimizer, PROBLEM.loss_fn, [target], 4, 0,
        scorer=Scorer(small, other, loss_fn, half),
    )  # fmt: skip
    alone = copy.deepcopy(small)
    alone_optimizer = adamw(alone)
    itself = Selector(alone, alone_optimizer, loss_fn, [half(target)], 4, 0)
    for pool in pools:
        kept = selector.select(pool)
        itself.select(half(pool))
        assert torch.equal(selector.last.scores, itself.last.scores)
        assert kept["image"].shape == (4, 1, 8, 8)
        assert selector.last.pool is pool
        alone_optimizer.zero_grad()
        loss_fn(alone, half(kept)).mean().backward()
        alone_optimizer.step()
        assert torch.equal(weights(alone), weights(small))
        step(model, optimizer, [kept])


def made(per=2, **options):
    """A model and a scorer with dropout, and what selects with them."""
    torch.manual_seed(0)
    model, small = Dropped(12), Dropped(5)
    optimizer, other = adamw(model), adamw(small)
    schedule = torch.optim.lr_scheduler.StepLR(other, 2, 0.7)
    _, make = PROBLEM.make()
    scorer = Scorer(small, other, lr_scheduler=schedule)
    target = [make(12), make(9)]
    how = {"horizon": 1, "pools_per_update": per} | options
    selector = Selector(model, optimizer, PROBLEM.loss_fn, target, 4, scorer=scorer, **how)
    return model, optimizer, selector, small, make


def trained(model, optimizer, selector, pools, per=2):
    found, parts = [], []
    for batch in selector.stream(pools):
        found.append(selector.last.scores)
        parts.append(batch)
        if len(parts) == per:
            step(model, optimizer, parts)
            parts = []
    return found


@pytest.mark.parametrize("stop_at", [3, 4])  # in the middle of an accumulated step, and after it
def test_it_is_resumed_to_the_bit(stop_at, tmp_path):
    model, optimizer, selector, small, make = made()
    pools = [make(10) for _ in range(10)]
    torch.manual_seed(5)
    parts, scores, state = [], [], None
    for at, batch in enumerate(selector.stream(pools), start=1):
        scores.append(selector.last.scores)
        parts.append(batch)
        if len(parts) == 2:
            step(model, optimizer, parts)
            parts = []
        if at == stop_at:
            torch.save(
                (selector.state_dict(), model.state_dict(), optimizer.state_dict(), parts,
                 torch.get_rng_state()),
                tmp_path / "state",
            )  # fmt: skip
    whole, whole_small = weights(model), weights(small)

    model, optimizer, selector, small, _ = made()
    state, own, moments, parts, random = torch.load(tmp_path / "state")
    model.load_state_dict(own)
    optimizer.load_state_dict(moments)
    selector.load_state_dict(state)
    torch.set_rng_state(random)
    peeked = selector.num_peeked
    for at, batch in enumerate(selector.stream(pools[stop_at + peeked :]), start=stop_at):
        assert torch.equal(selector.last.scores, scores[at])
        parts.append(batch)
        if len(parts) == 2:
            step(model, optimizer, parts)
            parts = []
    assert torch.equal(weights(model), whole)
    assert torch.equal(weights(small), whole_small)


def test_nothing_of_the_model_or_of_the_generators_moves():
    model, _, selector, small, make = made(per=1)
    pools = [make(10) for _ in range(3)]
    model.net[1].weight.grad = torch.ones_like(model.net[1].weight)
    before, random = weights(model), torch.get_rng_state()
    small_before = weights(small)
    for _ in range(2):
        selector.select(pools[0], iter(pools[1:]))
    assert torch.equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert (model.net[1].weight.grad == 1).all()
    assert model.training
    assert small.training
    assert not torch.equal(weights(small), small_before)
    assert all(param.grad is None for param in small.parameters())


def test_where_the_user_steps_it_the_selector_does_not():
    model, make = PROBLEM.make()
    small = Dropped().eval()
    selector = Selector(
        model, adamw(model), PROBLEM.loss_fn, [make(12)], 4, 1,
        scorer=Scorer(small, adamw(small), train=False),
    )  # fmt: skip
    before = weights(small)
    selector.select(make(10), iter([make(10)]))
    assert torch.equal(weights(small), before)


def test_a_step_whose_gradient_is_not_finite_is_left_out(caplog):
    model, make = PROBLEM.make()
    small = Dropped().eval()

    def loss_fn(module, batch):
        found = PROBLEM.loss_fn(module, batch)
        # training alone: passes that score are without a graph, or of whole batches
        return found * (float("nan") if len(found) == 4 and torch.is_grad_enabled() else 1.0)

    selector = Selector(
        model, adamw(model), PROBLEM.loss_fn, [make(12)], 4, 0,
        scorer=Scorer(small, adamw(small), loss_fn),
    )  # fmt: skip
    before = weights(small)
    selector.select(make(10))
    assert torch.equal(weights(small), before)
    assert "its step is left out" in caplog.text
    selector.select(make(10))  # it goes on


def test_an_error_says_that_it_is_the_scorers():
    model, make = PROBLEM.make()
    small = Dropped().eval()
    selector = Selector(
        model, adamw(model), PROBLEM.loss_fn, [make(12)], 4, 0, lr="auto",
        scorer=Scorer(small, adamw(small), lambda m, b: PROBLEM.loss_fn(m, b) * float("nan")),
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="step 0: of the scorer, losses must be finite"):
        selector.select(make(10))


# --- what its choice is worth ---------------------------------------------------------------------


def beside(model, is_good):
    """A twin as scorer; the bad one takes a pool's losses for gains: it keeps the worst."""
    twin = copy.deepcopy(model)

    def loss_fn(module, batch):
        found = PROBLEM.loss_fn(module, batch)
        return -found if len(found) == 32 and not is_good else found

    return Scorer(twin, adamw(twin, 1e-2), loss_fn)


def dirty(make, num):
    """Pools of which three quarters have any label."""
    pools = [make(32) for _ in range(num)]
    for pool in pools:
        pool["label"][:24] = torch.randint(10, (24,))
    return pools


@pytest.mark.parametrize("is_good", [True, False])
def test_what_its_choice_is_worth_is_measured(is_good, caplog):
    """Each pool comes once, in order, all the same."""
    caplog.set_level(logging.INFO, "selectflow")
    model, make = PROBLEM.make()
    optimizer = adamw(model, 1e-2)
    for _ in range(10):
        step(model, optimizer, [make(32)])
    target = [make(64), make(64)]
    selector = Selector(
        model, optimizer, PROBLEM.loss_fn, target, 8, 0, scorer=beside(model, is_good)
    )
    selector.state.worth.next_at = selector.state.worth.gap = 34
    pools, gains, seen = dirty(make, 86), [], []
    for batch in selector.stream(pools):
        seen.append(selector.last.pool)
        if selector.last.scorer_gain is not None:
            gains.append((selector.last.step, selector.last.scorer_gain))
        step(model, optimizer, [batch])
    assert all(one is other for one, other in zip(seen, pools, strict=False))
    assert len(seen) == 86
    # 10 steps were made before; each gap is twice the last
    assert [at for at, _ in gains] == [34, 68]
    assert all((gain > 0) == is_good for _, gain in gains)
    assert ("worth no more to the model than chance" in caplog.text) == (not is_good)


def test_control_steps_aside_where_the_scorer_is_bad():
    """Contests train the model itself on what the scorer keeps, and judge it."""
    model, make = PROBLEM.make()
    optimizer = adamw(model, 1e-2)
    for _ in range(10):
        step(model, optimizer, [make(32)])
    horizon = AutoHorizon(largest=0, gap=8, longest_gap=16, share=1.0, costs={0: 1.2})
    found = {}
    target, pools = [make(64), make(64)], dirty(make, 60)
    for is_good in (True, False):
        own = copy.deepcopy(model)
        mine = adamw(own, 1e-2)
        selector = Selector(
            own, mine, PROBLEM.loss_fn, target, 8, horizon, scorer=beside(model, is_good)
        )
        modes = []
        for batch in selector.stream(pools):
            modes.append(selector.last.scores is not None)
            step(own, mine, [batch])
        found[is_good] = sum(modes) / len(modes)
    assert found[False] < 0.1
    assert found[True] > 0.2


def test_a_contest_trains_the_model_on_what_the_scorer_keeps():
    """It is judged at the mean of the states of really doing it."""
    model, make = PROBLEM.make()
    small = Dropped().eval()
    optimizer, other = adamw(model), adamw(small)
    step(model, optimizer, [make(8)])
    target, judge, pools = make(12), make(9), [make(10) for _ in range(6)]
    twin, twin_optimizer = reference.clone(model, optimizer)
    copied = copy.deepcopy(small)
    selector = Selector(
        model, optimizer, PROBLEM.loss_fn, [target], 4, "auto", scorer=Scorer(small, other)
    )
    with selector._controls._scoring_both():
        found = selector._controls._contests._rollouts.judged(0, pools, target, judge, 5)
    real = Selector(
        twin, twin_optimizer, PROBLEM.loss_fn, [target], 4, 0,
        scorer=Scorer(copied, adamw(copied)),
    )  # fmt: skip
    twin.eval()
    states = []
    for batch in real.stream(pools[:5]):
        step(twin, twin_optimizer, [batch])
        states.append([param.detach().clone() for param in twin.parameters()])
    with torch.no_grad():
        for param, *each in zip(twin.parameters(), *states, strict=True):
            param.copy_(torch.stack(each).mean(0))
        torch.testing.assert_close(found, PROBLEM.loss_fn(twin, judge))


# --- what is refused ------------------------------------------------------------------------------


def build(scorer, horizon=0, **options):
    model, make = PROBLEM.make()
    optimizer = adamw(model)
    given = scorer(model) if callable(scorer) else scorer
    return Selector(
        model, optimizer, PROBLEM.loss_fn, [make(12)], 4, horizon, scorer=given, **options
    )


@pytest.mark.parametrize(
    ("scorer", "horizon", "message"),
    [
        (Scorer, 0, "parameters of its own.*score_view"),
        (lambda _: Scorer(Dropped().requires_grad_(False)), 0, "requires_grad=True, got none"),
        (lambda _: Scorer(Dropped()), 1, "frozen scorer must be 0"),
        (lambda _: Scorer(Dropped()), AutoHorizon(), "frozen scorer must be 0"),
    ],
    ids=["shared", "no gradients", "frozen", "frozen auto"],
)
def test_what_cannot_be_is_refused(scorer, horizon, message):
    with pytest.raises(ValueError, match=message):
        build(scorer, horizon)


def test_a_frozen_scorer_under_auto_has_two_rungs():
    selector = build(lambda _: Scorer(Dropped()), "auto")
    assert selector.state.horizon.rule.settings.ladder == (-1, 0)


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="need its optimizer, got None"):
        Scorer(Dropped(), max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"must be torch\.bfloat16 or None"):
        Scorer(Dropped(), autocast=torch.float16)


def test_a_state_with_a_scorer_needs_one():
    with_one, without = build(lambda _: Scorer(Dropped())), build(None)
    with pytest.raises(ValueError, match="got one in the saved state alone"):
        without.load_state_dict(with_one.state_dict())
    with pytest.raises(ValueError, match="got one here alone"):
        with_one.load_state_dict(without.state_dict())


def test_a_state_of_a_scorer_trained_otherwise_is_refused():
    def trained(model):
        small = Dropped()
        return Scorer(small, adamw(small))

    with pytest.raises(ValueError, match="saved state, frozen, got by AdamW without a schedule"):
        build(trained).load_state_dict(build(lambda _: Scorer(Dropped())).state_dict())


def test_what_a_choice_is_worth_is_told_of_choices_by_influence_alone():
    assert build(lambda _: Scorer(Dropped())).state.worth is not None
    assert build(lambda _: Scorer(Dropped()), strategy="loss").state.worth is None
    with pytest.raises(ValueError, match="scorer must be None for strategy 'uniform'"):
        build(lambda _: Scorer(Dropped()), strategy="uniform")


def test_a_saved_state_does_not_move_with_the_scorer():
    model, optimizer, selector, _, make = made(per=1)
    pools = [make(10) for _ in range(6)]
    trained(model, optimizer, selector, pools[:2], per=1)
    state = selector.state_dict()
    before = copy.deepcopy(state["scorer"])
    trained(model, optimizer, selector, pools[2:], per=1)
    after = [value for _, value in tensors(state["scorer"]["model"])]
    assert all(map(torch.equal, after, (value for _, value in tensors(before["model"]))))
    moments = [s["exp_avg"] for s in state["scorer"]["optimizer"]["state"].values()]
    assert all(
        map(torch.equal, moments, (s["exp_avg"] for s in before["optimizer"]["state"].values()))
    )
