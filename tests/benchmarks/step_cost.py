"""What selection costs: processor time and peak memory, as ratios to a plain step.

    python tests/benchmarks/step_cost.py [mlp] [gpt2] [--rounds 4] [--threads 1] [--bf16]

A plain step trains on the 16 examples that are kept, or on all 32 candidates: the two denominators.
Every variant is timed once in each round, in turn, so that a drifting machine slows all alike; the
table shows the median and the range over the rounds of the ratio to the plain step on 16 of the
same round, and the median of the ratio to that on 32. "Every 8" is a step with a look-ahead and one
without, weighted 1 to 7. GPT-2 leaves out what takes minutes: H = 4 and exact derivatives. Memory
is the growth of the process's peak over what it held before, in two steps, each variant in a
process of its own. With --bf16 loss_fn opens an autocast, which a processor may emulate.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from selectflow import Selector

KEEP, POOL, TARGET = 16, 32, 16
CHUNK = {"mlp": None, "gpt2": 8}  # scoring holds fewer activations at once than the training step


class Block(nn.Module):
    """A pre-norm transformer block with fused causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """6 layers, 6 heads, 384 wide, vocabulary 8192, tied head, 128 tokens: 13.8M parameters."""

    def __init__(self, vocabulary=8192, width=384, heads=6, layers=6, context=128):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for weight in (self.embed.weight, self.position.weight):
            nn.init.normal_(weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt2(vocabulary=8192, context=128, **sizes):
    def loss_fn(model, tokens):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    # Zipf-like tokens with structure to learn: each is a function of the one before, or random.
    def batch(num):
        tokens = (vocabulary ** torch.rand(num, context + 1)).long().clamp(max=vocabulary - 1)
        for position in range(1, context + 1):
            copied = torch.rand(num) < 0.5
            following = (tokens[:, position - 1] * 31 + 7) % vocabulary
            tokens[:, position] = torch.where(copied, following, tokens[:, position])
        return tokens

    return GPT2(vocabulary, context=context, **sizes), loss_fn, batch, 3e-4


def mlp():
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def batch(num):
        labels = torch.randint(10, (num,))
        return torch.randn(num, 1, 8, 8) + torch.linspace(-1, 1, 10)[
            labels, None, None, None
        ], labels

    return model, loss_fn, batch, 3e-3


MODELS = {"mlp": mlp, "gpt2": gpt2}
# name -> options of the selector (none: a plain step), steps of one round by model; a model that is
# not named leaves the variant out
VARIANTS: dict[str, tuple[dict | None, dict[str, int]]] = {
    "plain step on 16": (None, {"mlp": 200, "gpt2": 2}),
    "plain step on all 32": ({}, {"mlp": 200, "gpt2": 1}),
    "keep 16 of 32, H=0, every step": ({"horizon": 0}, {"mlp": 100, "gpt2": 1}),
    "keep 16 of 32, H=0, every 8": ({"horizon": 0, "interval": 8}, {"mlp": 100, "gpt2": 1}),
    "keep 16 of 32, H=1, every step": ({"horizon": 1}, {"mlp": 100, "gpt2": 1}),
    "keep 16 of 32, H=4, every step": ({"horizon": 4}, {"mlp": 40}),
    "exact derivatives, H=0, every step": ({"horizon": 0, "derivative": "exact"}, {"mlp": 100}),
}


def variants_of(name: str) -> dict[str, tuple[dict | None, int]]:
    """The variants of a model, and their steps of one round."""
    return {
        variant: (options, steps[name])
        for variant, (options, steps) in VARIANTS.items()
        if name in steps
    }


def made(name: str, is_bf16: bool):
    """A model, its loss_fn, a function that draws a batch, and the learning rate."""
    torch.manual_seed(0)
    model, loss_fn, batch, lr = MODELS[name]()
    if not is_bf16:
        return model, loss_fn, batch, lr

    def under_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn(model, batch)

    return model, under_autocast, batch, lr


def build(name: str, options: dict | None, is_bf16: bool) -> Callable[[int], float]:
    """A function that makes so many training steps and returns milliseconds a step.

    Where a look-ahead serves several steps, it makes so many with one and so many without.
    """
    model, loss_fn, batch, lr = made(name, is_bf16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    pools = cycle([batch(KEEP if options is None else POOL) for _ in range(8)])
    batches, interval = pools, (options or {}).get("interval", 1)
    if options:
        target = [batch(TARGET) for _ in range(4)]
        options = {"chunk_size": CHUNK[name]} | options
        selector = Selector(model, optimizer, loss_fn, target, KEEP, **options)
        batches = selector.stream(pools)

    def step() -> float:
        began = time.process_time()
        loss = loss_fn(model, next(batches)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (time.process_time() - began) * 1e3

    def steps(num: int) -> float:
        if interval == 1:
            return statistics.fmean(step() for _ in range(num))
        spent = 0.0
        for _ in range(num):
            selector.state.ahead = None  # so that this step looks ahead
            spent += (step() + (interval - 1) * step()) / interval
        return spent / num

    return steps


def peak_kib() -> int:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def peak_growth_gib(name: str, variant: str, threads: int, is_bf16: bool) -> float:
    """Peak resident memory of two steps over the memory before the model existed, in GiB."""
    torch.set_num_threads(threads)
    warm = torch.nn.Linear(4, 4)  # libraries load before the measurement begins
    warm(torch.ones(1, 4)).sum().backward()
    torch.func.jvp(lambda x: x.sin(), (torch.ones(1),), (torch.ones(1),))
    gc.collect()
    before = peak_kib()
    build(name, VARIANTS[variant][0], is_bf16)(2)
    return (peak_kib() - before) / 2**20


def time_variants(name: str, rounds: int, is_bf16: bool) -> dict[str, list[float]]:
    """Milliseconds a step of each variant, one figure a round."""
    variants = variants_of(name)
    steppers = {
        variant: build(name, options, is_bf16) for variant, (options, _) in variants.items()
    }
    for stepper in steppers.values():
        stepper(1)
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, stepper in steppers.items():
            found[variant].append(stepper(variants[variant][1]))
    return found


def print_memory(name: str, threads: int, is_bf16: bool) -> None:
    base = None
    print(f"{'peak memory':38}{'GiB':>9}{'ratio':>8}")
    for variant in variants_of(name):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peak = process.apply(peak_growth_gib, (name, variant, threads, is_bf16))
        base = base or peak
        print(f"{variant:38}{peak:9.3f}{peak / base:8.2f}", flush=True)


def print_row(label: str, times: list[float], kept: list[float], everyone: list[float]) -> None:
    ratios, others = (
        [time / base for time, base in zip(times, plain, strict=True)] for plain in (kept, everyone)
    )
    spread, median = f"{min(ratios):.2f}-{max(ratios):.2f}", statistics.median
    print(
        f"{label:38}{median(times):9.2f}{median(ratios):8.2f}{spread:>14}{median(others):8.2f}",
        flush=True,
    )


def agreement(name: str, is_bf16: bool) -> None:
    """How well the scores in use rank a pool, against exact derivatives, after some training."""
    model, loss_fn, batch, lr = made(name, is_bf16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    num = 2 if name == "gpt2" else 12  # exact derivatives take it long
    pools, target = [batch(POOL) for _ in range(num)], [batch(TARGET)]
    ranks = []
    for pool in pools:
        scores = []
        for derivative in ("auto", "exact"):
            selector = Selector(
                model, optimizer, loss_fn, target, KEEP, horizon=0, derivative=derivative
            )
            kept = selector.select(pool)
            scores.append(selector.last.scores.argsort().argsort().double())
        ranks.append(float(torch.corrcoef(torch.stack(scores))[0, 1]))
        loss_fn(model, kept).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank correlation of scores with exact derivatives: mean {statistics.mean(ranks):.5f}, "
          f"least {min(ranks):.5f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="train and score in a bf16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        found = time_variants(name, args.rounds, args.bf16)
        print(f"\n{name}, {args.threads} thread(s), {args.rounds} rounds")
        print(f"{'':38}{'ms/step':>9}{'over 16':>8}{'range':>14}{'over 32':>8}")
        for variant, times in found.items():
            print_row(variant, times, found["plain step on 16"], found["plain step on all 32"])
        agreement(name, args.bf16)
        print_memory(name, args.threads, args.bf16)


if __name__ == "__main__":
    main()
