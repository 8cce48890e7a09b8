"""Cost and memory of other ways to score, beside a small model's: the 13.8M shape.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer_peers.py [cost] [memory] [--rounds 3]

Shapes, data and what is counted are those of `scorer_cost.py`. "torch.func": the gradient of each
candidate, by `vmap` of `grad`, in parts of 8. dattri-llm 0.1.0, where it is installed (`pip install
dattri-llm`), drops three fourths of each pool from the gradient in its own backward pass, by a
fresh target batch at every step. Memory: growth of the peak resident set over three steps, in a
process of its own, since before the model was built.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
from scorer_cost import SHAPES, loss_fn, stepper, take_step
from step_cost import gpt2, peak_kib
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

peer: Any = import_module("dattri_llm") if find_spec("dattri_llm") else None
SHAPE = SHAPES["14M"]
OURS = ("plain, the kept part", "plain, the whole pool", "the model scores", "a small model scores")
Step = Callable[[], Any]


def torch_func(model: Any, optimizer: Any, pools: Any, targets: Any) -> Step:
    def one(params: Any, tokens: Any) -> Any:
        return loss_fn(lambda seen: functional_call(model, params, (seen,)), tokens[None])[0]

    gradients = vmap(grad(one), (None, 0))

    def step() -> None:
        pool, params = next(pools), {k: p.detach() for k, p in model.named_parameters()}
        goal = torch.autograd.grad(loss_fn(model, next(targets)).mean(), [*model.parameters()])
        scores = []
        for part in pool.split(SHAPE.chunk):
            with sdpa_kernel(SDPBackend.MATH):  # the fused one has no batching rule
                found = gradients(params, part)
            products = zip(found.values(), goal, strict=True)
            scores.append(sum(torch.einsum("n...,...->n", a, b) for a, b in products))
        kept = torch.cat(scores).topk(SHAPE.keep).indices
        take_step(model, optimizer, pool[kept])

    return step


def dattri_llm(model: Any, optimizer: Any, pools: Any, targets: Any) -> Step:
    def mean(model: Any, tokens: Any) -> Any:
        return loss_fn(model, tokens).mean()

    fractions = {"threshold": 0.75, "threshold_mode": "bottom_fraction"}
    callback = peer.DataSelectionCallback(
        model, "val_loader", val_loader=[next(targets) for _ in range(4)], val_loss_fn=mean,
        renormalize=True, selection_kwargs=fractions,
    )  # fmt: skip
    hooks = peer.HookManager(model, callbacks=[callback])

    def step() -> None:
        optimizer.zero_grad()
        with hooks.collect():
            mean(model, next(pools)).backward()
        optimizer.step()

    return step


PEERS = {"torch.func": torch_func, "dattri-llm": dattri_llm}


def made(name: str) -> Step:
    torch.manual_seed(0)
    model, _, batch, lr = gpt2(SHAPE.vocabulary, SHAPE.tokens, **SHAPE.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if name in OURS:
        steps = stepper(SHAPE, model, optimizer, batch, name)
        return lambda: steps(1)
    pools, targets = (cycle([batch(num * SHAPE.keep) for _ in range(4)]) for num in (4, 1))
    return PEERS[name](model, optimizer, pools, targets)


def cost(names: list[str], rounds: int) -> None:
    steps = {name: made(name) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step()
            found[name].append(time.process_time() - began)
    kept, whole = (found[name][1:] for name in OURS[:2])  # the first step is a warm-up
    print(f"{'':24}{'s':>8}{'on 8':>8}{'range':>14}{'on 32':>8}")
    for name, (_, *mine) in found.items():
        ratios, others = (
            [a / b for a, b in zip(mine, base, strict=True)] for base in (kept, whole)
        )
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{name:24}{statistics.median(mine):8.2f}{statistics.median(ratios):8.2f}"
            f"{spread:>14}{statistics.median(others):8.2f}"
        )


def growth(name: str) -> float:
    """Peak resident memory of three steps over that before the model existed, in GiB."""
    torch.set_num_threads(1)
    torch.nn.Linear(4, 4)(torch.ones(1, 4)).sum().backward()  # libraries load before
    torch.func.jvp(lambda x: x.sin(), (torch.ones(1),), (torch.ones(1),))
    gc.collect()
    before = peak_kib()
    step = made(name)
    for _ in range(3):
        step()
    return (peak_kib() - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["cost", "memory"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [*OURS, "torch.func"] + (["dattri-llm"] if peer else [])
    if "cost" in args.what:
        cost(names, args.rounds)
    if "memory" in args.what:
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                print(f"{name:24}{process.apply(growth, (name,)):8.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
