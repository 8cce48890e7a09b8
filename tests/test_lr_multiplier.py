"""The multiplier of the learning rate: inside `optimizer.step()` alone, on top of any schedule."""

import gc

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.optim import lr_scheduler

from selectflow import Selector
from selectflow.control.multiplier import StepMultiplier
from selectflow.core.torch_optim import OptimizerReader
from tests import reference
from tests.problems import PROBLEMS

MLP = PROBLEMS[0]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_the_multiplier_is_a_learning_rate_times_it(kind):
    model, make = MLP.make()
    optimizer = kind(model.parameters(), lr=2e-3, weight_decay=0.1)
    twin, other = reference.clone(model, optimizer)
    selector = Selector(model, optimizer, MLP.loss_fn, [make(8)], keep=4, lr="auto")
    selector._optimizer.lr_multiplier = 4.0
    for group in other.param_groups:
        group["lr"] = 8e-3
    for _ in range(3):
        batch = make(4)
        for net, opt in ((model, optimizer), (twin, other)):
            opt.zero_grad()
            MLP.loss_fn(net, batch).mean().backward()
            opt.step()
    assert torch.equal(*(parameters_to_vector(net.parameters()) for net in (model, twin)))
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3]  # between steps: the user's


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "warm-up, then steps": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2, 0.5)],
        milestones=[3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_multiplies_any_schedule_without_compounding(name):
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    twin, other = reference.clone(model, optimizer)
    schedules = [SCHEDULERS[name](opt) for opt in (optimizer, other)]
    selector = Selector(
        model, optimizer, MLP.loss_fn, [make(8)], keep=4, lr="auto", lr_scheduler=schedules[0]
    )
    selector._optimizer.lr_multiplier = 3.0
    used = []
    optimizer.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
    expected = []
    for _ in range(8):
        expected.append(3.0 * other.param_groups[0]["lr"])
        batch = make(4)
        for net, opt, schedule in zip((model, twin), (optimizer, other), schedules, strict=True):
            opt.zero_grad()
            MLP.loss_fn(net, batch).mean().backward()
            opt.step()
            schedule.step()
    assert used == pytest.approx(expected, rel=1e-12)


def test_the_optimizer_is_free_when_the_selector_is_gone():
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = Selector(model, optimizer, MLP.loss_fn, [make(8)], keep=4, lr="auto")
    selector._optimizer.lr_multiplier = 3.0
    del selector
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_the_latest_selector_alone_multiplies():
    """As in a notebook, where one is made again while the one before is still referred to."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    controls = [StepMultiplier(OptimizerReader(model, optimizer)) for _ in range(2)]
    for control in controls:
        control._reader.lr_multiplier = 0.5
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(before - model.weight, torch.full((2, 2), 0.5))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_step_that_raises_leaves_the_users_rate():
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = Selector(model, optimizer, MLP.loss_fn, [make(8)], keep=4, lr="auto")
    selector._optimizer.lr_multiplier = 4.0
    seen = []

    def broken():
        seen.append(optimizer.param_groups[0]["lr"])
        raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(broken)
    assert seen == [4e-2, 4e-2]  # not 16e-2
