"""Train an image classifier with data selection.

    python trainers/vision.py configs/digits_online.yaml [key=value ...]

The configuration says everything; `selectflow schema` lists what it can say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from selectflow.data import PoolStream, make_digits, read_batches, read_labels, read_metadata
from selectflow.options import ConfigError
from selectflow.run.config import RunConfig
from selectflow.run.config_training import ModelConfig
from selectflow.run.main import check_choice, trainer_main
from selectflow.run.task import Task

Batch = dict[str, Any]
EVAL_BATCH = 512


def mlp(config: ModelConfig, shape: torch.Size, num_classes: int) -> nn.Module:
    """Fully connected layers of `config.hidden` units with ReLU between them."""
    sizes = [shape.numel(), *config.hidden]
    layers: list[nn.Module] = [Rearrange("n c h w -> n (c h w)")]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def cnn(config: ModelConfig, shape: torch.Size, num_classes: int) -> nn.Module:
    """Three convolutions with batch norm, each but the first at half the resolution."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for stage in range(3):
        width = config.width * 2**stage
        stride = 1 if stage == 0 else 2
        # batch norm subtracts the mean: a bias before it would have no effect
        convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    head = nn.Linear(channels, num_classes)
    return nn.Sequential(*layers, Reduce("n c h w -> n c", "mean"), head)


def resnet18(config: ModelConfig, shape: torch.Size, num_classes: int) -> nn.Module:
    """ResNet-18 of torchvision, its first layers replaced for images of up to 64 pixels."""
    del config
    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    small = shape[-1] <= 64
    kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
    model.conv1 = nn.Conv2d(shape[0], 64, kernel, stride, padding, bias=False)
    if small:
        model.maxpool = nn.Identity()
    return model


MODELS = {"mlp": mlp, "cnn": cnn, "resnet18": resnet18}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example, shape (N,)."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def evaluate(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean loss and accuracy over all examples of `batches`."""
    loss, right, total = 0.0, 0, 0
    for batch in batches:
        logits = model(batch["image"])
        loss += F.cross_entropy(logits, batch["label"], reduction="sum").item()
        right += int((logits.argmax(1) == batch["label"]).sum())
        total += len(logits)
    return {"loss": loss / total, "accuracy": right / total}


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


def build_task(config: RunConfig) -> Task:
    """The model, its data and how it is judged; the same for the same configuration."""
    data = config.data
    check_choice("model.name", config.model.name, tuple(MODELS))
    check_choice("data.name", data.name, ("digits", "shards"))
    if data.name == "digits":
        make_digits(data.directory, label_noise=data.label_noise, seed=data.seed)
    reading = {"pool": data.pool, "seed": config.seed} | data.reading
    pools = PoolStream(data.directory, "train", **reading)
    target = read_batches(data.directory, "target", data.target_batch)
    test = read_batches(data.directory, "test", EVAL_BATCH)
    metadata = {}
    if config.track.kinds:
        metadata = read_metadata(data.directory, "train", max_errors=data.max_errors)
    num_classes = count_classes(config, [*target, *test])
    torch.manual_seed(config.seed)
    model = MODELS[config.model.name](config.model, target[0]["image"][0].shape, num_classes)
    return Task(
        model=model,
        loss_fn=loss_fn,
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
