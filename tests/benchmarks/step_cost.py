"""What selection costs: milliseconds and peak memory of its parts, as ratios to a plain step.

    python tests/benchmarks/step_cost.py [mlp] [gpt2] [--rounds 5] [--threads 1]

A plain step trains on 16 examples. Every variant is timed once in each round, in turn, so that a
drifting machine slows all alike; the table shows the median and the range over the rounds of the
ratio to the plain step of the same round. Memory is the growth of the process's peak over what it
held before, each variant in a process of its own.
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


def gpt2():
    def loss_fn(model, tokens):
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    # Zipf-like tokens with structure to learn: each is a function of the one before, or random.
    def batch(num):
        tokens = (8192 ** torch.rand(num, 129)).long().clamp(max=8191)
        for position in range(1, 129):
            copied = torch.rand(num) < 0.5
            following = (tokens[:, position - 1] * 31 + 7) % 8192
            tokens[:, position] = torch.where(copied, following, tokens[:, position])
        return tokens

    return GPT2(), loss_fn, batch, 3e-4


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
VARIANTS: dict[str, dict | None] = {
    "plain step on 16": None,
    "keep 16 of 32, H=0, every step": {"horizon": 0},
    "keep 16 of 32, H=0, every 8": {"horizon": 0, "interval": 8},
    "keep 16 of 32, H=1, every step": {"horizon": 1},
    "keep 16 of 32, H=1, every 8": {"horizon": 1, "interval": 8},
    "keep 16 of 32, H=4, every step": {"horizon": 4},
    "keep 16 of 32, H=4, every 8": {"horizon": 4, "interval": 8},
    "  the same with exact derivatives, H=0": {"horizon": 0, "derivative": "exact"},
    "uniform 16 of 32": {"strategy": "uniform"},
}


def build(name: str, options: dict | None) -> Callable[[int], None]:
    """A function that makes so many training steps."""
    torch.manual_seed(0)
    model, loss_fn, batch, lr = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    pools = cycle([batch(KEEP if options is None else POOL) for _ in range(8)])
    batches = pools
    if options is not None:
        target = [batch(TARGET) for _ in range(4)]
        batches = Selector(model, optimizer, loss_fn, target, KEEP, **options).stream(pools)

    def steps(num: int) -> None:
        for _ in range(num):
            loss = loss_fn(model, next(batches)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return steps


def peak_kib() -> int:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def peak_growth_gib(name: str, variant: str, threads: int) -> float:
    """Peak resident memory of eight steps over the memory before the model existed, in GiB."""
    torch.set_num_threads(threads)
    warm = torch.nn.Linear(4, 4)  # libraries load before the measurement begins
    warm(torch.ones(1, 4)).sum().backward()
    torch.func.jvp(lambda x: x.sin(), (torch.ones(1),), (torch.ones(1),))
    gc.collect()
    before = peak_kib()
    build(name, VARIANTS[variant])(8)
    return (peak_kib() - before) / 2**20


def time_variants(name: str, rounds: int, num_steps: int) -> dict[str, list[float]]:
    """Milliseconds a step of each variant, one figure a round."""
    steppers = {variant: build(name, options) for variant, options in VARIANTS.items()}
    for stepper in steppers.values():
        stepper(9)
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, stepper in steppers.items():
            began = time.perf_counter()
            stepper(num_steps)
            found[variant].append((time.perf_counter() - began) / num_steps * 1e3)
    return found


def agreement(name: str) -> None:
    """How well the scores in use rank a pool, against exact derivatives, after some training."""
    torch.manual_seed(0)
    model, loss_fn, batch, lr = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    pools, target = [batch(POOL) for _ in range(12)], [batch(TARGET)]
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
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=[*MODELS, []])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        num_steps = {"mlp": 160, "gpt2": 8}[name]
        found = time_variants(name, args.rounds, num_steps)
        plain = found["plain step on 16"]
        print(f"\n{name}, {args.threads} thread(s), {args.rounds} rounds of {num_steps} steps")
        print(f"{'':42}{'ms/step':>9}{'ratio':>8}{'range':>14}{'peak GiB':>10}{'ratio':>7}")
        context = multiprocessing.get_context("spawn")
        peaks = {}
        for variant, times in found.items():
            with context.Pool(1) as process:
                peaks[variant] = process.apply(peak_growth_gib, (name, variant, args.threads))
            ratios = [time / base for time, base in zip(times, plain, strict=True)]
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            print(f"{variant:42}{statistics.median(times):9.2f}{statistics.median(ratios):8.2f}"
                  f"{spread:>14}{peaks[variant]:10.3f}"
                  f"{peaks[variant] / peaks['plain step on 16']:7.2f}", flush=True)  # fmt: skip
        agreement(name)


if __name__ == "__main__":
    main()
