"""Contests: what they measure is what the selector would really do; and selection that is off."""

import math
from itertools import islice

import pytest
import torch

from selectflow import AutoHorizon, AutoRate, Selector
from selectflow.control.ladder import OFF, HorizonRule
from selectflow.control.rollouts import compared
from selectflow.control.state import SelectorState, TargetSet, halves
from selectflow.core.batches import MicroBatches, in_parts, num_examples, tensors
from selectflow.core.forms import Forms
from selectflow.core.lookahead import Policy, Upcoming
from selectflow.core.target import Cycle
from selectflow.distributed import ALONE
from tests import reference
from tests.problems import PROBLEMS


def parts(problem, horizon, **options):
    model, make = problem.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):  # moments that are not empty
        optimizer.zero_grad()
        problem.loss_fn(model, make(8)).mean().backward()
        optimizer.step()
    target = make(12)
    selector = Selector(model, optimizer, problem.loss_fn, [target], 4, horizon, **options)
    return model, optimizer, selector, make, target


COSTS = {0: 2.5, 1: 4.0, 2: 6.0}


def restless(**settings):
    """Contests at every third step, whatever they cost; costs are given, not measured."""
    defaults = {
        "largest": 2,
        "gap": 3,
        "longest_gap": 3,
        "contest_steps": 3,
        "share": 1.0,
        "early_share": 1e6,
    }
    return AutoHorizon(**{"costs": COSTS, "early": 1000} | defaults | settings)


def rows(batch):
    """The first tensor of a batch."""
    return next(tensor for _, tensor in tensors(batch))


def equal(one, other):
    return all(
        torch.equal(a, b) for (_, a), (_, b) in zip(tensors(one), tensors(other), strict=True)
    )


def train_on(model, optimizer, problem, batch):
    optimizer.zero_grad()
    problem.loss_fn(model, batch).mean().backward()
    optimizer.step()


def upcoming(selector, pools, target, num=12):
    updates, state = selector._optimizer.updates(num), selector._optimizer.state()
    return Upcoming(updates, state, pools, target)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2]], ids=lambda p: p.name)
def test_the_policy_of_horizon_0_is_simulated_as_it_is_carried_out(problem, interval):
    """At H = 0 nothing is random: it is judged at the mean of the states of really selecting."""
    model, optimizer, selector, make, target = parts(problem, restless(), interval=interval)
    pools, judge = [make(10) for _ in range(8)], make(9)
    with selector._objective.scoring():
        found = selector._controls._contests._rollouts.judged(0, pools, target, judge, 5)
    twin, other = reference.clone(model, optimizer)
    real = Selector(twin, other, problem.loss_fn, [target], 4, 0, interval=interval)
    twin.eval()
    states = []
    for batch in real.stream(pools[:5]):
        train_on(twin, other, problem, batch)
        states.append([param.detach().clone() for param in twin.parameters()])
    torch.testing.assert_close(found, at_the_mean(problem, twin, states, judge))


def at_the_mean(problem, model, states, judge):
    """Losses of the judge's examples at the mean of the states."""
    with torch.no_grad():
        for param, *each in zip(model.parameters(), *states, strict=True):
            param.copy_(torch.stack(each).mean(0))
        return problem.loss_fn(model, judge)


@pytest.mark.parametrize("pools_per_update", [1, 2])
def test_plain_training_is_simulated_as_it_is_carried_out(pools_per_update):
    """Pools of 10 in parts of 5, all of them, in the order that the generator gives."""
    problem = PROBLEMS[0]
    model, optimizer, selector, make, target = parts(
        problem, restless(), pools_per_update=pools_per_update
    )
    pools, judge = [make(10) for _ in range(4)], make(9)
    twin, other = reference.clone(model, optimizer)
    twin.eval()
    generator = torch.Generator().manual_seed(0)  # as the control's own begins
    steps = [part for pool in pools for part in in_parts(pool, 2, generator)]
    with selector._objective.scoring():
        found = selector._controls._contests._rollouts.judged(OFF, pools, target, judge, 4)
    states = []
    for number in range(4):
        made = steps[number * pools_per_update : (number + 1) * pools_per_update]
        other.zero_grad()
        for part in made:
            (problem.loss_fn(twin, part).mean() / len(made)).backward()
        other.step()
        states.append([param.detach().clone() for param in twin.parameters()])
    torch.testing.assert_close(found, at_the_mean(problem, twin, states, judge))


