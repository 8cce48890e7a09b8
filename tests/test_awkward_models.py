"""Layers without forward mode, mixtures of experts, gradient scalers, losses that are means."""

import logging
import random

import numpy as np
import pytest
import torch
import transformers
from reference import slopes
from torch import nn
from torch.autograd import Function

from selectflow import Selector
from selectflow.models.language import causal_lm_losses


class PlainSwish(Function):
    """As written before torch.func: context in forward, no forward mode, no vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grad * (gate + x * gate * (1 - gate))


class Swish(Function):
    """In the form of torch.func, still without forward mode."""

    @staticmethod
    def forward(x):
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    backward = PlainSwish.backward


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function.apply(x)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def batch(num, dtype=torch.float32):
    return {"x": torch.randn(num, 6, dtype=dtype), "y": torch.randint(4, (num,))}


def custom(function, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Layer(function), nn.Linear(16, 4)).to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("function", [PlainSwish, Swish])
def test_central_differences_take_over_once_and_say_so(function, caplog):
    model, optimizer = custom(function)
    selector = Selector(model, optimizer, loss_fn, [batch(8)], keep=2, horizon=2)
    pools = [batch(6) for _ in range(6)]
    with caplog.at_level(logging.INFO, "selectflow"):
        for _ in range(3):
            selector.state.ahead = None
            selector.select(pools[0], pools[1:])
    assert selector.forms == {"losses": "central", "gradients": "central"}
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if line.startswith("no forward-mode derivative of this model")]
    assert len(said) == 1
    assert any(line.startswith("derivatives of losses: central") for line in lines)
    expected = -slopes(model, loss_fn, pools[0], selector.state.ahead.sensitivities[0])
    found = selector.last.scores.double()
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("function", [PlainSwish, Swish])
def test_exact_derivatives_of_such_a_model_are_refused(function):
    model, optimizer = custom(function)
    selector = Selector(
        model, optimizer, loss_fn, [batch(8)], keep=2, horizon=0, derivative="exact"
    )
    with pytest.raises(RuntimeError, match=r"'exact' must have forward mode.*use 'auto' or 'cent"):
        selector.select(batch(6))


def test_a_mixture_of_experts():
    """Which experts a token goes to is held constant, as in its gradient."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=19, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, head_dim=8,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pools = [{"input_ids": torch.randint(19, (6, 10))} for _ in range(3)]
    for pool in pools:
        causal_lm_losses(model, pool).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    selector = Selector(model, optimizer, causal_lm_losses, [pools[2]], keep=2, horizon=2)
    selector.select(pools[0], pools[1:])
    model.eval()
    expected = -slopes(model, causal_lm_losses, pools[0], selector.state.ahead.sensitivities[0])
    found = selector.last.scores.double()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.99


