"""What a selection sends between processes: collectives and bytes, by wrapper, horizon and number.

    python tests/benchmarks/collectives.py [--processes 2 4]

Counted on gloo processes of this machine, for a small net in three parts under `fully_shard`: of a
training step, of a select with its look-ahead, and of a select in between. Bytes are those of the
tensors that one process hands to collectives, over those of the parameters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Processes
from test_distributed import KEEP, POOL, TARGET, data, losses, make

from selectflow import Selector


class Sent(TorchDispatchMode):
    """Counts collectives, and the bytes that this process gives to them."""

    def __init__(self):
        super().__init__()
        self.num, self.num_bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.num += 1
            self.num_bytes += sum(t.nbytes for t in _tensors(args))
        return func(*args, **(kwargs or {}))


def _tensors(tree):
    if isinstance(tree, list | tuple):
        return [leaf for child in tree for leaf in _tensors(child)]
    return [tree] if hasattr(tree, "nbytes") else []


def counted(wrapper, horizon):
    """(collectives, bytes over those of the parameters) of a step, a look-ahead, and in between."""
    rank = dist.get_rank()
    model, optimizer = make(wrapper)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    target = data(rank, 3, TARGET, seed=1, noise=0)
    selector = Selector(
        model,
        optimizer,
        losses,
        target,
        keep=KEEP,
        horizon=horizon,
        interval=2,
        derivative="central",
    )
    pools, found = data(rank, 12, POOL), []
    for step in range(6):
        with Sent() as select:
            batch = selector.select(pools[step], pools[step + 1 :])
        with Sent() as train:
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
        found.append([(each.num, each.num_bytes / size) for each in (train, select)])
    (step, ahead), (_, between) = found[-2:]
    return step, ahead, between


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    print("| processes | wrapper | H | training step | select, look-ahead | select, in between |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num in args.processes:
        processes = Processes(num)
        for wrapper in ("ddp", "fsdp2"):
            for horizon in (0, 1, 3):
                cells = processes.run(counted, wrapper, horizon)[0]
                text = " | ".join(f"{count}, {size:.2f}" for count, size in cells)
                print(f"| {num} | {wrapper} | {horizon} | {text} |", flush=True)
        processes.stop()


if __name__ == "__main__":
    main()
