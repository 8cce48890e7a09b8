"""What an audit trains: a model and its data, the same in every precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from selectflow.audit.config import AuditConfig, Model
from selectflow.audit.images import cnn, digits, image_loss, mlp
from selectflow.audit.text import gpt2, llama, source_blocks, with_adapters
from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.passes import LossFn
from selectflow.models.language import causal_lm_losses
from selectflow.offline.record import record
from selectflow.offline.trajectory import Trajectory
from selectflow.options import ConfigError


class Problem(NamedTuple):
    """What a kind of model learns.

    Attributes:
        build: section of the configuration -> model with fresh weights.
        examples: section -> all examples there are, a mapping of tensors.
        loss_fn: per-example losses.
        adapt: section, model -> what of it is recorded, made after the steps before the recording.
    """

    build: Callable[[Any], nn.Module]
    examples: Callable[[Any], Batch]
    loss_fn: LossFn
    adapt: Callable[[Any, nn.Module], nn.Module] = lambda _, model: model


PROBLEMS = {
    "mlp": Problem(mlp, lambda _: digits(), image_loss),
    "cnn": Problem(cnn, lambda _: digits(), image_loss),
    "gpt2": Problem(gpt2, source_blocks, causal_lm_losses),
    "llama": Problem(llama, source_blocks, causal_lm_losses, with_adapters),
}


@dataclass(frozen=True)
class Setting:
    """A model at its start, the batches of one run, and the queries.

    Examples are shuffled by the seed: first come the queries, then the recorded batches, then
    those of the steps before the recording.

    Attributes:
        config: of the audit.
        seed: of the weights and of the order of the data.
        dtype: of parameters and images; the values are those of float32 in every precision. None:
            that of the configuration.
    """

    config: AuditConfig
    seed: int
    dtype: torch.dtype | None = None

    def record(self, lr: float, spacing: int = 1) -> Trajectory:
        """A run at one learning rate, with a snapshot every `spacing` updates.

        Raises:
            ConfigError: there are too few examples, or pretrained weights cannot be loaded.
            ValueError: the memory limit is below two states.
        """
        config = self.config
        model = self.model().to(self._dtype)
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr, config.betas, config.eps, config.weight_decay)
        scheduler: LRScheduler | None = None
        if config.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, config.steps)
        trajectory = record(
            model,
            optimizer,
            PROBLEMS[config.model.kind].loss_fn,
            [self.batch(step) for step in range(config.steps)],
            scheduler,
            spacing=spacing,
            limit_gib=config.memory_gib,
        )
        optimizer.state.clear()  # a scheduler and its optimizer hold each other: two large moments
        return trajectory

    def model(self) -> nn.Module:
        """The model in float32 where the recording begins."""
        config = self.config
        model = _fresh(config.model, self.seed)
        if config.warm_steps:
            model.load_state_dict(_warmed(config, self.seed))
        torch.manual_seed(self.seed)
        return PROBLEMS[config.model.kind].adapt(config.model, model)

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        start = self.config.num_queries + step * self.config.batch
        return self._take(slice(start, start + self.config.batch))

    def queries(self) -> Batch:
        """The examples whose losses are measured; never trained on."""
        return self._take(slice(0, self.config.num_queries))

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = self.dtype or getattr(torch, self.config.precision)
        return found

    def _take(self, part: slice) -> Batch:
        batch = take(_examples(self.config.model), self._order()[part])
        return {
            name: values.to(self._dtype) if values.is_floating_point() else values
            for name, values in batch.items()
        }

    def _order(self) -> Tensor:
        config, known = self.config, num_examples(_examples(self.config.model))
        used = config.num_queries + (config.steps + config.warm_steps) * config.batch
        if used > known:
            raise ConfigError(
                f"num_queries + (steps + warm_steps) * batch must be <= {known}, the examples "
                f"there are, got {used}; lower one of them"
            )
        return torch.randperm(known, generator=torch.Generator().manual_seed(self.seed))


@lru_cache(maxsize=1)
def _examples(config: Model) -> Batch:
    return PROBLEMS[config.kind].examples(config)


def _fresh(config: Model, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return PROBLEMS[config.kind].build(config)


@lru_cache(maxsize=1)
def _warmed(config: AuditConfig, seed: int) -> dict[str, Tensor]:
    """State dict after the steps before the recording, in float32."""
    setting, model = Setting(config, seed, torch.float32), _fresh(config.model, seed)
    loss_fn = PROBLEMS[config.model.kind].loss_fn
    optimizer = torch.optim.AdamW(
        model.parameters(), config.warm_lr, config.betas, config.eps, config.weight_decay
    )
    model.train()
    for step in range(config.steps, config.steps + config.warm_steps):
        loss = loss_fn(model, setting.batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()
