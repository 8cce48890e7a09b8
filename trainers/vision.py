"""Train an image classifier with data selection.

    python trainers/vision.py configs/digits_online.yaml [key=value ...]
    torchrun --nproc-per-node 2 trainers/vision.py configs/digits_online.yaml [parallel=fsdp2 ...]

The configuration says everything; `selectflow schema` lists what it can say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from selectflow.data import (
    DataError,
    PoolStream,
    check_fields,
    make_digits,
    read_batches,
    read_labels,
    read_metadata,
)
from selectflow.distributed import here
from selectflow.fields import ConfigError
from selectflow.models.vision import cnn, evaluate, image_losses, mlp, resnet18
from selectflow.run.config import RunConfig, check_choice
from selectflow.run.loop import trainer_main
from selectflow.run.sections import DataConfig, ModelConfig, ScorerConfig
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


def build_scorer(
    config: ScorerConfig, shape: torch.Size, num_classes: int
) -> tuple[nn.Module, Callable[[Batch], Batch] | None]:
    """The configured scorer of images of the shape (C, H, W), and what it sees of a batch."""
    check_choice("scorer.model.name", config.model.name, MODELS)
    if config.model.num_classes not in (None, num_classes):
        raise ConfigError(
            f"scorer.model.num_classes must be those of the model, {num_classes}, got "
            f"{config.model.num_classes}; leave it out"
        )
    factor = config.downscale
    if factor == 1:
        return build_model(config.model, shape, num_classes), None
    if shape[1] % factor or shape[2] % factor:
        raise ConfigError(
            f"scorer.downscale must divide the images' height and width, {tuple(shape[1:])}, got "
            f"{factor}; give a factor of both, or 1"
        )

    def view(batch: Batch) -> Batch:
        return batch | {"image": nn.functional.avg_pool2d(batch["image"], factor)}

    small = torch.Size((shape[0], shape[1] // factor, shape[2] // factor))
    return build_model(config.model, small, num_classes), view


def check_shapes(model: str, shape: Sequence[int], others: dict[str, Any]) -> None:
    """Refuse images that the model cannot take, or not in every split.

    Args:
        model: its name.
        shape: of an image of the target.
        others: shape of an image, by the name of the split.

    Raises:
        DataError: names the split.
    """
    if len(shape) != 3:
        raise DataError(
            "images of split 'target' must be of shape (channels, height, width), got "
            f"{tuple(shape)}; store them so, in field 'npy'"
        )
    same = 3 if model == "mlp" else 1  # the others take any size, and the first axis is channels
    for split, other in others.items():
        if other is None or len(other) != 3 or tuple(other[:same]) != tuple(shape[:same]):
            raise DataError(
                f"images of split {split!r} must be of shape {tuple(shape)} as those of 'target', "
                f"got {None if other is None else tuple(other)}; write all splits alike"
            )


def check_classes(given: int | None, held_out: Sequence[Batch]) -> None:
    """Refuse fewer classes than those of the held-out batches.

    Raises:
        ConfigError: names a label and its key.
    """
    for batch in held_out:
        label = int(batch["label"].max())
        if given is not None and label >= given:
            key = batch["key"][int(batch["label"].argmax())]
            raise ConfigError(
                f"model.num_classes must be at least {label + 1}, as target and test labels go up "
                f"to {label}, of key {key!r}, got {given}; null counts them"
            )


def count_classes(config: RunConfig, held_out: Sequence[Batch]) -> int:
    """The classes that are configured, or else those of all splits."""
    data, given = config.data, config.model.num_classes
    if given is not None:
        return given
    there = 1 + max(int(batch["label"].max()) for batch in held_out)
    # the target may be of some of the classes alone
    labels = read_labels(data.trained_on, "train", max_errors=data.max_errors)
    return max(there, 1 + int(labels.max()))


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
    for root, split in (
        (data.trained_on, "train"),
        (data.directory, "target"),
        (data.directory, "test"),
    ):
        check_fields(root, split, ("image", "label"))
    target = read_batches(data.directory, "target", data.target_batch)
    test = read_batches(data.directory, "test", EVAL_BATCH)
    check_classes(config.model.num_classes, [*target, *test])
    share = {"rank": processes.rank, "world_size": processes.size}
    reading = {"pool": data.pool, "seed": config.seed} | data.reading | data.mixing | share
    pools = PoolStream(data.trained_on, num_classes=config.model.num_classes, **reading)
    shape = target[0]["image"].shape[1:]
    splits = {"train": pools.shape, "test": test[0]["image"].shape[1:]}
    check_shapes(config.model.name, shape, splits)
    metadata = {}
    if config.track.kinds:
        metadata = read_metadata(data.trained_on, "train", max_errors=data.max_errors)
    num_classes = count_classes(config, [*target, *test])
    torch.manual_seed(config.seed)
    model = build_model(config.model, shape, num_classes)
    scorer, scorer_view = None, None
    if config.scorer is not None:
        scorer, scorer_view = build_scorer(config.scorer, shape, num_classes)
    return Task(
        model=model,
        loss_fn=image_losses,
        evaluate=evaluate,
        pools=pools,
        target=target,
        test=test,
        kinds={"altered": frozenset(key for key, made in metadata.items() if made.get("altered"))},
        source=data.trained_on,
        show=lambda batch, index: f"label {int(batch['label'][index])}",
        scorer=scorer,
        scorer_view=scorer_view,
    )


def main(arguments: Sequence[str]) -> int:
    """Run a configuration; the exit status."""
    return trainer_main(arguments, build_task, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
