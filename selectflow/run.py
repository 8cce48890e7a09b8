"""A configuration becomes a run directory: the training loop.

`runs/<name>/` holds `config.yaml` (resolved), `metrics.jsonl`, `selection.jsonl`,
`checkpoints/last.pt` and `summary.json`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from selectflow.batches import Batch, describe, num_examples, to_device
from selectflow.config import OptimizerConfig, RunConfig, ScheduleConfig, to_yaml
from selectflow.derivatives import LossFn
from selectflow.run_log import RunLog, Stopwatch
from selectflow.selector import Selector
from selectflow.tracking import Progress, Tracker


class RunError(ValueError):
    """A run that cannot start: the message says why, and what to do."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        model: the module, initialised.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        evaluate: `evaluate(model, batches)` -> means by name, such as loss and accuracy.
        pools: the stream of candidate pools: mappings with a list "key" of sample ids.
        target: batches that define the goal; never trained on.
        test: batches that only evaluation sees.
        altered: ids of training samples with an altered label. For reports: selection never
            sees them.
    """

    model: nn.Module
    loss_fn: LossFn
    evaluate: Callable[[nn.Module, Sequence[Batch]], dict[str, float]]
    pools: Iterable[Batch]
    target: Sequence[Batch]
    test: Sequence[Batch]
    altered: frozenset[str] = frozenset()


def train(config: RunConfig, task: Task) -> Path:
    """Train a task with data selection, and leave a run directory.

    Args:
        config: the run.
        task: the model and its data; moved to the configured device.

    Returns:
        The run directory.

    Raises:
        RunError: the run directory holds a run already.
        FloatingPointError: a loss, gradient or score is not finite; the weights are those
            before that step, in `checkpoints/last.pt`.
    """
    run_dir = open_run_dir(config)
    device = resolve_device(config.device)
    model = task.model.to(device)
    optimizer = build_optimizer(model, config.optimizer)
    scheduler = build_schedule(optimizer, config.schedule, config.steps)
    target = [to_device(batch, device) for batch in task.target]
    test = [to_device(batch, device) for batch in task.test]
    selector = Selector(
        model,
        optimizer,
        task.loss_fn,
        target,
        lr_scheduler=scheduler,
        max_grad_norm=config.optimizer.max_grad_norm,
        seed=config.seed,
        **config.select.model_dump(),
    )
    tracker = _tracker(config, run_dir)
    watch = Stopwatch()

    def evaluate() -> dict[str, float]:
        splits = {"target": target, "test": test}
        with evaluating(model):
            found = {split: task.evaluate(model, batches) for split, batches in splits.items()}
        return {f"{split}/{name}": v for split, means in found.items() for name, v in means.items()}

    status, step = "failed", 0
    try:
        with (
            RunLog(run_dir, tracker, task.altered) as log,
            Progress(config.steps, every=config.eval_every, description=config.run_name) as bar,
        ):
            log.flush(0, 0.0, 0.0, evaluate())
            pools = (to_device(pool, device) for pool in task.pools)
            watch.start()
            for batch in islice(selector.stream(pools), config.steps):
                loss = update(model, task.loss_fn, batch, optimizer, config.optimizer, step)
                lr = optimizer.param_groups[0]["lr"]
                scheduler.step()
                step += 1

                wall_s = watch.stop()  # evaluation and logging are not counted
                assert selector.last is not None
                log.step(step, batch, loss, selector.last)
                is_last = step == config.steps or wall_s >= (config.max_wall_s or math.inf)
                if step % config.eval_every == 0 or is_last:
                    log.flush(step, lr, wall_s, evaluate())
                bar.update(step, log.summary())
                if is_last:
                    break
                watch.start()
        status = "finished"
    finally:
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        # A failure to save must not hide the failure that ends the run.
        with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
            save(run_dir / "checkpoints" / "last.pt", step=step, selector=selector, **parts)
        tracker.finish({"status": status, "steps": step})
    return run_dir


def update(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    optimizer: Optimizer,
    config: OptimizerConfig,
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
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.max_grad_norm, norm)
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
        # the last of the steps has the share `final`
        done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        left = 1 - min(done, 1.0)
        shape = left if config.name == "linear" else (1 - math.cos(math.pi * left)) / 2
        return config.final + (1 - config.final) * shape

    return LambdaLR(optimizer, factor)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Any:
    """Evaluation mode without gradients, and back to the mode of before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def save(path: Path, **parts: Any) -> None:
    """Write the state of each part, or the part itself where it has none, as one whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        name: part.state_dict() if hasattr(part, "state_dict") else part
        for name, part in parts.items()
    }
    beside = path.with_suffix(".tmp")
    torch.save(states, beside)
    os.replace(beside, path)


def open_run_dir(config: RunConfig) -> Path:
    """A new run directory with the resolved configuration in it.

    Raises:
        RunError: it holds a run already, and `overwrite` is false.
    """
    run_dir = config.run_dir
    if (run_dir / "metrics.jsonl").exists() or (run_dir / "config.yaml").exists():
        if not config.overwrite:
            raise RunError(
                f"run directory must be new, got {run_dir}, which holds another run; choose "
                "another name, or replace it with overwrite=true"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return run_dir


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


def _tracker(config: RunConfig, run_dir: Path) -> Tracker:
    return Tracker(
        run_dir,
        config.model_dump(mode="json"),
        name=config.run_name,
        mode=config.track.wandb,
        project=config.track.project,
        group=config.track.group,
        job_type=config.track.job_type or config.select.strategy,
        tags=config.track.tags,
    )
