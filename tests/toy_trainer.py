"""A trainer for the tests of sweeps: a linear classifier on digits, quick to start and to run."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from selectflow.data import PoolStream, read_batches
from selectflow.run.config import load
from selectflow.run.loop import Task, train


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def evaluate(model, batches):
    return {"loss": sum(float(loss_fn(model, batch).mean()) for batch in batches) / len(batches)}


def main(arguments):
    config = load(arguments[0], arguments[1:])
    root = config.data.directory
    torch.manual_seed(config.seed)
    task = Task(
        model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        loss_fn=loss_fn,
        evaluate=evaluate,
        pools=PoolStream(root, pool=config.data.pool, seed=config.seed),
        target=read_batches(root, "target", 100),
        test=read_batches(root, "test", 400),
    )
    try:
        train(config, task)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
