"""What an audit of images trains: an MLP or a CNN on scikit-learn's digits."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selectflow.audit.config import CNNModel, MLPModel
from selectflow.core.batches import Batch

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def digits() -> Batch:
    """All 1797 digits: images in [0, 1], shape (N, 1, 8, 8), float32, and labels, shape (N,)."""
    # imported here because it takes a second, which only an audit need spend
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    return {"image": images, "label": torch.tensor(bunch.target)}


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each image, shape (N,)."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def mlp(config: MLPModel) -> nn.Module:
    """Linear layers from 64 pixels to 10 classes."""
    widths = [64, *config.hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[config.activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


def cnn(config: CNNModel) -> nn.Module:
    """Two convolutions, the second of stride 2 and twice the width, and a linear layer."""
    width, activation = config.width, ACTIVATIONS[config.activation]
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        activation(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        activation(),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )
