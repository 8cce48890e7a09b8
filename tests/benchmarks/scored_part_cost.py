"""What scoring a part costs, and how it ranks: of the parameters, or of the tokens, at H = 0.

    OMP_NUM_THREADS=1 python tests/benchmarks/scored_part_cost.py [--steps 80] [--pools 3]

The GPT-2 shape of `step_cost.py` is trained for some steps on the bytes of the text mixture, so
that gradients and moments are real ones, and then scores pools of 32 blocks of 128 bytes by a
target batch of 8. Printed are, for each part: its share of the parameters, Spearman's rank
correlation with the scores of all parameters and tokens in each pool (mean and least), how many of
the best 8 are the same, and processor seconds of the look-ahead and of scoring, over those of all:
medians over the pools, for each of which every part is timed in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from results_tasks import CONFIGS, trainer_module
from scipy.stats import spearmanr
from scorer_cost import loss_fn, take_step
from step_cost import gpt2

from selectflow import Selector
from selectflow.run.config import load

KEEP, POOL = 8, 32


def first(num: int) -> Any:
    return lambda tokens: tokens[:, : num + 1]


NO_EMBEDDINGS = ["!embed*", "!position*"]
VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "without embeddings": {"params": NO_EMBEDDINGS},
    "MLP outputs": {"params": ["blocks.*.down.*"]},
    "MLP outputs, upper half": {"params": [f"blocks.{at}.down.*" for at in (3, 4, 5)]},
    "attention outputs": {"params": ["blocks.*.out.*"]},
    "last two blocks": {"params": ["blocks.4.*", "blocks.5.*"]},
    "embedding and head, last norm": {"params": ["embed*", "norm.*"]},
    "last norm": {"params": ["norm.*"]},
    "64 tokens": {"score_view": first(64)},
    "32 tokens": {"score_view": first(32)},
    "32 tokens, MLP outputs": {"score_view": first(32), "params": ["blocks.*.down.*"]},
}


def texts(num_pools: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pools and target batches of blocks of 129 bytes."""
    options = ["data.text.block=129", f"data.pool={POOL}", "data.text.num_train=9000"]
    options += [f"data.target_batch={KEEP}", "num_threads=1", "model.width=8", "model.heads=1"]
    task = trainer_module("language")["build_task"](load(CONFIGS / "text_online.yaml", options))
    stream = iter(task.pools)
    return [next(stream)["tokens"] for _ in range(num_pools)], [b["tokens"] for b in task.target]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pools", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pools, targets = texts(args.steps + args.pools)
    model, _, _, lr = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for pool in pools[: args.steps]:
        take_step(model, optimizer, pool[:KEEP])
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    selectors = {
        name: Selector(
            model, optimizer, loss_fn, targets, KEEP, 0, derivative="central", chunk_size=8,
            **options,
        )
        for name, options in VARIANTS.items()
    }  # fmt: skip
    found = defaultdict(list)
    for pool in pools[args.steps - 1 :]:  # the first is to warm up
        whole = None
        for name, selector in selectors.items():
            selector.state.ahead = None  # so that it looks ahead
            began, began_s = time.process_time(), time.perf_counter()
            selector.select(pool)
            last = selector.last
            share = (time.process_time() - began) / (time.perf_counter() - began_s)
            whole = last if whole is None else whole
            same = len({*last.indices.tolist()} & {*whole.indices.tolist()})
            ahead = share * last.lookahead_s
            found[name].append((
                spearmanr(last.scores, whole.scores).statistic, same / KEEP,
                ahead, share * last.seconds - ahead,
            ))  # fmt: skip
    for name, rows in found.items():
        ranks, same, *times = zip(*rows[1:], strict=True)
        ahead, scoring = map(statistics.median, times)
        if name == "all":
            base = ahead, scoring
        names = selectors[name]._scoring.policy.names() or sizes
        print(
            f"{name:30}{sum(map(sizes.get, names)) / sum(sizes.values()):5.0%} of parameters  "
            f"rank {statistics.fmean(ranks):.3f} (least {min(ranks):.3f})  "
            f"same {statistics.fmean(same):.0%}  "
            f"look-ahead {ahead:.2f} s ({ahead / base[0]:.2f})  "
            f"scoring {scoring:.2f} s ({scoring / base[1]:.2f})  "
            f"both {(ahead + scoring) / sum(base):.2f}"
        )


if __name__ == "__main__":
    main()
