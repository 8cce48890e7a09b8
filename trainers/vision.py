"""Train an image classifier with data selection.

    python trainers/vision.py configs/digits_online.yaml [key=value ...]
    torchrun --nproc-per-node 2 trainers/vision.py configs/digits_online.yaml [parallel=fsdp2 ...]

The configuration says everything; `selectflow schema` lists what it can say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from selectflow.data import PoolStream, make_digits, read_batches, read_labels, read_metadata
from selectflow.distributed import here
from selectflow.models.vision import cnn, evaluate, image_losses, mlp, resnet18
from selectflow.options import ConfigError
from selectflow.run.config import RunConfig, check_choice
from selectflow.run.loop import trainer_main
from selectflow.run.sections import DataConfig, ModelConfig
from selectflow.run.task import Task

Batch = dict[str, Any]
MODELS = ("mlp", "cnn", "resnet18")
EVAL_BATCH = 512


def build_model(config: ModelConfig, shape: torch.Size, num_classes: int) -> nn.Module:
    """The configured model of images of the shape (C, H, W)."""
    if config.name == "mlp":
        return mlp(shape.numel(), num_classes, config.hidden)
    if config.name == "cnn":
        return cnn(shape[0], num_classes, config.width)
    return resnet18(shape, num_classes)


def count_classes(config: RunConfig, held_out: Sequence[Batch]) -> int:
    """The classes that are configured, or else those of all splits.

    Raises:
        ConfigError: the held-out batches have further ones.
    """
    data, given = config.data, config.model.num_classes
    there = 1 + max(int(batch["label"].max()) for batch in held_out)
    if given is None:  # the target may be of some of the classes alone
        labels = read_labels(data.directory, "train", max_errors=data.max_errors)
        return max(there, 1 + int(labels.max()))
    if given < there:
        raise ConfigError(
            f"model.num_classes must be at least {there}, as target and test labels go up to "
            f"{there - 1}, got {given}; null counts them"
        )
    return given


def make_data(data: DataConfig) -> None:
    """Write the shards, where they are ours to write and are not there yet."""
    if data.name == "digits":
        make_digits(data.directory, label_noise=data.label_noise, seed=data.seed)


def build_task(config: RunConfig) -> Task:
    """The model, its data and how it is judged; the same for the same configuration."""
    data = config.data
    check_choice("model.name", config.model.name, MODELS)
    check_choice("data.name", data.name, ("digits", "shards"))
    processes = here()
    processes.on_first(lambda: make_data(data))
    share = {"rank": processes.rank, "world_size": processes.size}
    reading = {"pool": data.pool, "seed": config.seed} | data.reading | share
    pools = PoolStream(data.directory, "train", **reading)
    target = read_batches(data.directory, "target", data.target_batch)
    test = read_batches(data.directory, "test", EVAL_BATCH)
    metadata = {}
    if config.track.kinds:
        metadata = read_metadata(data.directory, "train", max_errors=data.max_errors)
    num_classes = count_classes(config, [*target, *test])
    torch.manual_seed(config.seed)
    model = build_model(config.model, target[0]["image"][0].shape, num_classes)
    return Task(
        model=model,
        loss_fn=image_losses,
        evaluate=evaluate,
        pools=pools,
        target=target,
        test=test,
        kinds={"altered": frozenset(key for key, made in metadata.items() if made.get("altered"))},
        source=data.directory,
        show=lambda batch, index: f"label {int(batch['label'][index])}",
    )


def main(arguments: Sequence[str]) -> int:
    """Run a configuration; the exit status."""
    return trainer_main(arguments, build_task, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
