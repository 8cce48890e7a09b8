"""The learning-rate control: what it does to the optimizer, and what its replays repeat."""

import copy
import math
from itertools import cycle

import pytest
import torch
from torch.optim import lr_scheduler

from selectflow import AutoHorizon, AutoRate, Selector
from selectflow.control.rate import RateControl, RateState
from selectflow.control.rules import RateRule
from selectflow.core.derivatives import Derivatives
from selectflow.core.optim import State
from selectflow.core.passes import Objective
from selectflow.core.torch_optim import OptimizerReader
from tests import reference
from tests.problems import PROBLEMS

MLP = PROBLEMS[0]


def parts(
    lr=1e-2, kind=torch.optim.AdamW, settings=None, pools_per_update=1, num_targets=1,
    step_cost=1.0, **options,
):  # fmt: skip
    """A model in training, its control, and a function that takes one selected step."""
    model, make = MLP.make()
    optimizer = kind(model.parameters(), lr=lr, **options)
    objective = Objective(model, MLP.loss_fn)
    reader = OptimizerReader(model, optimizer)
    target = make(40)
    targets = cycle([target, *(make(40) for _ in range(num_targets - 1))])
    control = RateControl(
        RateState(RateRule(settings or AutoRate(window=4))),
        reader,
        Derivatives(objective),
        targets.__next__,
        pools_per_update,
        lambda: step_cost,
    )

    def step(batch):
        with objective.scoring():
            found = control.before(reader.num_steps())
        control.trained_on(batch)
        optimizer.zero_grad()
        MLP.loss_fn(model, batch).mean().backward()
        optimizer.step()
        return found

    return model, optimizer, reader, control, step, make, target


