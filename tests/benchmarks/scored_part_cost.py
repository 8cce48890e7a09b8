"""What scoring a part costs: of the parameters, or of the tokens, at H = 0 on a GPT-2 shape.

    python tests/benchmarks/scored_part_cost.py [--rounds 3]

Seconds of the look-ahead and of scoring 16 candidates of 128 tokens, and their share of what all
parameters and tokens take: medians over rounds in which every variant is timed in turn.
"""

from __future__ import annotations

import argparse
import runpy
import statistics
from pathlib import Path

import torch

from selectflow import Selector

GPT2 = runpy.run_path(str(Path(__file__).with_name("step_cost.py")))["gpt2"]
NO_EMBEDDINGS = {"params": ["!embed*", "!position*"]}
VARIANTS = {
    "all": {},
    "without embeddings": NO_EMBEDDINGS,
    "last block": {"params": ["blocks.5.*"]},
    "64 tokens": {"score_view": lambda tokens: tokens[:, :65]},
    "32 tokens": {"score_view": lambda tokens: tokens[:, :33]},
    "32 tokens, no embeddings": NO_EMBEDDINGS | {"score_view": lambda tokens: tokens[:, :33]},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, loss_fn, batch, lr = GPT2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loss_fn(model, batch(4)).mean().backward()
    optimizer.step()  # so that there are moments
    target, pool = [batch(8)], batch(16)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds + 1):
        for name, options in VARIANTS.items():
            selector = Selector(
                model, optimizer, loss_fn, target, 4, 0, derivative="central", chunk_size=8,
                **options,
            )  # fmt: skip
            selector.select(pool)
            last = selector.last
            found[name].append((last.lookahead_s, last.seconds - last.lookahead_s))
    medians = {  # without the first round, a warm-up
        name: [statistics.median(part) for part in zip(*times[1:], strict=True)]
        for name, times in found.items()
    }
    for name, (ahead, scoring) in medians.items():
        base = medians["all"]
        print(
            f"{name:26} look-ahead {ahead:.2f} s ({ahead / base[0]:.2f})   "
            f"scoring {scoring:.2f} s ({scoring / base[1]:.2f})"
        )


if __name__ == "__main__":
    main()
