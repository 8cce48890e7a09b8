"""What the reader of an optimizer meets in user code: tensor rates, schedules that end, methods."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, SequentialLR

from selectflow import Selector
from selectflow.core.torch_optim import OptimizerReader


def one_weight():
    return nn.ParameterDict({"w": nn.Parameter(torch.ones(2))})


def rates(reader, num):
    return [update.rules[0].lr for update in reader.updates(num)]


def advance(optimizer, scheduler):
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    scheduler.step()


def test_running_ahead_leaves_a_learning_rate_that_is_a_tensor():
    model = one_weight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    assert rates(OptimizerReader(model, optimizer, scheduler), 3) == [0.1, 0.05, 0.025]
    assert optimizer.param_groups[0]["lr"] == 0.1
    advance(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] == 0.05


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=4)


def table(optimizer):
    values = [1.0, 0.5, 0.25, 0.125, 0.0625]
    return LambdaLR(optimizer, lambda step: values[step])


@pytest.mark.parametrize("schedule", [one_cycle, table])
def test_a_schedule_that_ends_sooner_holds_its_last_rate(schedule):
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = schedule(optimizer)
    real = []
    for _ in range(4):
        real.append(optimizer.param_groups[0]["lr"])
        advance(optimizer, scheduler)
    end = optimizer.param_groups[0]["lr"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reader = OptimizerReader(model, optimizer, schedule(optimizer))
    assert rates(reader, 7) == [*real, end, end, end]


class Trainer:
    """Holds what cannot be copied, as a trainer with an open loader does."""

    def __init__(self):
        self.loader = iter(range(3))
        self.batches = (batch for batch in self.loader)

    def factor(self, step):
        return 1 / (1 + step)


def test_a_schedule_may_be_a_method_of_what_cannot_be_copied():
    model, trainer = one_weight(), Trainer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert rates(OptimizerReader(model, optimizer, LambdaLR(optimizer, trainer.factor)), 3) == [
        1.0,
        1 / 2,
        1 / 3,
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    parts = [LambdaLR(optimizer, trainer.factor) for _ in range(2)]
    nested = SequentialLR(optimizer, parts, milestones=[2])
    assert rates(OptimizerReader(model, optimizer, nested), 4) == [1.0, 1 / 2, 1.0, 1 / 2]


def test_what_accelerate_prepared_is_looked_through():
    accelerate = pytest.importorskip("accelerate")
    model = one_weight()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer, scheduler)
    assert type(prepared[0]) is not torch.optim.AdamW
    reader = OptimizerReader(model, *prepared)
    assert reader.optimizer is optimizer
    for step in range(3):
        assert reader.num_steps() == step
        assert rates(reader, 3) == [0.5**step, 0.5 ** (step + 1), 0.5 ** (step + 2)]
        advance(*prepared)


def test_complex_parameters_are_refused_by_name():
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    with pytest.raises(ValueError, match=r"must be real, got w of torch.complex64; train a real"):
        OptimizerReader(model, torch.optim.AdamW(model.parameters()))


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("derivative", ["central", "auto"])
def test_sparse_gradients_select_as_dense_ones(derivative):
    """`torch.optim.SGD` takes both, and ends at the same weights."""
    generator = torch.Generator().manual_seed(0)
    pools = [
        (torch.randint(0, 9, (8, 3), generator=generator), torch.arange(8) % 2) for _ in range(5)
    ]

    def kept(sparse):
        torch.manual_seed(0)
        embedding = nn.Embedding(9, 4, sparse=sparse)
        model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"keep": 3, "horizon": 3, "derivative": derivative}
        selector = Selector(model, optimizer, losses, pools[:1], **options)
        for batch in selector.stream(pools):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
            yield selector.last.scores

    for scores, expected in zip(kept(True), kept(False), strict=True):
        torch.testing.assert_close(scores, expected)


def added(model, optimizer):
    model.append(nn.Linear(3, 3).double())
    optimizer.add_param_group({"params": list(model[-1].parameters()), "lr": 1e-2})


def exchanged(model, optimizer):
    """Another layer under the same name."""
    model[2] = nn.Linear(5, 3).double()
    optimizer.param_groups[0]["params"][2:] = list(model[2].parameters())


def wrapped(model, optimizer):
    """The same parameters under other names, as adapters do it."""
    model[2] = nn.Sequential(model[2])


def grown(model, optimizer):
    """A layer that writes its weight in forward, where there was none."""
    model[0] = nn.Sequential(model[0], nn.Unflatten(1, (5, 1)), MaxNorm(), nn.Flatten())
    optimizer.add_param_group({"params": list(model[0][2].parameters()), "lr": 1e-2})


class MaxNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 1, max_norm=0.1, dtype=torch.float64)

    def forward(self, x):
        return x + self.table((x[..., 0] > 0).long())


@pytest.mark.parametrize("change", [added, exchanged, wrapped, grown])
@pytest.mark.parametrize(
    "options", [{"horizon": 0}, {"horizon": 3}, {"horizon": 1, "interval": 4}, {"lr": "auto"}]
)
def test_layers_that_come_later_count_at_once(change, options):
    """As for a selector that was built after the change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = [[torch.randn(9, 6).double(), torch.randint(3, (9,))] for _ in range(5)]
    options = {"keep": 1.0, "derivative": "exact", "horizon": 0} | options

    def selected(selector):
        kept = selector.select(batches[0], batches[1:])
        optimizer.zero_grad()
        losses(model, kept).mean().backward()
        optimizer.step()

    selector = Selector(model, optimizer, losses, batches[4:], **options)
    for _ in range(9):
        selected(selector)
    change(model, optimizer)
    for _ in range(10):
        selected(selector)
    weights = [param.detach().clone() for param in model.parameters()]
    anew = Selector(model, optimizer, losses, batches[4:], **(options | {"lr": "schedule"}))
    selector.state.ahead = None
    for each in (selector, anew):
        each.select(batches[0], batches[1:])
    if "lr" not in options:
        assert torch.allclose(selector.last.scores, anew.last.scores, rtol=1e-10, atol=0)
        assert all(map(torch.equal, weights, model.parameters()))
    assert selector.last.scores.isfinite().all()
