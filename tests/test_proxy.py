"""I and Q of a change of training against nested jvps of the whole run, and against real reruns."""

import dataclasses
import math

import pytest
import torch
from problems import PROBLEMS, Problem, image_loss
from reference import adamw_rollout, clone, first_and_second, inner, per_example_gradients, rerun
from torch import nn

from selectflow.audit.reruns import effects
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate
from selectflow.core.passes import Objective
from selectflow.core.proxy import closed_form, probe, relative_error
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import learning_rate, removals, rollout, selection

MLP, CNN, TRANSFORMER = PROBLEMS
SIZE, KEPT, NUM = 8, 3, 3
KINDS = ["removal", "selection", "learning_rate"]


def adamw(params, lr=3e-3):
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))


@dataclasses.dataclass
class Case:
    """A model in the middle of training, a window of pools after that point and a target."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    problem: Problem
    pools: list
    target: dict
    derivatives: Derivatives
    reader: OptimizerReader

    @property
    def window(self):
        """The first arguments of all that is tested."""
        return self.derivatives, self.reader.updates(len(self.pools)), self.reader.state()


def case(problem=MLP, warm=10, build=adamw, dtype=torch.float64, clip=None, num=NUM):
    model, make = problem.make(dtype)
    optimizer = build(model.parameters())
    model.eval()
    for _ in range(warm):
        optimizer.zero_grad()
        problem.loss_fn(model, make(SIZE)).mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    optimizer.zero_grad()
    pools, target = [make(SIZE) for _ in range(num)], make(10)
    reader = OptimizerReader(model, optimizer, None, clip)
    derivatives = Derivatives(Objective(model, problem.loss_fn), "exact")
    return Case(model, optimizer, problem, pools, target, derivatives, reader)


def change(kind, pools, seed=0):
    """A perturbation, and the same written by hand: (w0, dw) of each pool, share of the rate."""
    generator = torch.Generator().manual_seed(seed)
    even = torch.full((SIZE,), 1 / SIZE, dtype=torch.float64)
    by_hand = [(even.clone(), torch.zeros(SIZE).double()) for _ in pools]
    if kind == "learning_rate":
        return learning_rate(pools, [0.7]), by_hand, 0.7
    if kind == "removal":
        without = torch.full((SIZE,), 1 / (SIZE - 1), dtype=torch.float64)
        without[5] = 0
        by_hand[0] = even, without - even
        return removals(pools, [5]), by_hand, 0.0
    drawn = [torch.randperm(SIZE, generator=generator) for _ in pools]
    nominal, chosen = [d[:KEPT] for d in drawn], [d[2 : 2 + KEPT + 1] for d in drawn]
    for (base, move), now, then in zip(by_hand, nominal, chosen, strict=True):
        base.zero_()[now] = 1 / KEPT
        move[then] = 1 / (KEPT + 1)
        move.sub_(base)
    return selection(pools, nominal, chosen), by_hand, 0.0


def by_torch(case, by_hand, share, num, alpha=1.0):
    """Target loss after really training `num` batches by torch.optim with the weights at alpha."""
    extra = [
        (step, index, float(base[index] + alpha * move[index]) - 1 / SIZE)
        for step, (base, move) in enumerate(by_hand[:num])
        for index in range(SIZE)
    ]
    model, optimizer = clone(case.model, case.optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= 1 + alpha * share
    how = {"weights": extra, "max_grad_norm": case.reader.updates(1)[0].max_grad_norm}
    return rerun(model, optimizer, case.problem.loss_fn, case.pools[:num], case.target, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("problem", "clip"), [(MLP, None), (MLP, 0.5), (CNN, 0.5)], ids=["mlp", "mlp-clipped", "cnn"]
)
def test_every_horizon_equals_nested_jvps_of_the_whole_run(problem, kind, clip):
    at = case(problem, clip=clip)
    perturbation, by_hand, share = change(kind, at.pools)
    first, second = closed_form(*at.window, perturbation, at.target)
    assert first.shape == second.shape == (1, NUM + 1)
    for h in (1, 2, NUM):
        run = adamw_rollout(
            at.model, at.optimizer, problem.loss_fn, at.pools[:h], by_hand[:h], at.target,
            share, clip,
        )  # fmt: skip
        expected = first_and_second(run)
        assert abs(expected[0]) > 1e-6
        assert abs(expected[1]) > 1e-8
        assert first[0, h].item() == pytest.approx(expected[0], rel=1e-8)
        assert second[0, h].item() == pytest.approx(expected[1], rel=1e-7)


BUILDS = {
    "adamw": adamw,
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(
        p, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", BUILDS)
def test_every_optimizer_by_differences_of_torch_reruns(build, kind):
    at = case(build=BUILDS[build], clip=0.8)
    check_by_differences(at, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_layer_norm_by_differences_of_torch_reruns(kind):
    check_by_differences(case(TRANSFORMER), kind)


def check_by_differences(at, kind):
    perturbation, by_hand, share = change(kind, at.pools)
    first, second = closed_form(*at.window, perturbation, at.target)
    for h in range(1, len(at.pools) + 1):
        ends = {alpha: by_torch(at, by_hand, share, h, alpha) for alpha in (-1e-3, 0, 1e-3)}
        slope = (ends[1e-3] - ends[-1e-3]) / 2e-3
        bend = (ends[1e-3] - 2 * ends[0] + ends[-1e-3]) / 1e-6
        assert abs(slope) > 1e-7
        assert first[0, h].item() == pytest.approx(slope, rel=1e-4)
        assert second[0, h].item() == pytest.approx(bend / 2, rel=1e-3)


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_horizon_zero_is_the_move_through_the_present_preconditioner(problem):
    """I_0 is what the immediate scores add up to; Q_0 how the target loss bends along the move."""
    at = case(problem)
    perturbation, by_hand, _ = change("selection", at.pools)
    derivatives, updates, state = at.window
    first, second = closed_form(*at.window, perturbation, at.target)
    gamma = immediate(derivatives, updates[0], state, at.target).sensitivities[0]
    grads = per_example_gradients(at.model, problem.loss_fn, at.pools[0])
    slopes = torch.tensor([inner(grad, gamma) for grad in grads], dtype=torch.float64)
    assert first[0, 0].item() == pytest.approx(float(slopes @ by_hand[0][1]), rel=1e-9)

    mean = {n: sum(w * g[n] for w, g in zip(by_hand[0][1], grads, strict=True)) for n in gamma}
    rule = updates[0].rules[0]
    corrected = {n: v / (1 - rule.beta2 ** (rule.step - 1)) for n, v in state.exp_avg_sq.items()}
    scale = -rule.lr * (1 - rule.beta1) / (1 - rule.beta1**rule.step)
    move = {n: scale * g / (corrected[n].sqrt() + rule.eps) for n, g in mean.items()}

    def read(alpha):
        model, _ = clone(at.model, at.optimizer)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(move[name], alpha=alpha)
            return problem.loss_fn(model, at.target).mean().item()

    bend = (read(1) - 2 * read(0) + read(-1)) / 2
    assert second[0, 0].item() == pytest.approx(bend, rel=0.02)
    (states, *_) = list(rollout(*at.window, perturbation, (0.0, 1.0)))
    found = derivatives.losses(states[1].params, at.target).mean().item()
    assert found == pytest.approx(read(1), rel=1e-12)


def test_a_learning_rate_does_nothing_at_horizon_zero():
    at = case()
    found = probe(*at.window, learning_rate(at.pools, [1.0]), at.target)
    assert found.first[0] == found.second[0] == found.effect[0] == found.relative_error[0] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_out_is_training_by_torch(kind, alpha):
    at = case(CNN, clip=0.5)
    perturbation, by_hand, share = change(kind, at.pools)
    for h, (state,) in enumerate(rollout(*at.window, perturbation, (alpha,))):
        if h:
            found = at.derivatives.losses(state.params, at.target).mean().item()
            expected = by_torch(at, by_hand, share, h, alpha)
            assert found == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("problem", PROBLEMS, ids=[p.name for p in PROBLEMS])
def test_effects_of_many_changes_are_those_of_rolling_each(problem):
    at = case(problem, clip=0.5)
    found = effects(*at.window, removals(at.pools, [5, 2]), at.target)
    for row, position in enumerate((5, 2)):
        alone = probe(*at.window, removals(at.pools, [position]), at.target)
        assert found[row].tolist() == pytest.approx(alone.effect, rel=1e-7)
    with pytest.raises(ValueError, match="leave the learning rate alone"):
        effects(*at.window, learning_rate(at.pools, [1.0]), at.target)


def test_all_rows_come_from_one_pass():
    at = case()
    together = closed_form(*at.window, removals(at.pools, [5, 0, 2]), at.target)
    some = closed_form(*at.window, removals(at.pools, [5, 0, 2]), at.target, (0, 2))
    assert all(torch.equal(a[:, [0, 2]], b) for a, b in zip(together, some, strict=True))
    for row, position in enumerate([5, 0, 2]):
        alone = closed_form(*at.window, removals(at.pools, [position]), at.target)
        for rows, one in zip(together, alone, strict=True):
            assert torch.allclose(rows[row], one[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_both_methods_measure_the_real_effect_and_agree_as_the_change_gets_small(kind):
    at = case(num=4)
    perturbation, by_hand, share = change(kind, at.pools)
    exact = probe(*at.window, perturbation, at.target, method="exact")
    fast = probe(*at.window, perturbation, at.target)
    nominal, end = (by_torch(at, by_hand, share, 4, alpha) for alpha in (0, 1))
    for found in (exact, fast):
        assert found.horizons == (0, 1, 2, 3, 4)
        assert found.stopped is None
        assert found.nominal[-1] == pytest.approx(nominal, rel=1e-10)
        assert found.effect[-1] == pytest.approx(end - nominal, rel=1e-8)
    assert fast.corrected == pytest.approx(fast.effect, rel=1e-9)

    def errors(share):
        shifts = [
            shift._replace(weights=share * shift.weights, lr=shift.lr and share * shift.lr)
            for shift in perturbation.shifts
        ]
        smaller = dataclasses.replace(perturbation, shifts=shifts)
        pair = [probe(*at.window, smaller, at.target, method=m) for m in ("exact", "fast")]
        return [
            abs(a - b) / abs(a)
            for a, b in zip(
                pair[0].first + pair[0].second, pair[1].first + pair[1].second, strict=True
            )
            if a
        ]

    for large, small in zip(errors(0.1), errors(0.01), strict=True):
        assert small < 0.2 * large or small < 1e-4


def test_float32_agrees_with_float64():
    readings = {}
    for dtype in (torch.float64, torch.float32):
        at = case(TRANSFORMER, dtype=dtype)
        perturbation, _, _ = change("selection", at.pools)
        readings[dtype] = [
            probe(*at.window, perturbation, at.target, method=method)
            for method in ("exact", "fast")
        ]
    for double, single in zip(*readings.values(), strict=True):
        assert single.first == pytest.approx(double.first, rel=1e-2)
        assert single.second == pytest.approx(
            double.second, rel=3e-2, abs=4 * max(single.resolution)
        )
        assert single.effect == pytest.approx(double.effect, rel=1e-2)


def test_an_example_that_was_never_heard_has_no_first_order():
    """A pixel that is off in all nominal examples: 1 / eps would drown all others."""
    at = case()
    for pool in at.pools:
        pool["image"][:, 0, 0, 0] = 0
    at.optimizer.state.clear()  # its second moment is empty, too
    before = closed_form(*at.window, change("selection", at.pools)[0], at.target)
    perturbation, _, _ = change("selection", at.pools)
    for batch, shift in zip(perturbation.batches, perturbation.shifts, strict=True):
        batch["image"][shift.base == 0, 0, 0, 0] = 1
    after = closed_form(*at.window, perturbation, at.target)
    assert after[0].abs().max() < 10 * before[0].abs().max()
    assert after[1].abs().max() < 100 * before[1].abs().max()


class TestHardCases:
    def test_the_first_steps_with_empty_moments(self):
        at = case(warm=0)
        perturbation, by_hand, share = change("selection", at.pools)
        found = probe(*at.window, perturbation, at.target)
        end = by_torch(at, by_hand, share, NUM) - by_torch(at, by_hand, share, NUM, 0)
        assert found.effect[-1] == pytest.approx(end, rel=1e-8)
        exact = probe(*at.window, perturbation, at.target, method="exact")
        assert all(map(math.isfinite, exact.first + exact.second + exact.relative_error))

    def test_a_schedule_that_warms_up_from_zero(self):
        at = case(build=lambda p: adamw(p, lr=0.0))
        for method in ("exact", "fast"):
            found = probe(*at.window, change("selection", at.pools)[0], at.target, method=method)
            assert set(found.first + found.second + found.effect + found.relative_error) == {0}

    def test_a_selection_that_is_the_nominal_one(self):
        at = case()
        index = [torch.arange(KEPT) for _ in at.pools]
        for method in ("exact", "fast"):
            found = probe(*at.window, selection(at.pools, index, index), at.target, method=method)
            assert set(found.first + found.second + found.relative_error) == {0}

    def test_a_flat_target(self):
        at = case()

        def loss_fn(model, batch):
            return (0 if len(batch["label"]) == 10 else 1) * image_loss(model, batch)

        objective = at.derivatives.objective
        objective._loss_fn = objective._bound._loss_fn = loss_fn
        found = probe(*at.window, change("selection", at.pools)[0], at.target)
        assert set(found.first + found.second + found.relative_error) == {0}

    def test_a_window_that_diverges_ends_where_it_does(self):
        at = case(CNN)
        derivatives, updates, state = at.window
        rules = tuple(dataclasses.replace(rule, lr=1e200) for rule in updates[1].rules)
        updates[1] = dataclasses.replace(updates[1], rules=rules)
        perturbation, _, _ = change("selection", at.pools)
        for method in ("exact", "fast"):
            found = probe(derivatives, updates, state, perturbation, at.target, method=method)
            assert found.horizons == (0, 1)
            assert found.stopped.startswith("after horizon 1: ")
            assert "must be finite" in found.stopped

    def test_a_target_loss_that_is_not_finite(self):
        at = case()
        at.target["image"][3] = math.nan
        with pytest.raises(FloatingPointError, match="losses must be finite, got nan for keys"):
            probe(*at.window, change("selection", at.pools)[0], at.target)

    def test_the_live_state_does_not_move(self):
        at = case()
        before = [part.map(torch.clone) for part in at.reader.state()]
        probe(*at.window, change("selection", at.pools)[0], at.target, method="exact")
        probe(*at.window, change("selection", at.pools)[0], at.target)
        for then, now in zip(before, at.reader.state(), strict=True):
            assert all(torch.equal(then[name], now[name]) for name in then)


def test_first_order_near_zero_counts_as_the_resolution():
    assert relative_error(-2.0, 1.0, 1e-6) == 0.5
    assert relative_error(0.0, 1e-3, 1e-6) == pytest.approx(1e3)
    assert relative_error(0.0, 1e-8, 1e-6) == pytest.approx(1e-2)
    assert relative_error(0.0, 0.0, 0.0) == 0


def test_a_pass_stops_where_first_order_fails():
    at = case(num=4)
    perturbation, _, _ = change("selection", at.pools)
    whole = probe(*at.window, perturbation, at.target)
    limit = sorted(whole.relative_error)[-2]
    failing = next(h for h, rho in enumerate(whole.relative_error) if rho > limit)
    found = probe(*at.window, perturbation, at.target, limit=limit)
    assert found.horizons == whole.horizons[: failing + 1]
    assert found.first == whole.first[: failing + 1]
    some = probe(*at.window, perturbation, at.target, horizons=(0, 2))
    assert some.horizons == (0, 2)
    assert some.second == (whole.second[0], whole.second[2])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "adjoint"}, "method must be 'exact' or 'fast', got 'adjoint'"),
            (
                {"horizons": (0, 9)},
                r"horizons must be in \[0, 3\], the updates given, got \[0, 9\]",
            ),
            ({"horizons": ()}, "horizons must be in"),
            ({"limit": math.nan}, "limit must be >= 0, got nan"),
        ],
    )
    def test_options(self, options, message):
        at = case()
        with pytest.raises(ValueError, match=message):
            probe(*at.window, change("selection", at.pools)[0], at.target, **options)

    def test_windows_that_do_not_fit(self):
        at = case()
        derivatives, updates, state = at.window
        perturbation = removals(at.pools, [0])
        with pytest.raises(ValueError, match="as many as the 3 batches, got 2"):
            probe(derivatives, updates[:2], state, perturbation, at.target)
        with pytest.raises(ValueError, match="one change, got 2; `closed_form` takes"):
            probe(derivatives, updates, state, removals(at.pools, [0, 1]), at.target)

    def test_positions(self):
        pools = case().pools
        with pytest.raises(ValueError, match=r"positions must be in \[0, 7\], got \[8\]"):
            removals(pools, [8])
        with pytest.raises(ValueError, match="keep an example, got only one"):
            removals([{"image": torch.zeros(1, 2)}], [0])
        index = [torch.arange(2)] * NUM
        for bad in (torch.tensor([], dtype=torch.int64), torch.tensor([-1]), torch.tensor([8])):
            with pytest.raises(ValueError, match=r"one or more in \[0, 7\]"):
                selection(pools, index, [bad] * NUM)
