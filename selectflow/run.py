"""A configuration becomes a run directory: the training loop.

`runs/<name>/` holds `config.yaml` (resolved), `metrics.jsonl`, `selection.jsonl`,
`checkpoints/step-*.pt` and `summary.json`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from selectflow.batches import Batch, describe, num_examples, to_device
from selectflow.checkpoints import (
    Checkpoints,
    PoolSource,
    StopRequest,
    generator_states,
    restore_generators,
    stop_request,
)
from selectflow.config import OptimizerConfig, RunConfig, ScheduleConfig
from selectflow.objective import LossFn
from selectflow.run_dir import RunError, is_finished, lock, open_run_dir
from selectflow.run_log import RunLog, Stopwatch
from selectflow.selector import Selector
from selectflow.tracking import Progress, Tracker

__all__ = ["RunError", "Task", "train"]


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

    With `resume: auto` a run that was killed goes on from its newest checkpoint, and gives the
    same samples, scores, losses and weights as one that was not. SIGTERM and Ctrl-C let the
    running step end, save, and stop.

    Args:
        config: the run.
        task: the model and its data; moved to the configured device.

    Returns:
        The run directory.

    Raises:
        RunError: the run directory holds another run, or another process is at work in it.
        FloatingPointError: a loss, gradient or score is not finite; the weights are those
            before that step, in the newest checkpoint.
    """
    run_dir = config.run_dir
    with lock(run_dir), stop_request() as stop:
        saved = open_run_dir(config)
        if saved is None and is_finished(run_dir):
            return run_dir
        run = _Run(config, task, saved)
        status = "failed"
        try:
            status = run.loop(stop)
        except FloatingPointError:
            with contextlib.suppress(OSError):  # which must not hide why the run ends
                run.save()
            raise
        finally:
            run.log.close()
            run.tracker.finish({"status": status, "steps": run.step})
    return run_dir


class _Run:
    """The parts of a run and its loop; all that changes is in `state_dict`."""

    def __init__(self, config: RunConfig, task: Task, saved: dict[str, Any] | None) -> None:
        self.config, self.task, self.step = config, task, 0
        self.device = resolve_device(config.device)
        self.model = task.model.to(self.device)
        self.target = [to_device(batch, self.device) for batch in task.target]
        self.test = [to_device(batch, self.device) for batch in task.test]
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_schedule(self.optimizer, config.schedule, config.steps)
        self.selector = Selector(
            self.model,
            self.optimizer,
            task.loss_fn,
            self.target,
            lr_scheduler=self.scheduler,
            max_grad_norm=config.optimizer.max_grad_norm,
            seed=config.seed,
            **config.select.model_dump(),
        )
        self.pools = PoolSource(task.pools, self.device, config.select.horizon)
        self.watch = Stopwatch()
        self.checkpoints = Checkpoints(config.run_dir / "checkpoints", config.keep_checkpoints)
        self.tracker = _tracker(config, saved)
        self.log = RunLog(config.run_dir, self.tracker, task.altered)
        if saved is not None:
            self.load_state_dict(saved)

    def loop(self, stop: StopRequest) -> str:
        """Train to the end of the run, or until a stop is requested; how it ended."""
        config = self.config
        if self.step == 0:
            self.log.flush(0, 0.0, 0.0, self.evaluate())
        remaining = config.steps - self.step
        with Progress(config.steps, every=config.eval_every, description=config.run_name) as bar:
            self.watch.start()
            for batch in islice(self.selector.stream(self.pools), remaining):
                args = self.model, self.task.loss_fn, batch, self.optimizer
                loss = update(*args, config.optimizer.max_grad_norm, self.step)
                lr = self.optimizer.param_groups[0]["lr"]
                self.scheduler.step()
                self.step += 1

                wall_s = self.watch.stop()  # evaluation, logging and saving are not counted
                assert self.selector.last is not None
                self.log.step(self.step, batch, loss, self.selector.last)
                is_last = self.step == config.steps or wall_s >= (config.max_wall_s or math.inf)
                if self.step % config.eval_every == 0 or is_last:
                    self.log.flush(self.step, lr, wall_s, self.evaluate())
                if self.step % config.checkpoint_every == 0 or is_last or stop.name:
                    self.save()
                bar.update(self.step, self.log.summary())
                if is_last:
                    return "finished"
                if stop.name:
                    return f"stopped by {stop.name}"
                self.watch.start()
        return "finished"  # the pools have come to their end

    def evaluate(self) -> dict[str, float]:
        """Means over the target and the test set, by metric name, and the data's errors."""
        found: dict[str, float] = {}
        with evaluating(self.model):
            for split, batches in (("target", self.target), ("test", self.test)):
                means = self.task.evaluate(self.model, batches)
                found |= {f"{split}/{name}": value for name, value in means.items()}
        return found | {"data/errors": self.pools.num_errors}

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if not self.checkpoints.has(self.step):
            self.checkpoints.save(self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "selector": self.selector.state_dict(with_peeked=False),
            "pools": self.pools.state_dict(self.selector.num_peeked),
            "log": self.log.state_dict(),
            "tracker": self.tracker.state_dict(),
            "wall_s": self.watch.seconds,
            "generators": generator_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.watch.seconds = state["step"], state["wall_s"]
        for name in ("model", "optimizer", "scheduler", "selector", "pools", "log"):
            getattr(self, name).load_state_dict(state[name])
        restore_generators(state["generators"])


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
        # the last of the steps has the share `final`
        done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        left = 1 - min(done, 1.0)
        shape = left if config.name == "linear" else (1 - math.cos(math.pi * left)) / 2
        return config.final + (1 - config.final) * shape

    return LambdaLR(optimizer, factor)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back to the mode of before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


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


def _tracker(config: RunConfig, saved: dict[str, Any] | None) -> Tracker:
    tracker = Tracker(
        config.run_dir,
        config.model_dump(mode="json"),
        name=config.run_name,
        mode=config.track.wandb,
        project=config.track.project,
        group=config.track.group,
        job_type=config.track.job_type or config.select.strategy,
        tags=config.track.tags,
        run_id=saved["tracker"]["run_id"] if saved else None,
    )
    if saved:
        tracker.load_state_dict(saved["tracker"])
    return tracker
