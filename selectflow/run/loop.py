"""A configuration becomes a run directory: the training loop, and its command line.

`runs/<name>/` holds `config.yaml` (resolved), `metrics.jsonl`, `selection/` (the ledger),
`decisions.jsonl` (the controller's), `checkpoints/step-*.pt` and `summary.json`; where the task can
save it, `model/`, at the end; after offline selection also the score file, `selected/` (shards) and
`offline.json` (what selecting took).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selectflow.core.batches import Batch, MicroBatches, to_device
from selectflow.run import metrics
from selectflow.run.build import (
    build_losses,
    build_optimizer,
    build_schedule,
    build_selector,
    resolve_device,
    update,
)
from selectflow.run.config import RunConfig, load
from selectflow.run.directory import (
    Checkpoints,
    generator_states,
    is_finished,
    lock,
    open_run_dir,
    restore_generators,
)
from selectflow.run.ledger import Ledger
from selectflow.run.log import DecisionLog, RunLog, Stopwatch, Tracker
from selectflow.run.offline import select_offline
from selectflow.run.samples import SampleDisplay
from selectflow.run.task import PoolSource, RunError, Task
from selectflow.strategies import Selection

__all__ = ["RunError", "Task", "resolve_device", "train"]


def train(config: RunConfig, task: Task) -> Path:
    """Train a task with data selection, and leave a run directory.

    With `resume: auto` a run that was killed goes on from its newest checkpoint, and gives the
    same samples, scores, losses and weights as one that was not. SIGTERM and Ctrl-C let the
    running step end, save, and stop.

    With `select.horizon: .inf` a copy of the model is first trained on everything, and only the
    samples that helped most are trained on; the clock starts with the seconds that this took.
    With `select.replay` the run trains on the examples that another run kept, without scoring.

    Args:
        config: the run.
        task: the model and its data; moved to the configured device.

    Returns:
        The run directory.

    Raises:
        RunError: the run directory holds another run, or another process is at work in it.
        ReplayError: the run to be replayed had other pools, or did not come as far.
        FloatingPointError: a loss, gradient or score is not finite; the weights are those
            before that step, in the newest checkpoint.
    """
    run_dir = config.run_dir
    with lock(run_dir):
        saved, upfront_s = open_run_dir(config), 0.0
        if saved is None and is_finished(run_dir):
            return run_dir
        if config.select.is_offline:  # a signal ends it at once: there is nothing to save yet
            task, upfront_s = select_offline(config, task)
        _train(_Run(config, task, saved, upfront_s))
    return run_dir


def _train(run: _Run) -> None:
    """Run the loop; close the log and the tracker however it ends, save also after a bad loss."""
    with stop_request() as stop:
        try:
            status = run.loop(stop)
            run.checkpoints.wait()
            run.finish(status)
        except BaseException as error:
            with contextlib.suppress(OSError):  # it would hide why the run ends
                diverged = {}
                if isinstance(error, FloatingPointError):
                    run.save()
                    diverged = {metrics.DIVERGED_AT: run.step + 1}
                run.finish("failed", diverged)
            raise
        finally:
            # the run directory stays locked until all is written; an error was raised above
            with contextlib.suppress(OSError):
                run.checkpoints.wait()


class _Run:
    """The parts of a run and its loop; all that changes is in `state_dict`."""

    def __init__(
        self, config: RunConfig, task: Task, saved: dict[str, Any] | None, upfront_s: float
    ) -> None:
        self.config, self.task, self.step, self.upfront_s = config, task, 0, upfront_s
        self.device = resolve_device(config.device)
        self.model = task.model.to(self.device)
        self.target = [to_device(batch, self.device) for batch in task.target]
        self.test = [to_device(batch, self.device) for batch in task.test]
        self.losses = build_losses(self.model, task.loss_fn, config.train, self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_schedule(self.optimizer, config.schedule, config.steps)
        self.pools = PoolSource(task.pools, self.device)
        self.selector = build_selector(
            config, task, self.optimizer, self.scheduler, self.target, self.pools.identity
        )
        self.watch = Stopwatch(upfront_s)
        self.checkpoints = Checkpoints(config.run_dir / "checkpoints", config.keep_checkpoints)
        self.tracker = _tracker(config, saved["tracker"]["run_id"] if saved else None)
        self.ledger = Ledger(config.run_dir, self.pools.identity)
        decisions = DecisionLog(config.run_dir)
        self.log = RunLog(self.ledger, decisions, self.tracker, task.kinds, upfront_s)
        self.samples = SampleDisplay(config, task, self.tracker)
        self.saved_at: int | None = None  # step of the newest checkpoint
        if saved is not None:
            self.load_state_dict(saved)

    def loop(self, stop: StopRequest) -> str:
        """Train to the end of the run, or until a stop is requested; returns how it ended."""
        config = self.config
        if self.step == 0:
            self.log.flush(0, 0.0, self.upfront_s, self.evaluate())
        with progress_bar(config.run_name, config.steps) as bar:
            self.watch.start()
            for parts in self.kept(config.steps - self.step):
                batches = [batch for batch, _ in parts]
                batch = batches[0] if len(batches) == 1 else MicroBatches(batches)
                clip, accumulate = config.optimizer.max_grad_norm, config.train.accumulate
                loss = update(
                    self.model, self.losses, batch, self.optimizer, self.step, clip, accumulate
                )
                lr = self.optimizer.param_groups[0]["lr"] * parts[-1][1].lr_multiplier
                self.scheduler.step()
                self.step += 1

                wall_s = self.watch.stop()  # evaluation, logging and saving are not counted
                self.log.step(self.step, parts, loss)
                self.samples.add(self.step, [selection for _, selection in parts])
                is_last = self.step == config.steps or wall_s >= (config.max_wall_s or math.inf)
                is_evaluated = self.step % config.eval_every == 0 or is_last
                if is_evaluated:
                    self.log.flush(self.step, lr, wall_s, self.evaluate())
                    self.samples.show_recent(self.step)
                if self.step % config.checkpoint_every == 0 or is_last or stop.name:
                    self.save()
                show_progress(bar, self.step, self.log.summary(), with_line=is_evaluated)
                if is_last or stop.name:
                    return "finished" if is_last else f"stopped by {stop.name}"
                self.watch.start()
        return "finished"  # the pools have come to their end

    def kept(self, steps: int) -> Iterator[list[tuple[Batch, Selection]]]:
        """The batches of each of so many steps: of each pool the kept part, and its selection."""
        num = self.config.select.pools_per_update
        parts: list[tuple[Batch, Selection]] = []
        for pool in islice(self.pools, steps * num):
            batch = self.selector.select(pool, self.pools.upcoming())
            assert self.selector.last is not None
            parts.append((batch, self.selector.last))
            if len(parts) == num:
                yield parts
                parts = []

    def evaluate(self) -> dict[str, float]:
        """Means over the target and the test set, by metric name; what the pools cost and lack."""
        found: dict[str, float] = {}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for split, batches in (("target", self.target), ("test", self.test)):
                    means = self.task.evaluate(self.model, batches)
                    if any(map(math.isnan, means.values())):
                        means = dict.fromkeys(means, math.nan)  # an argmax of NaN is class 0
                    found |= {metrics.evaluated(split, name): x for name, x in means.items()}
        finally:
            self.model.train(training)
        errors = sum(self.pools.errors.values())
        return found | {metrics.DATA_ERRORS: errors, metrics.DATA_S: self.pools.seconds}

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it was written or read already."""
        if self.step != self.saved_at:
            self.checkpoints.save(self.step, self.state_dict())
            self.saved_at = self.step

    def finish(self, status: str, facts: Mapping[str, int] | None = None) -> None:
        """Write the rest of the log, how the run ended, and other facts of its end."""
        self.ledger.flush()
        if status == "finished":
            if self.task.save:
                self.task.save(self.config.run_dir / "model")
            self.samples.show_all()
        upfront = {metrics.UPFRONT_S: self.upfront_s} if self.config.select.is_offline else {}
        errors = {"errors_by_shard": errors} if (errors := self.pools.errors) else {}
        ended = {"status": status, "steps": self.step} | dict(facts or {})
        self.tracker.finish(ended | upfront | errors)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "selector": self.selector.state_dict(with_peeked=False),  # `pools` draws them again
            "pools": self.pools.state_dict(),
            "log": self.log.state_dict(),
            "samples": self.samples.state_dict(),
            "tracker": self.tracker.state_dict(),
            "wall_s": self.watch.seconds,
            "data_s": self.pools.seconds,
            "generators": generator_states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.watch.seconds = state["step"], state["wall_s"]
        self.saved_at, self.pools.seconds = self.step, state.get("data_s", 0.0)
        for name in ("model", "optimizer", "scheduler", "selector", "pools", "tracker"):
            getattr(self, name).load_state_dict(state[name])
        self.log.load_state_dict(state["log"], self.step)
        self.samples.load_state_dict(state.get("samples", {}))
        restore_generators(state["generators"])


