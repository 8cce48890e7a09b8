"""Passes of the module as it is: the right values inside, and everything as before outside."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from problems import PROBLEMS, image_loss, images
from torch import nn
from torch.utils.checkpoint import checkpoint

from selectflow import Selector
from selectflow.core.derivatives import Derivatives
from selectflow.core.passes import Objective
from selectflow.core.torch_optim import OptimizerReader


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batch(num=8, dtype=torch.float64):
    return [torch.randn(num, 6, dtype=dtype), torch.randint(3, (num,))]


class Net(nn.Module):
    """A stem, a block that may be checkpointed, and a head."""

    def __init__(self, recompute=None, frozen_stem=False):
        super().__init__()
        self.stem = nn.Linear(6, 16).requires_grad_(not frozen_stem)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)
        self.recompute = recompute

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        if self.recompute is None:
            return self.head(self.block(h))
        if not h.requires_grad and torch.is_grad_enabled():
            h = h.detach().requires_grad_()  # as reentrant checkpointing asks
        if not torch.is_grad_enabled():
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.recompute == "reentrant"))


def trained(model, lr=3e-2, num=3):
    """An optimizer of the model, after some steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(num):
        optimizer.zero_grad()
        losses(model, batch()).mean().backward()
        optimizer.step()
    return optimizer


def scores_of(model, optimizer, loss_fn=losses, horizon=3, **options):
    torch.manual_seed(1)
    pools, target = [batch() for _ in range(4)], [batch()]
    selector = Selector(model, optimizer, loss_fn, target, keep=1.0, horizon=horizon, **options)
    selector.select(pools[0], pools[1:])
    return selector.last.scores, selector.last.target_loss


@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("frozen_stem", [False, True])
@pytest.mark.parametrize("recompute", ["reentrant", "not reentrant"])
def test_recomputed_activations_see_the_values_of_the_pass(recompute, frozen_stem, horizon):
    found = []
    for how in (None, recompute):
        torch.manual_seed(0)
        model = Net(how, frozen_stem).double()
        found.append(scores_of(model, trained(model), horizon=horizon))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("derivative", ["central", "exact"])
def test_a_module_of_several_names_goes_on_training(derivative):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6)] * 3)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.out(x)

    torch.manual_seed(0)
    model = Shared().double()
    optimizer, weight = trained(model), model.layers[0].weight
    exact, _ = scores_of(model, optimizer, derivative="exact", horizon=2)
    found, _ = scores_of(model, optimizer, derivative=derivative, horizon=2)
    assert torch.allclose(found, exact, rtol=1e-4)
    assert model.layers[0].weight is model.layers[2].weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    before = weight.detach().clone()
    losses(model, batch()).mean().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


class Writes(nn.Module):
    """Writes a buffer in place, one by another name, an attribute, and draws random numbers."""

    def __init__(self, in_place):
        super().__init__()
        self.writes_in_place = in_place
        self.embed = nn.Embedding(20, 6, max_norm=1.0)
        self.out = nn.Linear(6, 3)
        self.register_buffer("in_place", torch.ones(()))
        self.register_buffer("rebound", torch.ones(()))
        self.register_buffer("empty", None)
        self.features = self.other = None

    def forward(self, x):
        h = self.out(self.embed(x).mean(1))
        if self.writes_in_place:
            self.in_place.mul_(0.9).add_(0.1 * h.detach().abs().mean())
        self.rebound = 0.9 * self.rebound + 0.1 * h.detach().abs().mean()
        self.features = h.detach().mean()
        if not self.training:  # what only scoring writes
            self.empty = self.other = h.detach().mean()
            self.register_buffer("late", h.detach().mean())
        return h / self.rebound + 1e-3 * torch.rand_like(h)


def words(num=16, low=0, high=20):
    return [torch.randint(low, high, (num, 4)), torch.randint(3, (num,))]


