"""What an audit trains: a small model on scikit-learn's digits, the same in every precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from selectflow.audit_config import AuditConfig
from selectflow.batches import Batch
from selectflow.recording import record
from selectflow.trajectory import Trajectory

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class Setting:
    """A model at its start, the batches of one run, and the queries.

    Attributes:
        config: of the audit.
        seed: of the weights and of the order of the data.
        dtype: of parameters and images; the values are those of float32 in every precision.
    """

    config: AuditConfig
    seed: int
    dtype: torch.dtype = torch.float64

    def record(self, lr: float, spacing: int = 1) -> Trajectory:
        """A run at one learning rate, with a snapshot every `spacing` updates."""
        config = self.config
        torch.manual_seed(self.seed)
        model = _build(config).to(self.dtype)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr, config.betas, config.eps, config.weight_decay
        )
        scheduler: LRScheduler | None = None
        if config.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, config.steps)
        batches = [self.batch(step) for step in range(config.steps)]
        return record(model, optimizer, loss_fn, batches, scheduler, spacing=spacing)

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        start = self.config.num_queries + step * self.config.batch
        return self._take(slice(start, start + self.config.batch))

    def queries(self) -> Batch:
        """The examples whose losses are measured; never trained on."""
        return self._take(slice(0, self.config.num_queries))

    def _take(self, part: slice) -> Batch:
        images, labels = digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        index = order[part]
        return {"image": images[index].to(self.dtype), "label": labels[index]}


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits: images in [0, 1], shape (N, 1, 8, 8), float32, and labels, shape (N,)."""
    # imported here because it takes a second, which only an audit need spend
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    return torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None], torch.tensor(bunch.target)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example, shape (N,)."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def _build(config: AuditConfig) -> nn.Module:
    activation = _ACTIVATIONS[config.activation]
    if config.model == "cnn":
        width = config.width
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            activation(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            activation(),
            nn.Flatten(),
            nn.Linear(32 * width, 10),
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in zip([64, *config.hidden], config.hidden, strict=False):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers, nn.Linear(([64, *config.hidden])[-1], 10))
