"""What a probe of the error costs, in plain steps, and how its two forms agree in float32.

    python tests/benchmarks/proxy_cost.py [--rounds 3]

A GPT-2 shape of 4 layers, 128 wide, 64 tokens; keep 8 of 32; the target batch has 16 examples.
A plain step trains on 8. Times are the process's own CPU seconds with one thread, the median over
the rounds, as a ratio to the plain step of the same round. A window's nominal examples are drawn at
random, its selected ones are those with the lowest losses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import torch
import torch.nn.functional as F
from step_cost import GPT2

from selectflow.core.derivatives import Derivatives
from selectflow.core.passes import Objective
from selectflow.core.proxy import probe
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import selection

KEEP, POOL, TARGET, VOCABULARY, CONTEXT = 8, 32, 16, 512, 64


def loss_fn(model, tokens):
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def batch(num):
    """Tokens of which half are a function of the one before."""
    tokens = torch.randint(VOCABULARY, (num, CONTEXT + 1))
    for position in range(1, CONTEXT + 1):
        copied = torch.rand(num) < 0.5
        following = (tokens[:, position - 1] * 31 + 7) % VOCABULARY
        tokens[:, position] = torch.where(copied, following, tokens[:, position])
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2(VOCABULARY, 128, 4, 4, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(model, batch(KEEP)).mean().backward()
            optimizer.step()

    train(30)
    reader = OptimizerReader(model, optimizer)
    derivatives, target = Derivatives(Objective(model, loss_fn)), batch(TARGET)
    ratios = defaultdict(list)
    for _ in range(args.rounds):
        began = time.process_time()
        train(10)
        plain = (time.process_time() - began) / 10
        state, pools = reader.state(), [batch(POOL) for _ in range(8)]
        nominal = [torch.randperm(POOL)[:KEEP] for _ in pools]
        selected = [derivatives.losses(state.params, p).argsort()[:KEEP] for p in pools]
        for method, horizons in (("fast", (1, 2, 4, 8)), ("exact", (1, 2))):
            for h in horizons:
                change = selection(pools[:h], nominal[:h], selected[:h])
                window = derivatives, reader.updates(h), state, change, target
                began = time.process_time()
                found = probe(*window, method=method, horizons=(h,))
                ratios[method, h].append((time.process_time() - began) / plain)
                print(
                    f"{method} h {h}: I {found.first[0]:+.3e}  Q {found.second[0]:+.3e}  "
                    f"D {found.effect[0]:+.3e}"
                )
        print(f"plain step {plain * 1e3:.0f} ms", flush=True)
    for (method, h), found in ratios.items():
        low, high = min(found), max(found)
        print(f"{method:5} h {h}: {statistics.median(found):6.1f} steps ({low:.1f} .. {high:.1f})")


if __name__ == "__main__":
    main()