def everything(model, optimizer):
    """All that a selection must leave as it is."""
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "grads": [param.grad for param in model.parameters()],
            "needs": [param.requires_grad for param in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "versions": [param._version for param in model.parameters()],
            "attributes": [
                {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
                for module in model.modules()
            ],
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": list(np.random.get_state()),  # noqa: NPY002
        }
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("derivative", ["central", "exact", "auto"])
@pytest.mark.parametrize("horizon", [0, 1, 2])
def test_what_a_model_writes_in_forward_is_put_back(derivative, horizon):
    torch.manual_seed(0)
    model = Writes(in_place=derivative != "exact")  # which torch.func refuses
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        losses(model, words(high=10)).mean().backward()
        optimizer.step()
    pools, target = [words(high=10) for _ in range(3)], [words(low=10)]
    selector = Selector(
        model, optimizer, losses, target, keep=4, horizon=horizon, derivative=derivative
    )
    graph = losses(model, words()).mean()
    before, buffers = everything(model, optimizer), dict(model.named_buffers())
    selector.select(pools[0], pools[1:])
    assert same(everything(model, optimizer), before)
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert model.empty is model.other is None
    assert not hasattr(model, "late")
    copy.deepcopy(model)
    graph.backward()  # the user's graph of before can still be run back


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("options", [{"horizon": 0}, {"horizon": 3}, {"horizon": 2, "lr": "auto"}])
def test_an_exception_at_any_pass_leaves_everything_as_it_was(options, error):
    torch.manual_seed(0)
    model = Net("not reentrant").double()
    optimizer = trained(model)
    pools, target = [batch() for _ in range(4)], [batch()]
    for fails_at in itertools.count():
        passes = itertools.count()

        def loss_fn(model, batch, passes=passes, fails_at=fails_at):
            found = losses(model, batch)
            if next(passes) == fails_at:
                raise error("in the middle of a pass")
            return found

        selector = Selector(model, optimizer, loss_fn, target, keep=4, **options)
        before = everything(model, optimizer)
        try:
            selector.select(pools[0], pools[1:])
        except error:
            assert same(everything(model, optimizer), before)
        else:
            break
    assert fails_at > 3


def test_hooks_and_gradients_of_the_user_are_untouched():
    """Also where gradients come from `backward`, as reentrant checkpointing needs."""
    torch.manual_seed(0)
    model = Net("reentrant", frozen_stem=True).double()
    optimizer, called = trained(model), []
    for param in model.block.parameters():
        param.register_post_accumulate_grad_hook(called.append)
    losses(model, batch()).sum().backward()
    grads, num = [param.grad for param in model.parameters()], len(called)
    before = copy.deepcopy(grads)
    scores_of(model, optimizer)
    assert len(called) == num
    assert all(param.grad is grad for param, grad in zip(model.parameters(), grads, strict=True))
    assert same(grads, before)
    losses(model, batch()).sum().backward()
    assert len(called) == 2 * num


def test_recurrent_layers_are_scored_without_dropout_and_keep_their_modes():
    torch.manual_seed(0)
    model = nn.GRU(6, 5, num_layers=2, dropout=0.5, batch_first=True).double()
    modes = []

    def loss_fn(model, x):
        modes.append((model.training, model.dropout))
        return model(x)[0].square().mean((1, 2))

    optimizer = torch.optim.AdamW(model.parameters())
    pool = torch.randn(8, 4, 6).double()
    selector = Selector(model, optimizer, loss_fn, [pool], keep=4, horizon=0)
    selector.select(pool)
    assert set(modes) == {(True, 0.0)}  # cuDNN has no backward pass in eval mode
    assert (model.training, model.dropout) == (True, 0.5)


# --- what is around the module --------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("horizon", [0, 3])
@pytest.mark.parametrize("wrapper", ["data parallel", "distributed", "closure"])
def test_wrapped_modules_give_the_scores_of_the_plain_one(group, wrapper, horizon):
    torch.manual_seed(0)
    model = Net().double()
    optimizer = trained(model)
    expected = scores_of(model, optimizer, horizon=horizon)
    if wrapper == "closure":  # a loss that holds the model itself
        found = scores_of(model, optimizer, lambda _, batch: losses(model, batch), horizon)
    else:
        wrap = (
            nn.DataParallel if wrapper == "data parallel" else nn.parallel.DistributedDataParallel
        )
        found = scores_of(wrap(model), optimizer, horizon=horizon)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("options", [{"horizon": "auto"}, {"lr": "auto"}, {}])
def test_several_processes_are_not_left_to_decide_apart(monkeypatch, group, options):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    model = Net().double()
    optimizer = torch.optim.AdamW(model.parameters())
    if options:
        with pytest.raises(ValueError, match=r"must not be 'auto' in 2 processes whose models"):
            Selector(model, optimizer, losses, [batch()], keep=4, **options)
    else:
        with pytest.warns(UserWarning, match="selection in 2 processes: each scores its own"):
            Selector(model, optimizer, losses, [batch()], keep=4)


class Tied(Net):
    """The block twice, and a head of its weights."""

    def __init__(self, recompute=None):
        super().__init__(recompute)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.block[0].weight
        self.block = nn.Sequential(self.block, self.again, self.block)


def adapted(recompute=None):
    """Adapters of peft on a frozen net."""
    how = LoraConfig(r=2, target_modules=["stem", "head"], init_lora_weights=False)
    return get_peft_model(Net(recompute), how)


@pytest.mark.parametrize("horizon", [0, 1, 3])
@pytest.mark.parametrize("build", [Tied, adapted])
@pytest.mark.parametrize("around", ["reentrant", "not reentrant", "compiled", "distributed"])
def test_tied_weights_and_adapters_are_scored_alike_whatever_is_around(
    group, around, build, horizon
):
    found = []
    for how in (None, around):
        torch.manual_seed(0)
        model = build(how if how and "reentrant" in how else None).double()
        optimizer = trained(model)
        if how == "compiled":
            model = torch.compile(model, backend="eager")
        elif how == "distributed":
            model = nn.parallel.DistributedDataParallel(model)
        found.append(scores_of(model, optimizer, horizon=horizon))
    assert found[0][0].std() > 0
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_compiled_module_is_scored_compiled():
    torch.manual_seed(0)
    model = Net().double()
    optimizer, graphs = trained(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected, _ = scores_of(model, optimizer, horizon=2)
    found, _ = scores_of(torch.compile(model, backend=backend), optimizer, horizon=2)
    assert graphs
    assert torch.equal(found, expected)


# --- precision ------------------------------------------------------------------------------------


def ranks(scores):
    return scores.argsort().argsort().double()


def correlation(one, other):
    return torch.corrcoef(torch.stack([ranks(one), ranks(other)]))[0, 1].item()


def in_precision(kind, derivative, horizon):
    """Scores of a pool of images, as a loop in that precision has them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        image_loss(model, images(32)).mean().backward()
        optimizer.step()
    pool, target = images(64), images(64)
    options = {"keep": 16, "horizon": horizon, "derivative": derivative}
    if kind == "parameters":
        state = optimizer.state_dict()
        model = model.bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.load_state_dict(state)

        def loss_fn(model, batch):
            logits = model(batch["image"].bfloat16()).float()
            return F.cross_entropy(logits, batch["label"], reduction="none")

    elif kind == "in the loss":

        def loss_fn(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                return image_loss(model, batch)

    else:
        loss_fn = image_loss
    if kind == "option":
        options["autocast"] = torch.bfloat16
    selector = Selector(model, optimizer, loss_fn, [target], **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "around"):
        selector.select(pool)
    return selector


@pytest.mark.parametrize("horizon", [0, 1])
@pytest.mark.parametrize("derivative", ["central", "auto"])
@pytest.mark.parametrize("kind", ["option", "in the loss", "around", "parameters"])
def test_scores_in_bfloat16_rank_as_in_float32(kind, derivative, horizon):
    exact = in_precision("float32", "exact", horizon).last.scores
    selector = in_precision(kind, derivative, horizon)
    assert correlation(selector.last.scores, exact) > (0.97 if kind == "parameters" else 0.99)
    assert selector.last.scores.dtype == torch.float32
    assert selector.last.score_error == selector.state.forms.errors["losses"] <= 0.1


def test_float16_gradients_do_not_underflow():
    """Losses of 1e-5 have gradients that float16 rounds to 0, but for a loss scale."""
    problem = PROBLEMS[0]
    found = []
    for enabled in (True, False):
        model, make = problem.make(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        objective, batch = Objective(model, in_float16(enabled)), make(32)
        derivatives = Derivatives(objective)
        with objective.scoring():
            found.append(derivatives.gradient(OptimizerReader(model, optimizer).values(), batch)[1])
    assert relative(*found) < 0.01


def in_float16(enabled):
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            return 1e-5 * image_loss(model, batch)

    return loss_fn


def relative(found, expected):
    return (found - expected).norm() / expected.norm()