def test_pools_that_do_not_last_for_the_steps_judge_nothing():
    *_, selector, make, target = parts(PROBLEMS[0], restless())
    rollouts, pools = selector._controls._contests._rollouts, [make(10) for _ in range(4)]
    with selector._objective.scoring():
        for rung, most in ((OFF, 8), (0, 4), (2, 4)):
            assert rollouts.judged(rung, pools, target, make(9), most) is not None
            assert rollouts.judged(rung, pools, target, make(9), most + 1) is None


def test_two_rungs_are_compared_example_by_example():
    """Losses 1 2 6 and 0 2 4: lower by 1 0 2, whose mean is 1 and standard error 1 / sqrt(3)."""
    losses = {OFF: torch.tensor([1.0, 2.0, 6.0]), 0: torch.tensor([0.0, 2.0, 4.0])}
    means, error = compared(losses, ALONE)
    assert means == {OFF: 3.0, 0: 2.0}
    assert error == pytest.approx(1 / 3**0.5)
    assert compared({rung: each[:1] for rung, each in losses.items()}, ALONE)[1] == math.inf


def test_contests_lose_no_pool_and_move_nothing():
    """Pools come in order, each once, whatever contests peek at; the live model is untouched."""
    problem = PROBLEMS[0]
    model, optimizer, selector, make, _ = parts(problem, restless(off=False))
    pools = [make(10) for _ in range(30)]
    seen, decided = [], 0
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    for _ in selector.stream(pools):
        seen.append(selector.last.pool)
        decided += len(selector.last.decisions)
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(now, before)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()  # a step without a gradient still decays and follows the moments
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    assert all(mine is theirs for mine, theirs in zip(seen, pools, strict=True))
    assert decided >= 3


def test_trust_is_the_proxy_of_the_whole_selection():
    """D / I and |Q| / |I| hang together: with the fast form D = I + Q."""
    problem = PROBLEMS[0]
    *_, selector, make, target = parts(problem, AutoHorizon(largest=4))
    pools = [make(10) for _ in range(8)]
    with selector._objective.scoring():
        found = selector._controls._contests.trust(4, upcoming(selector, pools, target))
    first, second = found["proxy_first_order"], found["proxy_second_order"]
    assert first < 0  # what is selected is expected to lower the target loss
    assert found["relative_error"] == pytest.approx(abs(second / first))
    assert found["trust_ratio"] == pytest.approx((first + second) / first)


def test_a_short_stream_ends_the_contests_not_the_run():
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, restless(off=False, contest_steps=8))
    for _ in selector.stream([make(10) for _ in range(2)]):
        assert selector.last.decisions == ()
        optimizer.step()


def test_pools_that_do_not_last_for_plain_training_decide_nothing():
    """Of 6 candidates 4 are kept: one batch a pool, and a selected step costs 9 of them."""
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(
        problem, restless(largest=0, costs={0: 9.0}, gap=1, contest_steps=8)
    )
    for _ in selector.stream([make(6) for _ in range(7)]):
        assert selector.last.decisions == ()
        optimizer.step()
    assert selector.state.horizon.spent == 0  # nor cost anything


def test_a_target_loss_that_is_not_finite_decides_nothing():
    problem = PROBLEMS[0]
    *_, selector, make, target = parts(problem, restless())
    pools, judge = [make(10) for _ in range(9)], make(9)
    next(tensor for _, tensor in tensors(judge) if tensor.is_floating_point()).fill_(torch.nan)
    with selector._objective.scoring():
        assert selector._controls._contests.contest(pools, 2, target, judge) is None
    assert selector.state.horizon.next_at > 0
    assert selector.state.horizon.spent == 0  # nothing was rolled out


def test_auto_is_the_default_settings():
    problem = PROBLEMS[0]
    model, make = problem.make()
    optimizer = torch.optim.AdamW(model.parameters())
    selector = Selector(model, optimizer, problem.loss_fn, [make(4)], 4, "auto")
    assert selector.state.horizon.rule.settings == AutoHorizon()
    with pytest.raises(ValueError, match=r"lr must be one of schedule, auto, .* got 'fast'"):
        Selector(model, optimizer, problem.loss_fn, [make(4)], 4, lr="fast")
    with pytest.raises(ValueError, match="horizon must be an integer >= 0"):
        Selector(model, optimizer, problem.loss_fn, [make(4)], 4, "automatic")


# --- who selects by what, and who judges ----------------------------------------------------------


