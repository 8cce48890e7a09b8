"""Parameters that a batch does not use have no gradient, and torch skips them in that step."""

import pytest
import torch
from reference import clone, inner, per_example_gradients, removal, rerun, weight_derivative
from torch import nn

from selectflow import Selector
from selectflow.audit import influence, leave_one_out, record
from selectflow.control.rate import Window as RateWindow
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import Upcoming, look_ahead
from selectflow.core.passes import Objective
from selectflow.core.proxy import closed_form, probe
from selectflow.core.sweep import Window
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import selection

BUILDS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, (0.8, 0.9), weight_decay=0.2),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.05),
}
# Which batches use the second expert: at the live state it lags a step behind, at first.
ROUTES = [[0], [0, 1], [0], [0], [0, 1], [0]]


class Experts(nn.Module):
    """Two experts; an example's first input says which one it is for."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, images):
        hidden, route = self.stem(images[:, 1:]).tanh(), images[:, 0] > 0
        out = hidden.new_zeros(len(images), 3)
        for index, expert in enumerate(self.experts):
            chosen = route == bool(index)
            if chosen.any():
                out = torch.where(chosen[:, None], expert(hidden), out)
        return out


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["images"]), batch["labels"], reduction="none")


def make(generator, routes, size=6):
    images = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    index = torch.arange(size) % len(routes)
    images[:, 0] = torch.tensor(routes, dtype=torch.float64)[index] - 0.5
    return {"images": images, "labels": torch.randint(0, 3, (size,), generator=generator)}


@pytest.fixture(params=BUILDS)
def case(request):
    """A model whose second expert has had fewer steps, batches to come, and a target."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Experts().double()
    optimizer = BUILDS[request.param](model.parameters())
    for routes in ([0, 1], [0], [0, 1], [0]):
        optimizer.zero_grad()
        loss_fn(model, make(generator, routes)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    batches = [make(generator, routes) for routes in ROUTES]
    return model, optimizer, batches, make(generator, [0, 1], 8)


def reading(case, **how):
    model, optimizer, batches, _ = case
    reader = OptimizerReader(model, optimizer, **how)
    derivatives = Derivatives(Objective(model, loss_fn), "exact")
    return reader, derivatives, reader.updates(len(batches))


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("num_states", [None, 5])
def test_a_window_skips_what_torch_skips(case, clip, num_states):
    model, optimizer, batches, target = case
    reader, derivatives, updates = reading(case, max_grad_norm=clip)
    state, limit = reader.state(), None
    if num_states:  # fewer than the window has: some stretches are run twice
        size = sum(part.num_bytes() for part in state) + state.params.num_bytes()
        limit = 1.01 * num_states * size / 2**30
    window = Window(derivatives, updates, lambda index, _: batches[index])
    found = look_ahead(window, state, target, memory_gib=limit)
    args, how = (model, optimizer, loss_fn, batches, target), {"max_grad_norm": clip}
    assert found.target_loss == pytest.approx(rerun(*args, **how), rel=1e-12)
    gradients = per_example_gradients(model, loss_fn, batches[0])
    predicted = [inner(found.sensitivities[0], gradient) for gradient in gradients]
    truth = [weight_derivative(*args, 0, index, **how) for index in range(len(gradients))]
    scale = max(map(abs, truth))
    assert scale > 1e-4
    assert all(abs(a - b) < 1e-5 * scale for a, b in zip(predicted, truth, strict=True))


def test_a_candidate_for_a_skipped_expert_has_a_score_of_its_own(case):
    """The batch of the first update skips it; an example that enters the batch would wake it."""
    reader, derivatives, updates = reading(case)
    _, _, batches, target = case
    window = Window(derivatives, updates, lambda index, _: batches[index])
    gamma = look_ahead(window, reader.state(), target).gamma(0)
    assert gamma["experts.1.weight"].norm() > 1e-3 * gamma["experts.0.weight"].norm()


def test_replays_and_simulated_policies_skip_them_too(case):
    model, optimizer, batches, target = case
    reader, derivatives, _ = reading(case)
    start, counts = reader.state(), reader.counts()
    start = type(start)(*(part.map(torch.clone) for part in start))
    window = RateWindow(0, start, counts, {}, target, 0.0, 0.0, True)
    live, live_optimizer = clone(model, optimizer)
    live_reader = OptimizerReader(live, live_optimizer)
    for batch in batches:
        window.updates += live_reader.updates(1)
        window.batches.append([batch])
        live_optimizer.zero_grad()
        loss_fn(live, batch).mean().backward()
        live_optimizer.step()
    end = window.replay(derivatives, 1.0)
    for name, param in live.named_parameters():
        assert (end.params[name] - param).abs().max() < 1e-12

    selector = Selector(model, optimizer, loss_fn, [target], keep=6, horizon="auto")
    upcoming = Upcoming(reader.updates(5), reader.state(), batches, target)
    *_, (rolled, *_) = selector._scoring.policy.select_and_train(0, upcoming, torch.Generator())
    expected, expected_optimizer = clone(model, optimizer)
    for batch in batches[:5]:
        expected_optimizer.zero_grad()
        loss_fn(expected, batch).mean().backward()
        expected_optimizer.step()
    for name, param in expected.named_parameters():
        assert (rolled.params[name] - param).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["fast", "exact"])
