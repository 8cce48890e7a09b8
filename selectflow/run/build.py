"""What a configuration names, built: device, optimizer, schedule, losses, and what selects.

Also `update`, the optimizer step that the losses are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from selectflow.control.horizon import HorizonSchedule
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rules import AutoRate
from selectflow.core.batches import Batch, chunks, describe, num_examples, weights_of
from selectflow.core.passes import LossFn
from selectflow.core.weighted import weighted_mean
from selectflow.core.wrappers import unwrap
from selectflow.distributed import ALONE, Group, whole
from selectflow.run.config import RunConfig
from selectflow.run.replay import Replay
from selectflow.run.sections import OptimizerConfig, ScheduleConfig, SelectConfig, TrainConfig
from selectflow.run.spread import local_rank, unsynced
from selectflow.run.task import RunError, Task
from selectflow.selector import Selector
from selectflow.strategies import Scorer


def resolve_device(name: str) -> torch.device:
    """The configured device; "auto" is an accelerator where there is one.

    Of several processes of a machine each has the accelerator of its own number.

    Raises:
        RunError: the device is not there, or is that of another process.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator or torch.device("cpu")
    else:
        device = torch.device(name)
    if (own := local_rank()) is not None and device.type != "cpu":
        if ":" in name:
            raise RunError(
                f"device must have no number in several processes, got {name!r}; with "
                f"{device.type!r} each takes its own"
            )
        device = torch.device(device.type, own)
        num = torch.accelerator.device_count()
        if own >= num:
            raise RunError(
                f"processes of a machine must be at most as many as its devices, {num}, got one of "
                f"number {own}; start fewer by --nproc-per-node"
            )
    if name == "auto":
        return device
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
    group: Group = ALONE,
) -> Selector | Replay:
    """What chooses the examples of each step: a selector, or the replay of a recorded run.

    Args:
        task: its model is on the run's device.
        target: the target set on the run's device.
        stream: what the pools depend on, as `PoolStream.identity`; {} where it is not known.
    """
    if config.select.replay:
        pools, rank = config.select.pools_per_update, group.rank
        return Replay(config.select.replay, config.steps, stream, pools, rank, group.size)
    return Selector(
        task.model,
        optimizer,
        task.loss_fn,
        target,
        lr_scheduler=scheduler,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        num_steps=config.steps,
        horizon=build_horizon(config.select, config.steps),
        lr=build_rate(config.select),
        score_view=build_view(config.select, task),
        autocast=torch.bfloat16 if config.train.autocast else None,
        scorer=build_scorer(config, task),
        **config.select.selector_options(),
    )


def build_scorer(config: RunConfig, task: Task) -> Scorer | None:
    """The configured scorer, with an optimizer of its own on the run's schedule; None: none."""
    if config.scorer is None:
        return None
    if task.scorer is None:
        raise RunError("scorer must be null for a task that has none, got a configuration of it")
    autocast = torch.bfloat16 if config.train.autocast else None
    given = config.scorer.optimizer
    if given is None:
        return Scorer(task.scorer, view=task.scorer_view, autocast=autocast)
    optimizer = build_optimizer(task.scorer, given)
    return Scorer(
        task.scorer,
        optimizer,
        view=task.scorer_view,
        lr_scheduler=build_schedule(optimizer, config.schedule, config.steps),
        max_grad_norm=given.max_grad_norm,
        autocast=autocast,
    )


def check_peeked(selector: Selector | Replay, pools: object) -> None:
    """Refuse look-aheads that draw more pools than live shares of sources allow.

    Raises:
        RunError: says how many these are.
    """
    most = getattr(pools, "max_peeked", None)
    needed = selector.max_peeked - 1 if isinstance(selector, Selector) else 0
    if most is not None and needed > most:
        raise RunError(
            f"data.live_shares.delay must leave room for the {needed} pools that a look-ahead "
            f"peeks at, got room for {most} beside what workers read ahead; raise it by "
            f"{needed - most}, or lower the horizon or data.num_workers"
        )


def build_horizon(config: SelectConfig, steps: int) -> int | HorizonSchedule | AutoHorizon:
    """The configured horizon of a selector; 0 after offline selection, which looks no further."""
    if config.is_offline:
        return 0
    if config.horizon == "auto":
        return AutoHorizon(
            largest=config.largest_horizon,
            off=config.allow_plain,
            first=config.first_horizon,
            share=config.control_share,
            costs=config.costs,
        )
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