def watched(selector, monkeypatch):
    """The batches that a contest selects by, and those that it is judged by, as they are used."""
    selected, judged = [], []
    rollouts = type(selector._controls._contests._rollouts)
    look_ahead, losses = Policy.look_ahead, rollouts.judged

    def look(self, horizon, future, *rest, **how):
        selected.append(future.target)
        return look_ahead(self, horizon, future, *rest, **how)

    def judge(self, rung, pools, target, judge, num):
        judged.append(judge)
        return losses(self, rung, pools, target, judge, num)

    monkeypatch.setattr(Policy, "look_ahead", look)
    monkeypatch.setattr(rollouts, "judged", judge)
    return selected, judged


def until_decided(selector, optimizer, pools):
    for _ in selector.stream(pools):
        if selector.last.decisions:
            return selector.last.decisions[0]
        optimizer.step()
    raise AssertionError("a contest must be held")


def test_a_contest_is_judged_by_the_batches_after_the_one_it_selects_by(monkeypatch):
    """All select by batch 0 of the target; what decides is their loss on the other two."""
    problem = PROBLEMS[0]
    model, make = problem.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_on(model, optimizer, problem, make(8))
    targets = [make(5), make(6), make(7)]
    selector = Selector(model, optimizer, problem.loss_fn, targets, 4, restless(gap=1))
    selector.state.horizon.next_look = 1e9  # a look would draw the first
    selected, judged = watched(selector, monkeypatch)
    until_decided(selector, optimizer, [make(10) for _ in range(9)])
    assert len(selected) == 3
    assert all(batch is targets[0] for batch in selected)
    assert [[id(part) for part in batch.parts] for batch in judged] == 2 * [
        [id(batch) for batch in targets[1:]]
    ]


def test_a_single_batch_of_the_target_is_halved(monkeypatch):
    problem = PROBLEMS[0]
    _, optimizer, selector, make, target = parts(problem, restless(gap=1))
    selected, judged = watched(selector, monkeypatch)
    until_decided(selector, optimizer, [make(10) for _ in range(9)])
    mine, others = halves(target)
    assert all(equal(batch, mine) for batch in selected)
    assert all(equal(batch, others) for batch in judged)
    assert num_examples(mine) == num_examples(others) == 6


@pytest.mark.parametrize(
    ("sizes", "judges"),
    [([12, 40, 40, 40], [1, 2]), ([12, 9, 9, 9], [1, 2, 3]), ([12, 70, 9], [1])],
)
@pytest.mark.parametrize("kind", [list, lambda batches: (b for b in batches)])
def test_what_judges_has_some_64_examples_where_the_target_has_them(sizes, judges, kind):
    _, make = PROBLEMS[0].make()
    batches = [make(size) for size in sizes]
    state = SelectorState(torch.Generator(), Forms(), None, None)
    targets = TargetSet(Cycle(kind(batches)), None, state)
    target, judge = targets.next_and_judge(ALONE)
    assert target is batches[0]
    parts = judge.parts if isinstance(judge, MicroBatches) else [judge]
    assert [id(part) for part in parts] == [id(batches[place]) for place in judges]
    following = (judges[-1] + 1) % len(batches)
    assert targets.next() is batches[following]


def test_a_single_example_judges_itself():
    one = {"x": torch.ones(1, 2)}
    assert halves(one) == (one, one)


# --- what it may cost -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_losing", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_contests_cost_no_more_than_their_share(share, is_losing):
    """In plain steps: each takes 2 x 2 steps of 2.5, and a quarter more for what goes with it.

    Twice their share where training loses ground all the time.
    """
    problem = PROBLEMS[0]
    early = round(share * 100)
    settings = restless(largest=0, costs={0: 2.5}, contest_steps=2, share=share, early=early)
    _, optimizer, selector, make, _ = parts(problem, settings)
    state, held, spent = selector.state.horizon, 0, 0.0
    state.next_look = math.inf
    share *= 1 + is_losing
    for _ in islice(selector.stream(make(10) for _ in range(400)), 300):
        state.is_urgent = is_losing
        held += len(selector.last.decisions)
        assert state.spent <= share * max(state.training, 100)
        assert state.spent - spent in (0.0, 12.5)
        spent = state.spent
        optimizer.step()
    assert state.spent == held * 12.5
    assert held >= 1
    assert state.spent + 12.5 + 3 > share * state.training  # nor much less, while they are wanted


