"""Small image classifiers, their losses by example, and how they are evaluated.

A batch is a mapping with `image`, shape (N, C, H, W), and `label`, shape (N,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "gelu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def mlp(
    num_inputs: int, num_classes: int, hidden: Sequence[int], activation: Activation = "relu"
) -> nn.Sequential:
    """Fully connected layers of `hidden` units with the activation between them.

    Args:
        num_inputs: values of one image, C * H * W.
        num_classes: outputs.
        hidden: units of each hidden layer.
        activation: after each hidden layer.
    """
    sizes = [num_inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))


def cnn(channels: int, num_classes: int, width: int) -> nn.Sequential:
    """Three convolutions with batch norm, each but the first at half the resolution.

    Args:
        channels: of an image.
        num_classes: outputs.
        width: channels of the first convolution; each further one has twice as many.
    """
    from einops.layers.torch import Reduce  # noqa: PLC0415

    layers: list[nn.Module] = []
    for stage in range(3):
        wider, stride = width * 2**stage, 1 if stage == 0 else 2
        # batch norm subtracts the mean: a bias before it would have no effect
        convolution = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(wider), nn.ReLU()]
        channels = wider
    head = nn.Linear(channels, num_classes)
    return nn.Sequential(*layers, Reduce("n c h w -> n c", "mean"), head)


def plain_cnn(
    shape: Sequence[int], num_classes: int, width: int, activation: Activation = "gelu"
) -> nn.Sequential:
    """Two convolutions, the second of stride 2 and twice the width, and a linear layer.

    Without batch norm, under which an example's loss depends on the others of its batch.

    Args:
        shape: (C, H, W) of an image, with even H and W.
        num_classes: outputs.
        width: channels of the first convolution.
        activation: after each convolution.
    """
    channels, height, breadth = shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        _ACTIVATIONS[activation](),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        _ACTIVATIONS[activation](),
        nn.Flatten(),
        nn.Linear(2 * width * (height // 2) * (breadth // 2), num_classes),
    )


def resnet18(shape: Sequence[int], num_classes: int) -> nn.Module:
    """ResNet-18 of torchvision, its first layers replaced for images of up to 64 pixels.

    Args:
        shape: (C, H, W) of an image.
        num_classes: outputs.
    """
    import torchvision  # noqa: PLC0415

    model: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    small = shape[-1] <= 64
    kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
    model.conv1 = nn.Conv2d(shape[0], 64, kernel, stride, padding, bias=False)
    if small:
        model.maxpool = nn.Identity()
    return model


def image_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each image, shape (N,), in nats."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def evaluate(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean loss and accuracy over all examples of `batches`, as `loss` and `accuracy`."""
    loss, right, total = 0.0, 0, 0
    for batch in batches:
        logits = model(batch["image"])
        loss += F.cross_entropy(logits, batch["label"], reduction="sum").item()
        right += int((logits.argmax(1) == batch["label"]).sum())
        total += len(logits)
    return {"loss": loss / total, "accuracy": right / total}
