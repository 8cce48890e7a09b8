"""Contests of horizons: what they measure is what the selector would really do."""

import pytest
import torch

from selectflow import AutoHorizon, Selector
from selectflow.core.lookahead import Upcoming
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


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2]], ids=lambda p: p.name)
def test_the_policy_of_horizon_0_is_simulated_as_it_is_carried_out(problem):
    """At H = 0 nothing is random: the contest's loss is that of really selecting and training."""
    model, optimizer, selector, make, target = parts(problem, AutoHorizon(largest=2))
    pools, judge = [make(10) for _ in range(6)], make(9)
    control = selector._contests
    updates, state = selector._optimizer.updates(6), selector._optimizer.state()
    with selector._objective.scoring():
        found, _ = control.loss_after(0, Upcoming(updates, state, pools, target), 3, judge)
    twin, other = reference.clone(model, optimizer)
    real = Selector(twin, other, problem.loss_fn, [target], 4, 0)
    twin.eval()
    for batch in real.stream(pools[:3]):
        other.zero_grad()
        problem.loss_fn(twin, batch).mean().backward()
        other.step()
    with torch.no_grad():
        assert found == pytest.approx(problem.loss_fn(twin, judge).mean().item(), rel=1e-9)


def test_an_interval_is_simulated_too():
    problem = PROBLEMS[0]
    model, optimizer, selector, make, target = parts(problem, AutoHorizon(largest=2), interval=3)
    pools, judge = [make(10) for _ in range(8)], make(9)
    updates, state = selector._optimizer.updates(8), selector._optimizer.state()
    with selector._objective.scoring():
        found, _ = selector._contests.loss_after(
            0, Upcoming(updates, state, pools, target), 5, judge
        )
    twin, other = reference.clone(model, optimizer)
    real = Selector(twin, other, problem.loss_fn, [target], 4, 0, interval=3)
    for batch in real.stream(pools[:5]):
        other.zero_grad()
        problem.loss_fn(twin, batch).mean().backward()
        other.step()
    with torch.no_grad():
        assert found == pytest.approx(problem.loss_fn(twin, judge).mean().item(), rel=1e-9)


def test_contests_lose_no_pool_and_move_nothing():
    """Pools come in order, each once, whatever contests peek at; the live model is untouched."""
    problem = PROBLEMS[0]
    model, optimizer, selector, make, _ = parts(
        problem, AutoHorizon(largest=4, gap=3, longest_gap=5)
    )
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
    assert selector.max_peeked == 8


def test_trust_is_the_proxy_of_the_whole_selection():
    """D / I and |Q| / |I| hang together: with the fast form D = I + Q."""
    problem = PROBLEMS[0]
    *_, selector, make, target = parts(problem, AutoHorizon(largest=4))
    pools = [make(10) for _ in range(8)]
    updates, state = selector._optimizer.updates(8), selector._optimizer.state()
    with selector._objective.scoring():
        found = selector._contests.trust(4, Upcoming(updates, state, pools, target))
    first, second = found["proxy_first_order"], found["proxy_second_order"]
    assert first < 0  # what is selected is expected to lower the target loss
    assert found["relative_error"] == pytest.approx(abs(second / first))
    assert found["trust_ratio"] == pytest.approx((first + second) / first)


def test_a_short_stream_ends_the_contests_not_the_run():
    problem = PROBLEMS[0]
    _, optimizer, selector, make, _ = parts(problem, AutoHorizon(largest=8, gap=2, contest_steps=4))
    for _ in selector.stream([make(10) for _ in range(4)]):
        assert selector.last.decisions == ()
        optimizer.step()


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


def test_a_contest_is_judged_by_the_batch_after_the_one_it_selects_by(monkeypatch):
    """Each horizon selects by batch 0 of the target; what decides is its loss on batch 1."""
    problem = PROBLEMS[0]
    *_, selector, make, _ = parts(problem, AutoHorizon(largest=1))
    control, targets = selector._contests, [make(5), make(6), make(7)]
    pools, drawn = [make(10) for _ in range(6)], iter(targets)
    selected, judged, before = [], [], control._policy.rollout

    def rollout(self, horizon, upcoming, *rest):
        selected.append(upcoming.target)
        end = before(horizon, upcoming, *rest)
        judged.append(selector._derivatives.losses(end[0].params, targets[1]).mean().item())
        return end

    monkeypatch.setattr(type(control._policy), "rollout", rollout)
    with selector._objective.scoring():
        decision = control.contest(50, pools, drawn.__next__)
    assert [batch is targets[0] for batch in selected] == [True, True]
    assert [decision.measures[f"loss_at_{h}"] for h in (0, 1)] == judged
    assert next(drawn) is targets[2]