def test_early_contests_take_no_more_than_half_of_what_was_trained():
    """The first costs 12.5 plain steps and is made after 25, the second after 50."""
    settings = restless(largest=0, costs={0: 2.5}, contest_steps=2, share=0.3, early_share=0.5)
    _, optimizer, selector, make, _ = parts(PROBLEMS[0], settings)
    state, at = selector.state.horizon, []
    for _ in islice(selector.stream(make(10) for _ in range(60)), 80):
        if selector.last.decisions:
            at.append(state.training)
        assert state.spent <= 0.5 * state.training
        optimizer.step()
    assert at[0] == pytest.approx(25, abs=1)
    assert at[1] == pytest.approx(50, abs=2.5)


@pytest.mark.parametrize(
    ("first", "num_steps", "last"), [(None, 60, 22), (None, 37, -1), (0, 45, 30)]
)
def test_none_is_held_that_the_rest_of_the_run_could_not_repay(first, num_steps, last):
    """A contest costs 12.5 plain steps; three times that must be left, 15 of selected steps."""
    settings = restless(largest=0, costs={0: 2.5}, contest_steps=2, first=first)
    _, optimizer, selector, make, _ = parts(PROBLEMS[0], settings, num_steps=num_steps)
    held, rule = [-1], selector.state.horizon.rule
    for _ in islice(selector.stream(make(10) for _ in range(80)), num_steps):
        if selector.last.decisions:
            held.append(selector.last.step)
            rule.horizon = rule.settings.ladder[0] if first is None else first  # as it began
        optimizer.step()
    assert last - 4 < held[-1] <= last


def test_training_is_counted_in_plain_steps():
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, AutoHorizon(costs={0: 2.5}, largest=0))
    state = selector.state.horizon
    stream = selector.stream(make(10) for _ in range(90))
    for _ in islice(stream, 7):
        optimizer.step()
    assert state.training == 6  # the seventh is not over
    state.rule.horizon = 0
    for _ in islice(stream, 5):
        optimizer.step()
    # two parts a pool: the seventh step, the eighth of the same pool, then selected steps
    assert state.training == pytest.approx(6 + 2.5 * 5)


def test_what_is_measured_holds_until_it_is_clearly_another():
    from selectflow.control.contests import _held  # noqa: PLC0415

    assert _held(None, 3.0) == 3.0
    assert _held(3.0, 3.7) == 3.0
    assert _held(3.0, 2.5) == 3.0
    assert _held(3.0, 3.8) == 3.8
    assert _held(3.0, 2.3) == 2.3


def test_the_cost_of_selection_is_measured():
    """A pool of 40 against a step on 4: more than a plain step, on any machine."""
    problem = PROBLEMS[0]
    settings = restless(costs=None, contest_steps=2, gap=8, longest_gap=8, largest=0)
    _, optimizer, selector, make, _ = parts(problem, settings)
    for batch in islice(selector.stream(make(40) for _ in range(30)), 40):
        train_on(selector._objective.model, optimizer, problem, batch)
    state = selector.state.horizon
    assert state.costs.keys() == {0}
    assert 1.0 < state.costs[0] < 1000.0
    assert len(state.times) >= 4
    assert state.spent > 0


# --- while nothing is selected --------------------------------------------------------------------


def off(**settings):
    """Plain training, without contests."""
    return AutoHorizon(**{"gap": 3000, "costs": {0: 2.0}, "largest": 0} | settings)


def test_all_of_every_pool_is_trained_on_in_parts():
    """Pools of 11 and keep 4: parts of 6 and 5, each example once, none scored or peeked at."""
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, off())
    pools = [make(11) for _ in range(3)]
    drawn = []

    def source():
        for index, pool in enumerate(pools):
            drawn.append(index)
            yield pool

    seen = []
    for number, batch in enumerate(selector.stream(source())):
        last = selector.last
        assert drawn[-1] == number // 2  # no pool before its time
        assert (last.scores, last.losses, last.horizon, last.target_loss) == (None,) * 4
        assert last.pool is batch
        assert last.indices.tolist() == list(range(len(rows(batch))))
        seen.append(rows(batch))
        optimizer.step()
    assert list(map(len, seen)) == [6, 5] * 3
    for index, pool in enumerate(pools):
        got = torch.cat(seen[2 * index : 2 * index + 2])
        assert torch.equal(got.sort(0).values, rows(pool).sort(0).values)
        assert not torch.equal(got, rows(pool))  # in random order