def test_the_proxy_measures_what_torch_does(case, method):
    model, optimizer, batches, target = case
    reader, derivatives, updates = reading(case)
    nominal = [torch.arange(0, 6, 2)] * 6  # the first expert only, wherever examples alternate
    selected = [torch.arange(6)] * 6
    change = selection(batches, nominal, selected)
    found = probe(derivatives, updates, reader.state(), change, target, method=method)
    for horizon in (1, 3, 6):
        losses = []
        for positions in (nominal, selected):
            kept = [
                {name: tensor[index] for name, tensor in batch.items()}
                for batch, index in zip(batches, positions, strict=True)
            ][:horizon]
            losses.append(rerun(model, optimizer, loss_fn, kept, target))
        assert found.nominal[horizon] == pytest.approx(losses[0], rel=1e-12)
        assert found.effect[horizon] == pytest.approx(losses[1] - losses[0], rel=1e-9)


def test_first_order_of_the_closed_form_is_the_derivative(case):
    model, optimizer, batches, target = case
    reader, derivatives, updates = reading(case)
    everyone = [torch.arange(6)] * 6
    twice = [torch.tensor([0, 0, 1, 2, 3, 4, 5])] * 6
    change = selection(batches, everyone, twice)
    first, _ = closed_form(derivatives, updates, reader.state(), change, target)
    extra = torch.tensor([2, 1, 1, 1, 1, 1]).double() / 7 - 1 / 6

    def at(share):
        weights = [(s, i, share * float(extra[i])) for s in range(6) for i in range(6)]
        return rerun(model, optimizer, loss_fn, batches, target, weights=weights)

    assert float(first[0, 6]) == pytest.approx((at(1e-4) - at(-1e-4)) / 2e-4, rel=1e-5)


def test_audits_of_a_recorded_run(case):
    model, optimizer, batches, queries = case
    trajectory = record(*clone(model, optimizer), loss_fn, batches, spacing=4)
    pairs = [(0, 2), (1, 1), (3, 0), (4, 5)]

    def by_torch(pair, share):
        weights = removal(*pair, 6, share)
        return rerun(model, optimizer, loss_fn, batches, queries, weights=weights)

    recorded = [(trajectory.first_step + step, position) for step, position in pairs]
    before = rerun(model, optimizer, loss_fn, batches, queries)
    truth = [by_torch(pair, 1.0) - before for pair in pairs]
    slopes = [(by_torch(pair, 1e-4) - by_torch(pair, -1e-4)) / 2e-4 for pair in pairs]
    found = leave_one_out(trajectory, queries, recorded, reduce="mean")[:, 0]
    assert found.tolist() == pytest.approx(truth, rel=1e-8)
    assert influence(trajectory, queries, recorded, reduce="mean")[:, 0].tolist() == pytest.approx(
        slopes, rel=1e-5
    )
    own = influence(trajectory, queries, recorded, reduce="mean", own_update="exact")
    assert own[:, 0].tolist() == pytest.approx(truth, abs=0.2 * max(map(abs, truth)))
