"""What a configuration names, built: device, optimizer, schedule, and what selects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from selectflow.control.horizon import HorizonSchedule
from selectflow.control.rules import AutoHorizon, AutoRate
from selectflow.core.batches import Batch
from selectflow.run.config import RunConfig
from selectflow.run.replay import Replay
from selectflow.run.sections import OptimizerConfig, ScheduleConfig, SelectConfig
from selectflow.run.task import RunError, Task
from selectflow.selector import Selector


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
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for it
        reason = (str(error).splitlines() or ["it is not there"])[0]
        raise RunError(f"device must be usable, got {name!r} ({reason}); use auto") from error
    return device


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


def build_selector(
    config: RunConfig,
    task: Task,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    target: Sequence[Batch],
    stream: Mapping[str, Any],
) -> Selector | Replay:
    """What chooses the examples of each step: a selector, or the replay of a recorded run.

    Args:
        config: of the run.
        task: its model is on the run's device.
        optimizer: of the model.
        scheduler: of the optimizer.
        target: the target set on the run's device.
        stream: what the pools depend on, as `PoolStream.identity`; {} where it is not known.
    """
    if config.select.replay:
        pools = config.select.pools_per_update
        return Replay(config.select.replay, config.steps, stream, pools)
    return Selector(
        task.model,
        optimizer,
        task.loss_fn,
        target,
        lr_scheduler=scheduler,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        horizon=build_horizon(config.select, config.steps),
        lr=build_rate(config.select),
        score_view=build_view(config.select, task),
        autocast=torch.bfloat16 if config.train.autocast else None,
        **config.select.selector_options(),
    )


def build_horizon(config: SelectConfig, steps: int) -> int | HorizonSchedule | AutoHorizon:
    """The configured horizon of a selector; 0 after offline selection, which looks no further."""
    if config.is_offline:
        return 0
    if config.horizon == "auto":
        return AutoHorizon(largest=config.largest_horizon)
    first, schedule = int(config.horizon), config.horizon_schedule
    if schedule.name == "constant" or steps == 1:
        return first
    if schedule.name == "linear":
        return HorizonSchedule([(0, first), (steps - 1, schedule.final)], "linear")
    return HorizonSchedule([(0, first), *schedule.milestones], "step")


def build_rate(config: SelectConfig) -> Literal["schedule"] | AutoRate:
    """Whether the controller multiplies the scheduled learning rate, and within which bounds."""
    if config.lr == "schedule":
        return config.lr
    return AutoRate(lowest=config.lr_lowest, highest=config.lr_highest)


def build_view(config: SelectConfig, task: Task) -> Callable[[Batch], Batch] | None:
    """The configured view of batches, which is scored instead of the batches; None: no view.

    Raises:
        RunError: the task's examples have none.
    """
    if config.score_view is None:
        return None
    if task.score_view is None:
        raise RunError(
            "select.score_view must be null for a task whose examples are no sequences of tokens, "
            f"got {config.score_view}"
        )
    return task.score_view(config.score_view)