def test_select_alone_gives_a_random_part_and_drops_the_rest():
    """For loops that count on one batch of each pool."""
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, off())
    head = selector.select(make(8))
    assert len(rows(head)) == 4
    assert len(selector.state.rest) == 1
    optimizer.step()
    second = make(8)
    kept = selector.select(second)
    assert torch.isin(rows(kept), rows(second)).all()
    assert [len(rows(part)) for part in selector.rest()] == [4]
    assert not list(selector.rest())


def test_nothing_is_chosen_from_a_pool_of_as_many_as_are_kept():
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, restless(gap=1))
    pools = [make(4) for _ in range(30)]
    for batch, pool in zip(selector.stream(pools), pools, strict=True):
        assert selector.num_peeked == 0
        assert torch.equal(rows(batch).sort(0).values, rows(pool).sort(0).values)
        assert selector.last.decisions == ()
        optimizer.step()


def test_a_stream_that_was_left_goes_on_with_the_rest_of_its_pool():
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, off())
    pools = [make(8) for _ in range(2)]
    head = next(iter(selector.stream(pools[:1])))
    optimizer.step()
    rest, *others = selector.stream(pools[1:])
    assert torch.equal(
        torch.cat([rows(head), rows(rest)]).sort(0).values, rows(pools[0]).sort(0).values
    )
    assert [len(rows(batch)) for batch in others] == [4, 4]


def test_a_target_loss_that_rises_makes_a_contest_due():
    problem = PROBLEMS[0]
    model, optimizer, selector, make, _ = parts(problem, off(gap=50))
    state = selector.state.horizon
    state.next_at = 3000.0  # as after many contests in which nothing changed
    stream = selector.stream(make(8) for _ in range(99))
    for _ in islice(stream, 70):  # looks at 0 and 64
        assert selector.last.decisions == ()
        optimizer.step()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    held = []
    for _ in islice(stream, 70):  # one at 128
        held += selector.last.decisions
        optimizer.step()
    assert [decision.what for decision in held] == ["horizon"]
    assert state.next_at < 128 + 2 * 50 + 1


def scale(model, factor):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(factor)


def test_a_jump_after_which_no_contest_could_soon_end_selection_is_a_rise():
    model, make = PROBLEMS[0].make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    train_on(model, optimizer, PROBLEMS[0], make(8))
    settings = off(gap=20, longest_gap=20)
    selector = Selector(model, optimizer, PROBLEMS[0].loss_fn, [make(200)], 4, settings)
    state = selector.state.horizon
    state.spent, state.next_at = 1000.0, 1e9
    for number, _ in enumerate(islice(selector.stream(make(8) for _ in range(199)), 140)):
        if number == 70:
            scale(model, 12)
        assert not selector.last.decisions
        optimizer.step()
    assert (state.rule.horizon, state.is_urgent, state.has_jumped) == (OFF, True, False)


@pytest.mark.parametrize(("pool", "num_target"), [(4, 200), (8, 20)])
def test_no_jump_where_nothing_could_be_left_out_or_few_examples_tell(pool, num_target):
    """A pool of just what is kept, which selection would score for nothing; a target of 20."""
    model, make = PROBLEMS[0].make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    train_on(model, optimizer, PROBLEMS[0], make(8))
    selector = Selector(model, optimizer, PROBLEMS[0].loss_fn, [make(num_target)], 4, off(gap=3000))
    for number, _ in enumerate(islice(selector.stream(make(pool) for _ in range(199)), 140)):
        if number == 70:
            scale(model, 40)
        assert selector.last.scores is None
        optimizer.step()
    assert not selector.state.horizon.has_jumped


def test_where_the_target_loss_jumps_it_selects_at_once_and_is_watched():
    """No contest says so; one is due again where the loss has fallen under selection."""
    model, make = PROBLEMS[0].make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train_on(model, optimizer, PROBLEMS[0], make(8))
    settings = off(gap=3000, longest_gap=3000)
    selector = Selector(model, optimizer, PROBLEMS[0].loss_fn, [make(200)], 4, settings)
    state = selector.state.horizon
    stream = selector.stream(make(8) for _ in range(199))
    made = []

    def go(num):
        for _ in islice(stream, num):
            made.extend(selector.last.decisions)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()

    go(70)  # looks at a cost of 0 and of 64
    scale(model, 12)
    go(70)  # one at 128, at which nothing is selected any more
    (decision,) = made
    assert (decision.before, decision.after, state.rule.horizon) == ("off", 0, 0)
    assert "jumped from" in decision.reason
    assert decision.measures["loss_now"] > 1.5 * decision.measures["loss_before"]
    assert (state.spent, state.has_jumped, state.is_urgent) == (0.0, True, False)
    assert state.next_at == 128 + 3000
    assert selector.last.scores is not None
    go(35)  # a step costs 2 plain ones; the loss is high at the first look
    assert state.best is not None
    scale(model, 1 / 12)
    go(35)
    assert "plain training in the same time" in made[1].reason
    assert state.training < 400  # far from 128 + 3000


