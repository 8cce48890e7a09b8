"""Selection in several processes on the models and settings that people shard."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from test_distributed import KEEP, POOL, TARGET, Net, data, in_parallel, losses, make, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from selectflow import AutoHorizon, Selector
from selectflow.models.language import causal_lm_losses


def gpt2():
    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return model, model.transformer.h


def llama_lora():
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    how = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(model, how)
    return model, model.base_model.model.model.layers


MODELS = {"gpt2": gpt2, "llama with lora": llama_lora}


def texts(rank, num, size, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return [
        {"input_ids": torch.randint(0, 61, (size, 12), generator=generator)} for _ in range(num)
    ]


def on_texts(kind, wrapper, horizon, num_steps):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, blocks = MODELS[kind]()
    model = model.double()
    if wrapper == "fsdp2":
        for block in blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-2)
    loss_fn = causal_lm_losses
    target = texts(rank, 2, 4, seed=1)
    selector = Selector(
        model, optimizer, loss_fn, target, keep=3, horizon=horizon, derivative="central"
    )
    scores = []
    for batch in selector.stream(texts(rank, num_steps, 8)):
        scores.append(selector.last.scores)
        optimizer.zero_grad()
        loss_fn(model, batch).mean().backward()
        optimizer.step()
    return torch.stack(scores), whole(model)


@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_sharded_block_by_block_are_as_replicas(two, kind, horizon):
    found = {wrapper: two.run(on_texts, kind, wrapper, horizon, 5) for wrapper in ("ddp", "fsdp2")}
    for (scores, weights), (others, sharded) in zip(found["ddp"], found["fsdp2"], strict=True):
        assert scores.std() > 0
        assert (scores - others).norm() < 1e-6 * scores.norm()
        assert (weights - sharded).abs().max() < 1e-10


def one_step(kind, wrapper, horizon, precision=torch.float64):
    """Scores of one pool after some training, and the weights before and after it."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Net().to(precision)
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if kind == "mixed" else None)
    if wrapper == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    else:
        model = DistributedDataParallel(model)
    build = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    how = {"momentum": 0.9} if kind == "sgd" else {}
    optimizer = build(model.parameters(), 1e-2, **how)

    def cast(batches):
        return [{**b, "x": b["x"].to(precision)} for b in batches]

    pools = cast(data(rank, 30, POOL))
    target = cast(data(rank, 1, TARGET, seed=1, noise=0))
    selector = Selector(model, optimizer, losses, target, keep=KEEP, horizon=horizon)
    steps = []
    for batch in selector.stream(pools):
        steps.append(selector.last.step)
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    before = whole(model)
    selector.select(pools[0])
    return selector.last.scores, torch.equal(before, whole(model)), steps, selector.last.score_error