# --- the training step ----------------------------------------------------------------------------


def build_losses(
    model: nn.Module, loss_fn: LossFn, config: TrainConfig, device: torch.device
) -> Callable[[Batch], Tensor]:
    """Losses of the examples of a batch as the training step takes them; scoring takes `loss_fn`.

    Args:
        model: on `device`; with `checkpointing`, switched to it in place; in evaluation
            mode, in which scores are taken, its layers run as without.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        config: autocast, checkpointing and compilation.
        device: of the model.

    Returns:
        A function of a batch: losses of shape (N,), in float32 under autocast.

    Raises:
        RunError: the model cannot recompute its activations; or, when the losses are first taken,
            there is no compiler.
    """
    if config.checkpointing:
        _checkpoint(unwrap(model))
    trained = cast(nn.Module, torch.compile(model)) if config.compile else model

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if config.autocast else nullcontext()

    def losses(batch: Batch) -> Tensor:
        with precision():
            found = loss_fn(trained, batch)
        return found.float() if found.dtype == torch.bfloat16 else found

    return _explained(losses) if config.compile else losses


def _checkpoint(model: nn.Module) -> None:
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # new and old
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise RunError(
            f"train.checkpointing must be false for a model without {names[0]}, which those of "
            f"transformers have, got true for {type(model).__name__}; split the batch by "
            "train.accumulate instead"
        )
    enable({"use_reentrant": False})


def _explained(losses: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed  # noqa: PLC0415 - takes a second

    def compiled(batch: Batch) -> Tensor:
        try:
            return losses(batch)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"train.compile must be false where torch.compile cannot build code, got true "
                f"({reason}); install a C++ compiler (on a GPU: triton), or set train.compile=false"
            ) from error

    return compiled


def update(
    model: nn.Module,
    losses: Callable[[Batch], Tensor],
    batch: Batch,
    optimizer: Optimizer,
    step: int,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
    group: Group = ALONE,
) -> float:
    """One optimizer step on the mean loss of a batch, by its weights if any, which it returns.

    In several processes it is the mean over them of the mean loss of each one's batch.

    Args:
        model: whose gradients are clipped and checked.
        losses: of the examples of a batch, shape (N,).
        batch: the examples of the step.
        optimizer: of the model's parameters.
        step: number of the step, for errors.
        max_grad_norm: clips the whole gradient to this norm; None: no clipping.
        accumulate: micro-batches that the batch is passed in, as equal as they can be. Each is
            weighted by its examples: the gradient is that of the whole.
        group: the processes over which the model averages its gradients.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was changed. It is
            raised in all processes.
    """
    size = num_examples(batch)
    pieces = list(chunks(batch, -(-size // accumulate)))
    sizes, weights = list(map(num_examples, pieces)), weights_of(batch)
    each = [None] * len(pieces) if weights is None else torch.split(weights, sizes)
    parts = [(part, num / size, own) for part, num, own in zip(pieces, sizes, each, strict=True)]
    if accumulate > 1:  # as many passes in each process: those of a sharded model wait for another
        most = int(group.numbers([len(parts)]).max())
        parts += [(parts[-1][0], 0.0, parts[-1][2])] * (most - len(parts))
    optimizer.zero_grad()
    total = torch.zeros(())
    for place, (part, share, own) in enumerate(parts, start=1):
        with unsynced(model) if place < len(parts) else nullcontext():
            loss = weighted_mean(losses(part), own) * share
            loss.backward()  # type: ignore[no-untyped-call]
        total = total.to(loss) + loss.detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(grads))
    found = group.numbers([total.item()])
    if not (found.isfinite().all() and norm.isfinite()):
        _raise_not_finite(found.flatten().tolist(), norm, step, pieces, group.rank)
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    return float(found.mean())


def _raise_not_finite(
    totals: Sequence[float],
    norm: Tensor,
    step: int,
    parts: Sequence[Batch],
    rank: int,
) -> None:
    named = ", ".join(describe(part, torch.arange(num_examples(part))) for part in parts)
    where = f"at optimizer step {step} on {named}"
    odd = [other for other, total in enumerate(totals) if not math.isfinite(total)]
    if odd and rank not in odd:
        rank, where = odd[0], f"at optimizer step {step} in the process of rank {odd[0]}"
    raise FloatingPointError(
        f"loss and gradient must be finite, got {totals[rank]} and norm {norm.item()} {where}; "
        "lower optimizer.lr or set optimizer.max_grad_norm"
    )
