"""A configuration becomes a run directory: the training loop, and its command line.

`runs/<name>/` holds `config.yaml` (resolved), `metrics.jsonl`, `selection/` (the ledger),
`decisions.jsonl` (the controller's), `checkpoints/step-*.pt` and `summary.json`; where the task can
save it, `model/`, at the end; after offline selection also the score file, `selected/` (shards) and
`offline.json` (what selecting took).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from selectflow.core.batches import Batch, as_one, chunks, to_device, weighted
from selectflow.core.files import print_anything
from selectflow.core.wrappers import unwrap
from selectflow.distributed import Group, here, is_from_elsewhere, reshard, share_buffers
from selectflow.run import metrics, tensorboard
from selectflow.run.build import (
    build_losses,
    build_optimizer,
    build_schedule,
    build_selector,
    check_peeked,
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
    read_checkpoint,
    restore_generators,
)
from selectflow.run.ledger import Ledger
from selectflow.run.log import DecisionLog, RunLog, Stopwatch, Tracker
from selectflow.run.offline import check_selected, select_offline
from selectflow.run.parallel import (
    agreed,
    check_parallel,
    check_same,
    evaluate,
    evaluation_share,
    mean_over,
    parallel_of,
    target_share,
)
from selectflow.run.patience import Patience
from selectflow.run.samples import SampleDisplay
from selectflow.run.shared_checkpoints import Saved, load_together, own_state, save_together
from selectflow.run.spread import joined, spread, whole_weights
from selectflow.run.target import divided
from selectflow.run.task import PoolSource, RunError, Task
from selectflow.run.terminal import StopRequest, progress_bar, show_progress, stop_request
from selectflow.strategies import Selection

__all__ = ["RunError", "Task", "resolve_device", "train"]


def train(config: RunConfig, task: Task) -> Path:
    """Train a task with data selection; returns the run directory, with all that it left.

    With `resume: auto` a run that was killed goes on from its newest checkpoint, and gives the
    same samples, scores, losses and weights as one that was not. SIGTERM and Ctrl-C let the
    running step end, save, and stop.

    With `select.horizon: .inf` a copy of the model is first trained on everything, and only the
    samples that helped most are trained on; the clock starts with the seconds that this took.
    With `select.replay` the run trains on the examples that another run kept, without scoring.

    All processes that torch.distributed joins here train one run: call it in each, with pools of
    its own. They need one file system; the first of them writes logs. A run may go on in another
    number of processes, at the same position in the data.

    Args:
        config: the run.
        task: the model and its data; moved to the configured device.

    Raises:
        RunError: the run directory holds another run, or another process is at work in it.
        ReplayError: the run to be replayed had other pools, or did not come as far.
        FloatingPointError: a loss, gradient or score is not finite; the weights are those
            before that step, in the newest checkpoint.
    """
    group, upfront_s = here(), 0.0
    check_same("configuration", config.model_dump(mode="json"), group)
    with contextlib.ExitStack() as held:
        saved, is_over = _open(config, group, held)
        if is_over:
            return config.run_dir
        with group.together(ValueError, OSError):
            if config.track.tensorboard:
                tensorboard.check_installed()
            if config.select.is_offline:  # a signal ends it at once: there is nothing to save yet
                task, upfront_s = select_offline(config, task, group)
        check_parallel(config, task, group)
        _train(_Run(config, task, saved, upfront_s, group))
    return config.run_dir


def _open(config: RunConfig, group: Group, held: contextlib.ExitStack) -> tuple[Saved | None, bool]:
    """Take the run directory; the checkpoint to go on from, and whether the run is over.

    The first process does, and holds it. What it finds, also an error, holds for all of them.
    """
    saved: Saved | None = None

    def first() -> tuple[Path | None, bool]:
        nonlocal saved
        held.enter_context(lock(config.run_dir))
        check_selected(config, group)
        saved = Saved(*found) if (found := open_run_dir(config)) else None
        return (saved.path if saved else None), saved is None and is_finished(config.run_dir)

    path, is_over = group.on_first(first)
    if path is not None and saved is None:
        saved = Saved(path, read_checkpoint(path))
    return saved, is_over


def _train(run: _Run) -> None:
    """Run the loop; close the log and the tracker however it ends, save also after a bad loss."""
    with stop_request() as stop:
        try:
            status = run.loop(stop)
            run.checkpoints.wait()
            run.finish(status)
        except BaseException as error:
            with contextlib.suppress(OSError, RuntimeError):  # it would hide why the run ends
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
        self, config: RunConfig, task: Task, saved: Saved | None, upfront_s: float, group: Group
    ) -> None:
        self.config, self.step, self.upfront_s = config, 0, upfront_s
        self.patience = Patience(config.patience) if config.patience else None
        self.group, self.parallel = group, parallel_of(config, group)
        self.device = resolve_device(config.device)
        task, self.mixed = divided(config, task, group, self.device)
        model = task.model
        self.model = spread(model, self.parallel, self.device) if self.parallel else model
        self.model.to(self.device)
        scorer = task.scorer
        if scorer is not None:
            scorer = scorer.to(self.device)
            if self.parallel:  # small: each process has all of it
                scorer = spread(scorer, "ddp", self.device)
        self.task = task = replace(task, model=self.model, scorer=scorer)
        self.target, self.test = (
            [(to_device(batch, self.device), num) for batch, num in evaluation_share(whole, group)]
            for whole in (task.target, task.test)
        )
        target = target_share(self.target, task.target, group)
        if self.mixed:  # what is mixed in also selects: the held-out part only judges
            whole = list(chunks(self.mixed.examples, config.data.target_batch))
            target = target_share(evaluation_share(whole, group), whole, group)
        self.losses = build_losses(self.model, task.loss_fn, config.train, self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.scheduler = build_schedule(self.optimizer, config.schedule, config.steps)
        self.pools = PoolSource(task.pools, self.device, group, config.data.max_errors)
        self.selector = build_selector(
            config, task, self.optimizer, self.scheduler, target, self.pools.identity, group
        )
        check_peeked(self.selector, task.pools)
        self.watch = Stopwatch(upfront_s)
        self.checkpoints = Checkpoints(config.run_dir / "checkpoints", config.keep_checkpoints)
        self.saved_at: int | None = None  # step of the newest checkpoint
        own = own_state(saved, group, self.parallel) if saved else None
        self.ledger = Ledger(config.run_dir, self.pools.identity, group.rank, group.size)
        self.tracker: Tracker | None = None
        decisions, self.samples = None, None
        if group.rank == 0:  # the others do not log
            self.tracker = _tracker(config, own["tracker"]["run_id"] if own else None)
            decisions = DecisionLog(config.run_dir)
            self.samples = SampleDisplay(config, task, self.tracker)
        self.log = RunLog(self.ledger, decisions, self.tracker, task.kinds, upfront_s, group)
        if group.rank > 0:  # dropout differs between the processes, initial weights do not
            torch.manual_seed(config.seed + group.rank)
        if saved is not None and own is not None:
            self.load_state_dict(saved, own)

    def loop(self, stop: StopRequest) -> str:
        """Train to the end of the run, or until a stop is requested; returns how it ended."""
        config, group = self.config, self.group
        if self.step == 0:
            self.log.flush(0, 0.0, self.upfront_s, self.evaluate(), self.pools.shares)
        elif self.is_over():  # it was killed after its last step
            return "finished"
        with progress_bar(config.run_name, config.steps, is_shown=group.rank == 0) as bar:
            self.watch.start()
            for parts in self.kept(config.steps - self.step):
                mixed = self.mixed.at(self.step) if self.mixed else None
                lr, loss = self.train_on(parts, mixed)
                self.step += 1
                wall_s = self.watch.stop()  # evaluation, logging and saving are not counted
                stopped_by, wall_s = agreed(group, stop.name, wall_s)
                self.log.step(self.step, parts, loss, mixed)
                if self.samples:
                    self.samples.add(self.step, [selection for _, selection in parts])
                is_last = self.step == config.steps or wall_s >= (config.max_wall_s or math.inf)
                is_evaluated = self.step % config.eval_every == 0 or is_last
                if is_evaluated:
                    self.log.flush(self.step, lr, wall_s, self.evaluate(), self.pools.shares)
                    is_last = is_last or self.is_over()
                    if self.samples:
                        self.samples.show_recent(self.step)
                if self.step % config.checkpoint_every == 0 or is_last or stopped_by:
                    self.save()
                if group.rank == 0:
                    show_progress(bar, self.step, self.log.summary(), with_line=is_evaluated)
                if is_last or stopped_by:
                    return "finished" if is_last else f"stopped by {stopped_by}"
                self.watch.start()
        return "finished"  # the pools have come to their end

    def is_over(self) -> bool:
        """Whether the target loss has not fallen for so long that the run ends early."""
        return self.patience is not None and self.patience.is_over

    def train_on(
        self, parts: Sequence[tuple[Batch, Selection]], mixed: Batch | None
    ) -> tuple[float, float]:
        """One optimizer step on what was kept and mixed in; its learning rate and its loss."""
        config, batches = self.config, [weighted(batch, chosen.weights) for batch, chosen in parts]
        batch = as_one(batches if mixed is None else [*batches, mixed])
        loss = update(
            self.model, self.losses, batch, self.optimizer, self.step,
            config.optimizer.max_grad_norm, config.train.accumulate, self.group,
        )  # fmt: skip
        share_buffers(self.model, self.group)
        lr = self.optimizer.param_groups[0]["lr"] * parts[-1][1].lr_multiplier
        self.scheduler.step()
        return lr, loss

    def kept(self, steps: int) -> Iterator[list[tuple[Batch, Selection]]]:
        """The batches of each of so many steps: of each pool the kept part, and its selection."""
        num = self.config.select.pools_per_update
        parts: list[tuple[Batch, Selection]] = []
        for batch in islice(self.batches(), steps * num):
            assert self.selector.last is not None
            parts.append((batch, self.selector.last))
            if len(parts) == num:
                yield parts
                parts = []

    def batches(self) -> Iterator[Batch]:
        """The kept part of each pool; all of its parts while control finds that not to select pays.

        After a resumption those of the last pool come first that were left.
        """
        yield from self.selector.rest()
        for pool in self.pools:
            batch = self.selector.select(pool, self.pools.upcoming())
            assert self.selector.last is not None
            self.pools.follow(self.selector.last)
            yield batch
            yield from self.selector.rest()

    def evaluate(self) -> dict[str, float]:
        """Means over the target and the test set, by metric name; what the pools cost and lack."""
        found: dict[str, float] = {}
        training, model = self.model.training, unwrap(self.model)
        self.model.eval()
        try:
            with torch.no_grad():
                for split, parts in (("target", self.target), ("test", self.test)):
                    means = evaluate(self.task.evaluate, model, parts, self.group)
                    if any(map(math.isnan, means.values())):
                        means = dict.fromkeys(means, math.nan)  # an argmax of NaN is class 0
                    found |= {metrics.evaluated(split, name): x for name, x in means.items()}
        finally:
            self.model.train(training)
            reshard(self.model)
        if self.patience:
            self.patience.add(self.step, found[metrics.TARGET_LOSS], self.model)
        seconds = mean_over(self.group, self.pools.seconds)
        errors = sum(self.pools.errors.values())
        return found | {metrics.DATA_ERRORS: errors, metrics.DATA_S: seconds}

    def save(self) -> None:
        """Write a checkpoint of the present step, unless it was written or read already."""
        if self.step == self.saved_at:
            return
        own = self.state_dict()
        if self.parallel is None:
            states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.checkpoints.save(self.step, own | states)
        elif self.step:  # before there is nothing to go on from, nor a state of the optimizer
            path = self.checkpoints.folder(self.step)
            save_together(path, own, self.model, self.optimizer, self.group)
            self.group.on_first(lambda: self.checkpoints.drop_others(path))
        self.saved_at = self.step

    def finish(self, status: str, facts: Mapping[str, int] | None = None) -> None:
        """Write the rest of the log, how the run ended, and other facts of its end."""
        self.ledger.flush()
        if status == "finished":
            if self.patience:
                self.patience.put_back(self.model)
            weights = whole_weights(self.model) if self.task.save else {}
            self.group.wait()  # the ledger is whole
            if self.samples:
                if self.task.save:
                    self.task.save(self.config.run_dir / "model", weights)
                self.samples.show_all()
        upfront = {metrics.UPFRONT_S: self.upfront_s} if self.config.select.is_offline else {}
        lowest = {metrics.LOWEST_AT: self.patience.step} if self.patience else {}
        errors = {"errors_by_shard": errors} if (errors := self.pools.errors) else {}
        if self.tracker:
            ended = {"status": status, "steps": self.step} | dict(facts or {})
            self.tracker.finish(ended | upfront | lowest | errors)

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the run depends on in this process, but for model and optimizer."""
        several = {"parallel": self.parallel, "processes": self.group.size}
        return {
            "step": self.step,
            "scheduler": self.scheduler.state_dict(),
            "selector": self.selector.state_dict(with_peeked=False),  # `pools` draws them again
            "pools": self.pools.state_dict(),
            "log": self.log.state_dict(),
            "samples": self.samples.state_dict() if self.samples else {},
            "tracker": self.tracker.state_dict() if self.tracker else {},
            "wall_s": self.watch.seconds,
            "data_s": self.pools.seconds,
            "generators": generator_states(),
            **({"patience": self.patience.state_dict()} if self.patience else {}),
            **(several if self.parallel else {}),
        }

    def load_state_dict(self, saved: Saved, own: dict[str, Any]) -> None:
        """Go on from a checkpoint, and from what this process has of it."""
        if self.parallel is None and saved.is_of_one:
            self.model.load_state_dict(saved.state["model"])
            self.optimizer.load_state_dict(saved.state["optimizer"])
        else:
            load_together(saved, self.model, self.optimizer)
        self.step, self.watch.seconds = own["step"], own["wall_s"]
        self.saved_at, self.pools.seconds = self.step, own.get("data_s", 0.0)
        self.scheduler.load_state_dict(own["scheduler"])
        self.pools.load_state_dict(own["pools"])
        if self.patience:
            self.patience.load_state_dict(own["patience"])
        if own["selector"] is not None:
            self.selector.load_state_dict(own["selector"])
        self.log.load_state_dict(own["log"], self.step)
        if self.tracker and self.samples:
            self.tracker.load_state_dict(own["tracker"])
            self.samples.load_state_dict(own.get("samples", {}))
        if own["generators"] is not None:
            restore_generators(own["generators"])