def values(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_failed_window_becomes_its_training_at_a_lower_rate(kind):
    """Far too high a rate: afterwards model and optimizer are those of a run at the chosen rate."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    lr = 30.0 if kind is torch.optim.SGD else 3.0
    model, optimizer, reader, control, step, make, _ = parts(lr, kind, **options)
    start = reference.clone(model, optimizer)
    batches = [make(8) for _ in range(4)]
    for batch in batches:
        assert step(batch) == (None, False)
    with Objective(model, MLP.loss_fn).scoring():
        decision, replaced = control.before(reader.num_steps())
    assert replaced
    assert decision.after < 1
    twin, other = start
    for group in other.param_groups:
        group["lr"] = lr * decision.after
    for batch in batches:
        other.zero_grad()
        MLP.loss_fn(twin, batch).mean().backward()
        other.step()
    torch.testing.assert_close(values(model), values(twin), rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-12)
    assert reader.num_steps() == 4  # the replacement is no step of its own
    step(make(8))
    assert reader.num_steps() == 5


def test_decisions_are_made_from_really_training_at_the_other_rates():
    model, optimizer, reader, control, step, make, target = parts(1e-3)
    start = reference.clone(model, optimizer)
    batches = [make(8) for _ in range(4)]
    for batch in batches:
        step(batch)
    with Objective(model, MLP.loss_fn).scoring():
        decision, _ = control.before(reader.num_steps())
    losses = {k: v for k, v in decision.measures.items() if k.startswith("loss_at_")}
    assert len(losses) >= 2
    for name, loss in losses.items():
        factor = float(name.removeprefix("loss_at_"))
        real = reference.rerun(*start, MLP.loss_fn, batches, target, lrs=[1e-3 * factor] * 4)
        assert loss == pytest.approx(real, rel=1e-9)


@pytest.mark.parametrize("step_cost", [1.0, 4.0])
def test_replays_take_no_more_than_their_share_of_training(step_cost):
    """Without gaps each window of 4 steps would be replayed at two rates: twice the training."""
    settings = AutoRate(window=4, longest_gap=0, share=0.1, early=16, rise=1e9)
    _, _, _, control, step, make, _ = parts(1e-3, settings=settings, step_cost=step_cost)
    for _ in range(161):
        step(make(8))
        allowed = 16 + 0.1 * control.state.trained
        assert control.state.replayed <= allowed + 4  # the first window is checked besides
    assert control.state.trained == 160 * step_cost
    assert control.state.replayed > allowed - 2 * settings.window


def test_what_is_unpaid_of_replays():
    settings = AutoRate(window=8, share=0.25, early=32)
    assert settings.unpaid(16, 0) == 0
    assert settings.unpaid(32, 0) == 64
    assert settings.unpaid(32, 40) == 24
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            AutoRate(share=share)


IN_GAPS = AutoRate(window=4, longest_gap=32, highest=1.0)


@pytest.mark.parametrize("quiet", [0, 1, 3, 5])
def test_a_rise_in_a_gap_is_taken_back_within_a_window(quiet):
    """The user raises the rate a thousandfold; the next window due opens at step 68."""
    model, optimizer, reader, control, step, make, target = parts(1e-3, settings=IN_GAPS)
    decided = [n for n in range(36) if step(make(8))[0]]
    assert decided == [4, 16]  # gaps of 8, 16 and, from step 36, 32
    batches, lrs, starts = [], [], []
    while True:
        lrs.append(1e-3 if len(batches) < quiet else 1.0)
        optimizer.param_groups[0]["lr"] = lrs[-1]
        with Objective(model, MLP.loss_fn).scoring():
            decision, replaced = control.before(reader.num_steps())
        if replaced:
            break
        assert len(batches) < quiet + IN_GAPS.window
        if len(batches) % IN_GAPS.window == 0:  # here the control opens a window
            start, begun = reference.clone(model, optimizer), len(batches)
            starts.append(MLP.loss_fn(model, target).mean().item())
        batches.append(make(8))
        step(batches[-1])
    real = [
        reference.rerun(
            *start, MLP.loss_fn, batches[begun:], target, lrs=[rate * lr for lr in lrs[begun:-1]]
        )
        for rate in (1.0, 0.5)
    ]
    assert decision.measures["loss_before"] == pytest.approx(min(starts), rel=1e-9)
    assert decision.measures["loss_at_1"] == pytest.approx(real[0], rel=1e-9)
    assert decision.measures["loss_at_0.5"] == pytest.approx(real[1], rel=1e-9)
    assert real[0] > 1.2 * min(starts)
    assert decision.after == (0.25 if real[1] > 1.2 * min(starts) else 0.5)
    now = MLP.loss_fn(model, target).mean().item()
    assert now == pytest.approx(min(starts[-1], real[1]), rel=1e-9)


@pytest.mark.parametrize("steps", [40, 43], ids=["at a look", "between two"])
def test_what_diverged_in_a_gap_goes_on_from_before_it(steps):
    """A step at an absurd rate leaves no finite loss, at half of it neither."""
    model, optimizer, reader, control, step, make, _ = parts(1e-3, settings=IN_GAPS)
    replaced = False
    while not replaced:
        if reader.num_steps() == steps:  # in the gap that ends at step 68
            optimizer.param_groups[0]["lr"] = 1e308
        with Objective(model, MLP.loss_fn).scoring():
            decision, replaced = control.before(reader.num_steps())
        if reader.num_steps() == 40:  # here the control opens a window
            start = values(model).clone()
        if not replaced:
            step(make(8))
    assert reader.num_steps() == 44
    assert decision.measures["loss_at_1"] == decision.measures["loss_at_0.5"] == math.inf
    assert torch.equal(values(model), start)


def test_a_quiet_gap_costs_one_forward_pass_a_window(monkeypatch):
    """Of the same target batch, so that an easy one after a hard one is no rise."""
    passes, drawn = [], []
    for name in ("mean_loss", "gradient"):
        real = getattr(Derivatives, name)

        def counted(self, params, batch, *args, name=name, real=real, **how):
            passes.append((name, batch["label"].tolist()))
            return real(self, params, batch, *args, **how)

        monkeypatch.setattr(Derivatives, name, counted)
    _, _, _, control, step, make, _ = parts(1e-3, settings=IN_GAPS, num_targets=3)
    for _ in range(37):
        step(make(8))
    passes.clear()
    decisions = []
    for _ in range(31):
        decisions.append(step(make(8)))
        drawn.append(control.state.window.target["label"].tolist())
    assert decisions == [(None, False)] * 31
    assert passes == [("mean_loss", drawn[0])] * 7  # at steps 40, 44, ... 64; the gap ends at 68
    step(make(8))
    assert [name for name, _ in passes[7:]] == ["mean_loss", "mean_loss"]
    assert passes[8][1] != drawn[0]  # the window that is due has the next batch


def test_dropout_is_seen_and_nothing_is_replaced():
    problem = PROBLEMS[2]
    model, make = problem.make()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0)
    selector = Selector(
        model, optimizer, problem.loss_fn, [make(8)], keep=4, lr=AutoRate(window=2), horizon=0
    )
    for batch in selector.stream([make(8) for _ in range(8)]):
        before = values(model)
        optimizer.zero_grad()
        problem.loss_fn(model, batch).mean().backward()
        assert torch.equal(values(model), before)
        optimizer.step()
    assert selector.state.rate.is_faithful is False


def test_micro_batches_of_one_step_are_replayed_together():
    settings = AutoRate(window=2)
    model, optimizer, reader, control, _, make, target = parts(
        1e-3, settings=settings, pools_per_update=2
    )
    start, objective = reference.clone(model, optimizer), Objective(model, MLP.loss_fn)
    joined = []
    for _ in range(2):
        pair = [make(4), make(4)]
        for batch in pair:
            with objective.scoring():
                control.before(reader.num_steps())
            control.trained_on(batch)
        joined.append({k: torch.cat([b[k] for b in pair]) for k in ("image", "label")})
        optimizer.zero_grad()
        MLP.loss_fn(model, joined[-1]).mean().backward()
        optimizer.step()
    with objective.scoring():
        decision, _ = control.before(reader.num_steps())
    real = reference.rerun(*start, MLP.loss_fn, joined, target, lrs=[2e-3] * 2)
    assert decision.measures["loss_at_2"] == pytest.approx(real, rel=1e-9)


def test_a_window_in_which_a_parameter_was_frozen_is_dropped():
    model, _, _, _, step, make, _ = parts(settings=AutoRate(window=4, longest_gap=0))
    batches = [make(16) for _ in range(12)]
    for batch in batches[:2]:
        step(batch)
    next(model.parameters()).requires_grad_(False)
    decided = [step(batch)[0] for batch in batches[2:8]]
    assert decided[:4] == [None] * 4  # a new window of four begins where the parameter is frozen
    assert decided[4] is not None
    next(model.parameters()).requires_grad_(True)
    assert [step(batch)[0] for batch in batches[8:]] == [None] * 4


def test_a_rate_set_by_hand_is_replayed_as_it_was():
    model, optimizer, reader, control, step, make, target = parts(1e-3)
    start, batches = reference.clone(model, optimizer), [make(8) for _ in range(4)]
    for index, batch in enumerate(batches):
        if index == 2:
            optimizer.param_groups[0]["lr"] = 5e-3
        step(batch)
    with Objective(model, MLP.loss_fn).scoring():
        decision, _ = control.before(reader.num_steps())
    lrs = [5e-4, 5e-4, 2.5e-3, 2.5e-3]
    real = reference.rerun(*start, MLP.loss_fn, batches, target, lrs=lrs)
    assert decision.measures["loss_at_0.5"] == pytest.approx(real, rel=1e-9)


def test_a_warm_up_from_zero_is_not_pushed():
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
    selector = Selector(
        model, optimizer, MLP.loss_fn, [make(16)], keep=4, horizon=0, lr=AutoRate(window=4),
        lr_scheduler=schedule,
    )  # fmt: skip
    for step, batch in enumerate(selector.stream([make(8) for _ in range(40)])):
        if step <= 20:
            assert selector.last.lr_multiplier <= 1.0
        optimizer.zero_grad()
        MLP.loss_fn(model, batch).mean().backward()
        optimizer.step()
        schedule.step()


def run(selector, model, optimizer, pools):
    multipliers = []
    for batch in selector.stream(pools):
        multipliers.append((selector.last.lr_multiplier, selector.last.horizon))
        optimizer.zero_grad()
        MLP.loss_fn(model, batch).mean().backward()
        optimizer.step()
    return multipliers


@pytest.mark.parametrize("cut", [3, 11, 26, 33])
def test_a_resumed_control_goes_on_bit_for_bit(cut, tmp_path):
    """Also in the middle of a window, and beside a horizon under control."""

    def build():
        model, make = MLP.make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        selector = Selector(
            model, optimizer, MLP.loss_fn, [make(16)], keep=4, lr=AutoRate(window=4),
            horizon=AutoHorizon(
                largest=2, gap=6, contest_steps=2, costs={0: 2.0, 1: 3.0, 2: 4.0}
            ),
        )  # fmt: skip
        return model, optimizer, selector, [make(12) for _ in range(40)]

    model, optimizer, selector, pools = build()
    whole = run(selector, model, optimizer, pools)
    first, opt, sel, pools = build()
    drawn = iter(pools)
    head = []
    for batch in sel.stream(drawn):
        head.append((sel.last.lr_multiplier, sel.last.horizon))
        opt.zero_grad()
        MLP.loss_fn(first, batch).mean().backward()
        opt.step()
        if len(head) == cut:
            break
    path = tmp_path / "state.pt"
    torch.save([first.state_dict(), opt.state_dict(), sel.state_dict()], path)
    second, opt2, sel2, _ = build()
    saved = torch.load(path, weights_only=True)
    for part, state in zip((second, opt2, sel2), saved, strict=True):
        part.load_state_dict(copy.deepcopy(state))
    tail = run(sel2, second, opt2, drawn)
    assert head + tail == whole
    assert torch.equal(values(second), values(model))
    assert len(set(whole)) > 1  # something was decided


def test_writing_a_state_moves_everything():
    model, _, reader, _, step, make, _ = parts()
    step(make(8))
    state = reader.state()
    doubled = State(*(2.0 * part for part in state))
    reader.write(doubled)
    for now, then in zip(reader.state(), doubled, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    assert not any(param.grad is None for param in model.parameters())


# --- what diverges ----------------------------------------------------------------------------


def diverging(horizon, bad_step, kind=torch.optim.SGD, problem=MLP, lr=0.05, **options):
    """A run by the selector in which the step `bad_step` is taken at a rate of 1e308."""
    model, make = problem.make()
    optimizer = kind(model.parameters(), lr=lr, **options)
    targets = [make(16)]
    selector = Selector(
        model, optimizer, problem.loss_fn, targets, keep=4, horizon=horizon, lr=AutoRate(window=8)
    )
    steps = []
    for step, batch in enumerate(selector.stream([make(12) for _ in range(24)])):
        steps.append(selector.last)
        yield step, selector, model, optimizer, targets[0]
        optimizer.param_groups[0]["lr"] = 1e308 if step == bad_step else lr
        optimizer.zero_grad()
        problem.loss_fn(model, batch).mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = lr
    assert [last.step for last in steps] == list(range(24))  # each counts, taken back or not
    assert [last.age for last in steps] == [0] * 24


@pytest.mark.parametrize("horizon", [0, 1])
@pytest.mark.parametrize("bad_step", [2, 20])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_one_diverging_step_inside_a_window_is_taken_back(kind, bad_step, horizon):
    """At once, not at the window's end; the run goes on from the window's start or better."""
    for step, selector, model, _, target in diverging(horizon, bad_step, kind):
        if step == bad_step:
            start = selector.state.rate.window.start_loss
        if step == bad_step + 1:
            (decision,) = selector.last.decisions
            assert decision.moved
            assert decision.after < decision.before
            assert "rose from" in decision.reason
            assert MLP.loss_fn(model, target).mean().item() <= start * (1 + 1e-9)


def test_running_statistics_are_taken_back_with_the_parameters():
    """Batch norm in training: its replays stand for nothing, the start of a window does."""
    problem, starts = PROBLEMS[1], []
    run = diverging(0, 20, torch.optim.AdamW, problem, lr=1e-2)
    for step, selector, model, optimizer, _ in run:  # noqa: B007
        window = selector.state.rate.window
        if step == 20:
            starts = [window.start, window.buffers, window.counts]
            assert window.first_step < 20
        if step == 21:
            assert selector.state.rate.is_faithful is False
            state, buffers, counts = starts
            assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
            assert all(torch.equal(p, state.params[n]) for n, p in model.named_parameters())
            assert selector._optimizer.counts() == counts
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert next(iter(optimizer.state.values()))["step"] < 24


@pytest.mark.parametrize(("reach", "ends"), [(3.0, False), (1e-3, True)])
def test_a_look_ahead_that_diverges_slows_the_rate_before_a_step_is_taken(reach, ends):
    """Nothing has failed yet: at horizon 1 the first update is seen to fail in simulation."""
    model, make = MLP.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    before = values(model).clone()

    def loss_fn(model, batch):  # infinite where the parameters have moved by more than the reach
        way = (torch.cat([p.flatten() for p in model.parameters()]) - before).norm()
        return MLP.loss_fn(model, batch) + torch.where(way > reach, math.inf, 0.0)

    selector = Selector(model, optimizer, loss_fn, [make(16)], 4, 1, lr="auto")
    selector._scoring.policy.derivatives.method = "central"
    if ends:
        with pytest.raises(FloatingPointError, match="at optimizer step 0"):
            selector.select(make(12))  # at 1/64 of the rate, too: said
        assert selector.state.rate.rule.multiplier == 1 / 64
    else:
        selector.select(make(12))
        last = selector.last
        assert last.lr_multiplier == 0.5 ** len(last.decisions) < 1
        assert all("look-ahead" in decision.reason for decision in last.decisions)
        assert selector.state.rate.window.updates[-1].rules[0].lr == 30.0 * last.lr_multiplier
    assert torch.equal(values(model), before)


def test_a_pool_with_nan_is_no_fault_of_the_rate():
    for horizon in (0, 1):
        model, make = MLP.make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        selector = Selector(model, optimizer, MLP.loss_fn, [make(16)], 4, horizon, lr="auto")
        pools = [make(12) for _ in range(6)]
        pools[5]["image"][3] = math.nan
        batches = selector.stream(pools)
        for _ in range(5):
            batch = next(batches)
            optimizer.zero_grad()
            MLP.loss_fn(model, batch).mean().backward()
            optimizer.step()
        before = values(model).clone()
        with pytest.raises(FloatingPointError, match=r"at optimizer step 5.*sample-3"):
            next(batches)
        assert torch.equal(values(model), before)
        assert selector.state.rate.rule.multiplier == 1.0


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
@pytest.mark.parametrize("warm", [0, 3])
def test_what_was_taken_back_goes_on_as_torch_would_have(kind, options, warm):
    """The next updates are those of an optimizer that never took the steps taken back."""
    model, optimizer, reader, _, _, make, target = parts(1e-2, kind, **options)

    def train(num):
        for _ in range(num):
            optimizer.zero_grad()
            MLP.loss_fn(model, make(8)).mean().backward()
            optimizer.step()
            reader.num_steps()

    reader.num_steps()
    train(warm)
    twin, counts = reference.clone(model, optimizer), reader.counts()
    start = State(*(part.map(torch.clone) for part in reader.state()))
    train(5)
    reader.write(start, counts)
    assert reader.num_steps() == warm + 5
    is_sgd = kind is torch.optim.SGD  # whose rules tell the first update from the others only
    assert reader.updates(1)[0].rules[0].step == 1 + (min(warm, 1) if is_sgd else warm)
    batches = [make(8) for _ in range(3)]
    for num in (1, 3):
        args = MLP.loss_fn, batches[:num], target
        assert reference.rerun(model, optimizer, *args) == pytest.approx(
            reference.rerun(*twin, *args), rel=1e-12
        )