@pytest.mark.parametrize("is_one", [True, False])
def test_a_rise_that_one_example_makes_is_none(is_one):
    """The mean is half higher: by one example's loss, or by all."""
    _, optimizer, selector, make, _ = parts(PROBLEMS[0], off(gap=50))
    state = selector.state.horizon
    stream = selector.stream(make(8) for _ in range(99))
    for _ in islice(stream, 62):  # a look at 0
        optimizer.step()
    with selector._objective.scoring():  # as the next will
        now = selector._controls._contests._rollouts.losses(
            selector._optimizer.state().params, state.judge
        )
    lower = now.clone()
    lower[: 1 if is_one else None] -= now.mean() / 3 * (len(now) if is_one else 1)
    state.best = lower
    for _ in islice(stream, 10):
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    assert state.next_look == 128
    assert state.is_urgent != is_one


def test_other_strategies_are_never_off():
    problem = PROBLEMS[0]
    *_, selector, make, _ = parts(problem, "auto", strategy="uniform")
    selector.select(make(8))
    assert selector.last.scores is not None
    assert not selector.state.horizon.rule.settings.off


@pytest.mark.parametrize("pools_per_update", [1, 2])
@pytest.mark.parametrize("cut", [5, 12, 19, 26, 40])
def test_it_is_resumed_bit_for_bit_through_changes(cut, pools_per_update, tmp_path, monkeypatch):
    """Each contest switches selection on or off; also in the middle of a pool."""
    problem = PROBLEMS[0]
    monkeypatch.setattr(
        HorizonRule,
        "_winner",
        lambda rule, cheap, dear, *_: (dear if rule.horizon == cheap else cheap, "in turn"),
    )

    def build():
        model, make = problem.make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        selector = Selector(
            model, optimizer, problem.loss_fn, [make(9), make(9)], 4,
            restless(largest=0, costs={0: 2.0}),
            lr=AutoRate(window=4), pools_per_update=pools_per_update,
        )  # fmt: skip
        return model, optimizer, selector, [make(13) for _ in range(60)]

    def advance(model, optimizer, stream, selector, num):
        seen = []
        for number, batch in enumerate(islice(stream, num), start=1):
            last = selector.last
            seen.append((last.horizon, last.step, len(rows(batch)), list(last.decisions)))
            (problem.loss_fn(model, batch).mean() / pools_per_update).backward()
            if number % pools_per_update == 0:
                optimizer.step()
                optimizer.zero_grad()
        return seen

    cut -= cut % pools_per_update
    model, optimizer, selector, pools = build()
    seen = advance(model, optimizer, selector.stream(pools), selector, 60)
    modes = [horizon for horizon, *_ in seen]
    assert None in modes
    assert 0 in modes
    first, opt, sel, pools = build()
    source = iter(pools)
    head = advance(first, opt, sel.stream(source), sel, cut)
    torch.save([first.state_dict(), opt.state_dict(), sel.state_dict()], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    second, opt2, sel2, _ = build()
    for part, state in zip((second, opt2, sel2), states, strict=True):
        part.load_state_dict(state)
    tail = advance(second, opt2, sel2.stream(source), sel2, 60 - cut)
    assert head + tail == seen
    for mine, theirs in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_where_no_contest_ever_fits_it_is_said_once(caplog):
    """A selected step takes as long as 30 plain ones, and plain training makes one of a pool."""
    problem = PROBLEMS[0]
    settings = restless(largest=0, costs={0: 30.0}, contest_steps=2, gap=1, early=10_000)
    model, make = problem.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    selector = Selector(model, optimizer, problem.loss_fn, [make(8), make(8)], 6, settings)
    selector.state.horizon.next_look = math.inf
    for _ in islice(selector.stream(make(10) for _ in range(99)), 12):
        assert not selector.last.decisions
        train_on(model, optimizer, problem, make(4))
    (record,) = caplog.records
    assert "H = 0 and plain training cannot be compared" in record.getMessage()
    assert "as long as 30.0 of the latter, which makes 1 of a pool" in record.getMessage()
