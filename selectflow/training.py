"""One optimizer step; the optimizer, schedule and device that a configuration names."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from selectflow.batches import Batch, describe, num_examples
from selectflow.config_sections import OptimizerConfig, ScheduleConfig, SelectConfig
from selectflow.horizons import HorizonSchedule
from selectflow.objective import LossFn
from selectflow.run_dir import RunError


def update(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    optimizer: Optimizer,
    max_grad_norm: float | None,
    step: int,
) -> float:
    """One optimizer step on a batch; its mean loss.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was changed.
    """
    loss = loss_fn(model, batch).mean()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if not (loss.isfinite() and norm.isfinite()):
        everyone = torch.arange(num_examples(batch))
        raise FloatingPointError(
            f"loss and gradient must be finite, got {loss.item()} and norm {norm.item()} at "
            f"optimizer step {step} on {describe(batch, everyone)}; lower optimizer.lr or set "
            "optimizer.max_grad_norm"
        )
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    return loss.item()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The configured optimizer over the parameters that require a gradient."""
    params = [param for param in model.parameters() if param.requires_grad]
    decay = config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(params, config.lr, config.momentum, weight_decay=decay)
    return torch.optim.AdamW(params, config.lr, config.betas, config.eps, decay)


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """The configured schedule, stepped after every optimizer step."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / (config.warmup_steps + 1)
        if config.name == "constant":
            return 1.0
        if config.name == "step":
            return config.factor ** sum(step >= milestone for milestone in config.milestones)
        # the last of the steps has the share `final`
        done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        left = 1 - min(done, 1.0)
        shape = left if config.name == "linear" else (1 - math.cos(math.pi * left)) / 2
        return config.final + (1 - config.final) * shape

    return LambdaLR(optimizer, factor)


def build_horizon(config: SelectConfig, steps: int) -> int | HorizonSchedule:
    """The configured horizon of a selector; 0 after offline selection, which looks no further."""
    if config.is_offline:
        return 0
    first, schedule = int(config.horizon), config.horizon_schedule
    if schedule.name == "constant" or steps == 1:
        return first
    if schedule.name == "linear":
        return HorizonSchedule([(0, first), (steps - 1, schedule.final)], "linear")
    return HorizonSchedule([(0, first), *schedule.milestones], "step")


def resolve_device(name: str) -> torch.device:
    """The configured device; "auto" is an accelerator where there is one.

    Raises:
        RunError: the device is not there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    device = torch.device(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["it is not there"])[0]
        raise RunError(f"device must be usable, got {name!r} ({reason}); use auto") from error
    return device