def progress_bar(name: str, steps: int) -> Progress:
    """A bar on stdout at a terminal, and elsewhere nothing."""
    console = Console(file=sys.stdout)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task(name, total=steps, text="")
    return bar


def show_progress(bar: Progress, step: int, text: str, *, with_line: bool) -> None:
    """Move the bar to a step; where none is drawn, print a line if there is to be one."""
    (task,) = bar.tasks
    bar.update(task.id, completed=step, text=text)
    if bar.disable and with_line:
        print(f"{task.description} {step}/{task.total} {text}".rstrip(), flush=True)


@dataclass
class StopRequest:
    """The signal by which the process was asked to stop, if it was."""

    name: str | None = None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Let the running step end on SIGTERM or the first Ctrl-C; a second signal ends at once."""
    request, signals = StopRequest(), (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        request.name = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tracker(config: RunConfig, run_id: str | None) -> Tracker:
    track, select = config.track, config.select
    strategy = "replay" if select.replay else select.strategy
    return Tracker(
        config.run_dir,
        config.model_dump(mode="json"),
        name=config.run_name,
        mode=track.wandb,
        project=track.project,
        group=track.group,
        job_type=track.job_type or os.environ.get("WANDB_JOB_TYPE") or strategy,
        tags=track.tags,
        run_id=run_id,
    )


# --- the command line of the programs in trainers/ ------------------------------------------------


def trainer_main(
    arguments: Sequence[str], build_task: Callable[[RunConfig], Task], usage: str | None
) -> int:
    """Run a configuration.

    Args:
        arguments: of the command line: the YAML file and `key=value` overrides.
        build_task: makes the model and its data; the same for the same configuration.
        usage: printed when asked for, or where there are no arguments.

    Returns:
        0, or 2 with a message where the input is at fault.
    """
    print_anything()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("selectflow").setLevel(logging.INFO)
    try:
        config = load(arguments[0], arguments[1:])
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        run_dir = train(config, build_task(config))
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {run_dir}")
    return 0


def print_anything() -> None:
    """From here on, print a character that stdout cannot encode as its escape in Python source.

    A run must not end because a terminal, a pipe or a log cannot show a character of its data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