@pytest.mark.parametrize("interval", [1, 2])
def test_a_gradient_scaler_changes_nothing(interval):
    """Scores are taken from unscaled losses, and an update that it skips is none."""
    kept = {}
    for scale in (1.0, 2.0**10):
        model, optimizer = custom(Swish, torch.float64)
        torch.manual_seed(1)
        pools, target = [batch(8, torch.float64) for _ in range(9)], [batch(9, torch.float64)]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        selector = Selector(model, optimizer, loss_fn, target, keep=3, interval=interval, seed=2)
        kept[scale] = []
        for step, part in enumerate(selector.stream(pools)):
            kept[scale].append((selector.last.step, selector.last.indices.tolist()))
            optimizer.zero_grad()
            scaler.scale(loss_fn(model, part).mean()).backward()
            if step == 4:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert kept[1.0] == kept[2.0**10]
    assert [step for step, _ in kept[1.0]] == [0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_a_loss_that_the_model_has_averaged():
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = {"input_ids": torch.randint(19, (6, 10))}

    def fused(model, batch):
        return model(**batch, labels=batch["input_ids"]).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = Selector(model, optimizer, fused, [ids], keep=2)
    with pytest.raises(ValueError, match=r"got \(\).*selectflow.models.language.causal_lm_losses"):
        selector.select(ids)


def test_hooks_that_mark_embeddings_are_off_in_scoring_alone():
    """As peft, transformers and TRL set them, here twice; another hook acts on scores, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 4))
    model[0].weight.requires_grad_(False)

    def make_inputs_require_grad(module, inputs, output):
        output.requires_grad_(True)

    def doubled(module, inputs, output):
        return 2 * output

    data = {"x": torch.randint(7, (9, 2)), "y": torch.randint(4, (9,))}
    scores = {}
    for hooks in ([], [doubled], [make_inputs_require_grad, doubled, make_inputs_require_grad]):
        handles = [model[0].register_forward_hook(hook) for hook in hooks]
        optimizer = torch.optim.AdamW(model[2].parameters())
        selector = Selector(model, optimizer, loss_fn, [data], keep=3, derivative="exact")
        selector.select(data)
        scores[len(hooks)] = selector.last.scores
        assert model[0](data["x"]).requires_grad == (len(hooks) == 3)  # they are there again
        for handle in handles:
            handle.remove()
    assert torch.equal(scores[3], scores[1])
    assert not torch.equal(scores[1], scores[0])
    assert not model[0](data["x"]).requires_grad  # the handles still hold


class OfTwoModes(nn.Module):
    """Another output in eval mode, as detectors and nets with auxiliary heads have."""

    def __init__(self):
        super().__init__()
        self.head, self.auxiliary = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("derivative", ["auto", "exact", "central"])
@pytest.mark.parametrize("strategy", ["influence", "loss"])
def test_a_loss_that_fails_in_eval_mode_alone_says_so(derivative, strategy):
    def both(model, data):
        out, auxiliary = model(data["x"])
        return nn.functional.cross_entropy(out + auxiliary, data["y"], reduction="none")

    model = OfTwoModes()
    options = {"derivative": derivative, "strategy": strategy}
    optimizer = torch.optim.AdamW(model.parameters())
    selector = Selector(model, optimizer, both, [batch(8)], keep=3, **options)
    with pytest.raises(ValueError, match="too many values to unpack") as caught:
        selector.select(batch(8))
    assert "while scoring: the model is in eval mode there" in " ".join(caught.value.__notes__)
    assert model.training


NOISE = {
    "torch": torch.randn_like,
    "numpy": lambda x: torch.from_numpy(np.random.randn(*x.shape)),  # noqa: NPY002
    "python": lambda x: torch.tensor([[random.gauss(0, 1)] for _ in x]).to(x),
}


@pytest.mark.parametrize("horizon", [0, 3])
@pytest.mark.parametrize("source", NOISE)
def test_passes_of_a_difference_draw_the_same_noise(source, horizon):
    """Scores are those of the losses with that noise in the data."""

    def noisy(model, data):
        return loss_fn(model, data | {"x": data["x"] + NOISE[source](data["x"])})

    def fixed(model, data):
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        torch.set_rng_state(began[0])
        np.random.set_state(began[1])  # noqa: NPY002
        random.setstate(began[2])
        losses = noisy(model, data)
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
        return losses

    model, optimizer = custom(PlainSwish, torch.float64)
    data = [batch(8, torch.float64) for _ in range(4)]
    began = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    scores = []
    for loss in (noisy, fixed):
        selector = Selector(model, optimizer, loss, data[:1], keep=2, horizon=horizon)
        selector.select(data[1], data[2:])
        scores.append(selector.last.scores)
    assert torch.equal(*scores)


def test_noise_from_a_generator_of_ones_own_is_named():
    generator = torch.Generator().manual_seed(0)

    def noisy(model, data):
        noise = torch.randn(data["x"].shape, generator=generator)
        return loss_fn(model, data | {"x": data["x"] + noise})

    model, optimizer = custom(PlainSwish)
    selector = Selector(model, optimizer, noisy, [batch(8)], keep=2)
    with pytest.raises(FloatingPointError, match=r"no random numbers from generators of"):
        selector.select(batch(8))


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("chunk_size", [None, 5, "auto"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_inputs_score_as_dense_ones(layout, chunk_size, horizon):
    def linear(model, data):
        logits = torch.mm(data["x"], model.weight.T) + model.bias
        return nn.functional.cross_entropy(logits, data["y"], reduction="none")

    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dense = [batch(8, torch.float64) for _ in range(4)]
    for data in dense:
        data["x"] = data["x"].relu()
    sparse = [data | {"x": data["x"].to_sparse(layout=layout)} for data in dense]
    last = []
    for data in (dense, sparse):
        options = {"horizon": horizon, "chunk_size": chunk_size, "derivative": "central"}
        selector = Selector(model, optimizer, linear, data[:1], keep=3, **options)
        kept = selector.select(data[1], data[2:])
        last.append(selector.last)
    assert (last[0].scores - last[1].scores).norm() < 1e-7 * last[0].scores.norm()
    assert kept["x"].layout is layout
    assert torch.equal(kept["x"].to_dense(), dense[1]["x"][last[1].indices])