@pytest.mark.parametrize("horizon", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_replicas_of_shards(four, horizon):
    """HSDP: two copies of two shards each; the replicas take no part in sums over entries."""
    hybrid = four.run(one_step, "hybrid", "fsdp2", horizon)
    plain = four.run(one_step, "plain", "ddp", horizon)
    for (scores, is_restored, *_), (expected, *_) in zip(hybrid, plain, strict=True):
        assert is_restored
        assert (scores - expected).norm() < 1e-6 * expected.norm()


def test_sgd_counts_steps_on_shards(two):
    sharded = two.run(one_step, "sgd", "fsdp2", 1)
    whole_ones = two.run(one_step, "sgd", "ddp", 1)
    for (scores, _, steps, _), (expected, _, expected_steps, _) in zip(
        sharded, whole_ones, strict=True
    ):
        assert steps == expected_steps == list(range(30))
        assert (scores - expected).norm() < 1e-6 * expected.norm()


def test_mixed_precision_ranks_as_float32(two):
    """The step of differences follows the arithmetic of the policy, not the type of the shards."""
    mixed = two.run(one_step, "mixed", "fsdp2", 0, torch.float32)
    exact = two.run(one_step, "plain", "ddp", 0, torch.float32)
    for (scores, is_restored, _, error), (expected, *_) in zip(mixed, exact, strict=True):
        assert is_restored
        assert error < 0.1
        assert torch.corrcoef(torch.stack([scores, expected]))[0, 1] > 0.97
    assert mixed[0][3] == mixed[1][3]


# --- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The size of the largest plain tensor that is made, in entries."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, list | tuple) else (found,):
            if isinstance(each, torch.Tensor) and not hasattr(each, "to_local"):
                self.num = max(self.num, each.untyped_storage().nbytes() // each.element_size())
        return found


def held(horizon):
    """Entries of what a look-ahead keeps, and of the largest tensor made, over the model's."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(8)))
    num = sum(p.numel() for p in model.parameters())
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(rank)
    pools = [{"x": torch.randn(4, 32, generator=generator)} for _ in range(6)]
    selector = Selector(
        model,
        optimizer,
        lambda m, b: m(b["x"]).square().mean(1),
        pools[:1],
        keep=2,
        horizon=horizon,
        derivative="central",
    )
    for batch in selector.stream(pools[:2]):
        optimizer.zero_grad()
        model(batch["x"]).square().mean().backward()
        optimizer.step()
    with Largest() as largest:
        selector.select(pools[2], pools[3:])
    gamma = sum(x.numel() for x in selector.state.ahead.gamma(0).values())
    return gamma / num, largest.num / num


@pytest.mark.parametrize("horizon", [0, 3])
def test_nothing_is_whole_but_one_block(two, horizon):
    for gamma, largest in two.run(held, horizon):
        assert gamma <= 0.5
        assert largest <= 1 / 8 + 0.05


# --- resumed --------------------------------------------------------------------------------------


def resumed(wrapper):
    """Weights and scores without and with an interruption, horizon and rate under control."""
    rank = dist.get_rank()
    pools, found = data(rank, 30, POOL), []
    for is_interrupted in (False, True):
        model, optimizer = make(wrapper)
        target = data(rank, 3, TARGET, seed=1, noise=0)

        def selector(model=model, optimizer=optimizer, target=target):
            return Selector(
                model, optimizer, losses, target, keep=KEEP, lr="auto", seed=rank,
                horizon=AutoHorizon(off=False, gap=9, costs={0: 1.0, 1: 2.0}, largest=1),
            )  # fmt: skip

        select, seen = selector(), []
        stream = select.stream(pools)
        for step in range(30):
            if is_interrupted and step == 17:
                saved, peeked = select.state_dict(), select.num_peeked
                del select
                select = selector()
                select.load_state_dict(saved)
                stream = select.stream(pools[step + peeked :])
            batch = next(stream)
            seen.append(select.last.scores)
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
        found.append((torch.stack(seen), whole(model)))
    return [torch.equal(one, other) for one, other in zip(*found, strict=True)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_resumed_bit_for_bit(two, wrapper):
    assert two.run(resumed, wrapper, limit_s=120) == [[True, True]] * 2


# --- recomputed activations -----------------------------------------------------------------------


def recomputed(wrapper, reentrant):
    """Scores at H = 1 with blocks that are recomputed in the backward pass, or not (None)."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Net().double()
    if reentrant is not None:
        for block in model.blocks:
            plain = block.forward
            block.forward = partial(checkpoint, plain, use_reentrant=reentrant)
    if wrapper == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    target = data(rank, 1, TARGET, seed=1, noise=0)
    selector = Selector(
        model, optimizer, losses, target, keep=KEEP, horizon=1, derivative="central"
    )
    for batch in selector.stream(data(rank, 4, POOL)):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    return selector.last.scores, whole(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_recomputed_activations_change_nothing(two, wrapper, reentrant):
    expected = two.run(recomputed, wrapper, None)
    for found, other in zip(two.run(recomputed, wrapper, reentrant), expected, strict=True):
        assert (found[0] - other[0]).abs().max() < 1e-9 * other[0].abs().max()
        assert (found[1] - other[1]).abs().max() < 1e-12


# --- bad input ------------------------------------------------------------------------------------


def laid_out(case):
    """A model whose gradients no group of processes averages as a whole."""
    model = Net().double()
    if case == "inside":
        return nn.Sequential(DistributedDataParallel(model))
    if case == "tensor parallel":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        return parallelize_module(model, mesh, {"head": ColwiseParallel()})
    for block in model.blocks:
        fully_shard(block)
    return model


def refused(case):
    rank = dist.get_rank()
    model, optimizer = make("fsdp2" if case in ("exact", "auto chunks", "chunks") else "ddp")
    target, pool = data(rank, 3, TARGET, seed=1, noise=0), data(rank, 1, POOL)[0]
    given = {
        "options": {"horizon": rank},
        "keep": {"keep": 0.25},
        "exact": {"derivative": "exact"},
        "auto chunks": {"chunk_size": "auto"},
        "chunks": {"chunk_size": 5},
    }
    how = {"keep": KEEP, "horizon": 0} | given.get(case, {})
    if case in ("keep", "chunks"):
        pool = data(rank, 1, POOL + 8 * rank)[0]
    elif case == "targets":
        target = target[: 3 - rank]
    elif case == "rate":
        optimizer.param_groups[0]["lr"] *= 1 + rank
    elif case == "weights":
        with torch.no_grad():
            next(model.parameters()).add_(rank)
    elif case == "model":
        for param in list(model.parameters())[:rank]:
            param.requires_grad_(False)
    elif case in ("partly sharded", "inside", "tensor parallel"):
        model = laid_out(case)
        optimizer = torch.optim.AdamW(model.parameters())
    elif case == "accumulating":
        model, optimizer = make("fsdp2")
        model.set_requires_gradient_sync(False)
        losses(model, pool).mean().backward()
    try:
        selector = Selector(model, optimizer, losses, target, **how)
        if case == "pools":
            next(selector.stream([pool] * (3 + rank)))
        selector.select(pool)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("options", "options must be the same in all 2 processes, got horizon: 1 at rank 1 and 0"),
        ("keep", "examples kept of a pool must be the same in all 2 processes, got 5 at rank 1"),
        ("pools", "pools of the stream must be the same in all 2 processes, got 4 at rank 1 and 3"),
        ("targets", "batches of the target must be the same in all 2 processes, got 2 at rank 1"),
        ("rate", "updates must be the same in all 2 processes, got group 0.lr: 0.02 at rank 1 and"),
        ("weights", "values of the parameters, by norm, must be the same in all 2 processes"),
        ("model", "trained parameters must be the same in all 2 processes"),
        ("partly sharded", "all trained parameters must be sharded where some are, got whole ones"),
        ("inside", "DistributedDataParallel must be around the whole model, got it inside of"),
        ("tensor parallel", "DTensor parameters must be those of fully_shard over one mesh, got"),
        ("exact", "of sharded parameters derivative must be 'auto' or 'central'"),
        ("auto chunks", "of sharded parameters derivative must be 'auto' or 'central'"),
        ("chunks", "passes over a batch in chunks must be the same in all 2 processes, got 4"),
        ("accumulating", "a selection must come where gradients are reduced, got a model under"),
    ],
)
def test_what_would_go_apart_is_refused_by_all(two, case, message):
    for found in two.run(refused, case):
        assert found is not None
        assert message in found


# --- accelerate -----------------------------------------------------------------------------------


def by_accelerate(port, num_steps):
    rank = dist.get_rank()
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in environ.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    accelerator = Accelerator(cpu=True)
    model, optimizer = make(None)
    model, optimizer = accelerator.prepare(model, optimizer)
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(
        model, optimizer, losses, target, keep=KEEP, horizon=1, derivative="central"
    )
    keys = []
    for batch in selector.stream(data(rank, num_steps, POOL)):
        keys.append(batch["key"])
        optimizer.zero_grad()
        accelerator.backward(losses(model, batch).mean())
        optimizer.step()
    return keys, whole(model)


def test_prepared_by_accelerate(two):
    found = two.run(by_accelerate, 29500, 8)
    expected = two.run(in_parallel, "ddp", 1, 8)
    for (keys, weights), (steps, others) in zip(found, expected, strict=True):
        assert keys == [kept for _, kept in steps]
        assert torch.equal(weights, others)