def _tracker(config: RunConfig, run_id: str | None) -> Tracker:
    track, select = config.track, config.select
    strategy = "replay" if select.replay else select.strategy
    return Tracker(
        config.run_dir, config.model_dump(mode="json"), name=config.run_name, mode=track.wandb,
        job_type=track.job_type or os.environ.get("WANDB_JOB_TYPE") or strategy, run_id=run_id,
        with_tensorboard=track.tensorboard,
        **track.model_dump(include={"project", "group", "tags"}),
    )  # fmt: skip


# --- the command line of the programs in trainers/ ------------------------------------------------


def trainer_main(
    arguments: Sequence[str], build_task: Callable[[RunConfig], Task], usage: str | None
) -> int:
    """Run a configuration.

    Args:
        arguments: of the command line: the YAML file and `key=value` overrides.
        build_task: makes the model and its data; the same for the same configuration.
        usage: printed for --help, or without arguments.

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
        with joined(resolve_device(config.device), config.timeout_s) as group:
            if group.rank > 0:
                logging.getLogger("selectflow").setLevel(logging.WARNING)
            with group.together(ValueError, OSError):
                task = build_task(config)
            run_dir = train(config, task)
            is_first = group.rank == 0
    except (ValueError, FloatingPointError, OSError) as error:
        if not is_from_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    if is_first:
        print(f"wrote {run_dir}")
    return 0
