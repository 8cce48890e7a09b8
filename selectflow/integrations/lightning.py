"""Selection inside Lightning's Trainer: every batch of a loader is a pool, its best part is kept.

    selection = SelectCallback(loss_fn, target=clean, keep=16)
    trainer = Trainer(callbacks=[selection], max_epochs=3)
    trainer.fit(module, selection.pools(loader))  # was: trainer.fit(module, loader)

Lightning draws one batch ahead where it does not know how many there are, and restarts loaders at
each epoch. So the callback holds the pools: Lightning draws a placeholder, and the
batch is selected when the placeholder is unpacked, after the last optimizer step.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from selectflow.core.batches import Batch, PeekedPools, to_device
from selectflow.core.passes import LossFn
from selectflow.core.plain import plain, restored
from selectflow.integrations.scorers import placed
from selectflow.options import refuse_weights
from selectflow.run import metrics
from selectflow.selector import Selector
from selectflow.strategies.scorer import Scorer

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)

_log = logging.getLogger(__name__)


class SelectCallback(Callback):
    """Makes a Lightning `Trainer` train on the most helpful part of each batch of a loader.

    Accumulation, clipping by norm and the precision are read from the Trainer; a schedule that
    moves at every optimizer step is followed by the look-ahead, one of epochs is constant within
    its epochs. Under manual optimization the steps are the module's: give `pools_per_update` and
    `max_grad_norm` as options where it accumulates and clips, and where it schedules
    `lr_scheduler=lambda module: module.lr_schedulers()`.
    What was selected is logged by the module at each step, as means over the processes. All of it
    is in Lightning's checkpoints.

    The module's hooks that alter batches, such as `on_after_batch_transfer`, get what was kept:
    examples are scored as the loader gives them, in the type that the precision asks for.

    Args:
        loss_fn: `loss_fn(module, batch)` -> per-example losses, shape (N,), of which the training
            loss is the mean.
        target: batches of clean examples that define the goal; held on the device. Of several
            processes each gives its share, or all of them the whole.
        keep: examples kept of each pool: a count, or a fraction in (0, 1].
        options: further arguments of `Selector`; they override what is read from the Trainer.
            `lr_scheduler` may be a function of the module that returns it. A `Scorer` is moved to
            the Trainer's device, in its own type, and joined by DDP where there are several
            processes; its passes are under the Trainer's autocast to bfloat16, if any.

    Attributes:
        selector: the `Selector` of the present or last training; None before.

    Raises:
        ValueError: `weighting` among the options. When training begins: another strategy than one
            device, DDP or ModelParallelStrategy (FSDP2); several optimizers; clipping that is not
            by norm; a schedule that moves every few steps; batches that are not those of `pools`.
        TypeError: an optimizer or schedule that is not modelled.
    """

    def __init__(
        self, loss_fn: LossFn, target: Iterable[Batch], keep: int | float, **options: Any
    ) -> None:
        refuse_weights(options, "Lightning")
        self.selector: Selector | None = None
        self._loss_fn, self._target, self._keep, self._options = loss_fn, target, keep, options
        self._pools: _Pools | None = None
        self._trainer: Trainer | None = None
        self._saved: Mapping[str, Any] | None = None  # of a checkpoint that training begins with
        self._is_selected = False

    def pools(self, loader: Iterable[Batch]) -> CombinedLoader:
        """What to give the Trainer in place of a loader, whose batches are then pools.

        Lightning prepares the loader as ever: samplers of processes, seeds of workers, epochs.
        Its own position in a checkpoint, where it has one, goes with pools that were peeked at.
        A `PoolStream` is given itself, not in a DataLoader: live shares of its sources then follow
        what is kept, are logged, and go on from a checkpoint to the bit. Pools that the look-ahead
        and Lightning draw ahead, at most one, have the shares of their time.

        Args:
            loader: of batches with P >= keep examples; with an end or not.

        Raises:
            ValueError: it is a collection of loaders, or has a stream with live shares inside.
        """
        self._pools = _Pools(loader, self)
        return self._pools

    # --- hooks of Lightning -------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called before checkpoints are loaded and loaders are requested."""
        self._trainer, self._saved = trainer, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the selector, when Lightning has prepared and restored all of its own."""
        _check(trainer, pl_module, self._options)
        model, options = trainer.strategy.model, _read(trainer, pl_module) | self._options
        assert isinstance(model, nn.Module)
        if callable(schedule := options.get("lr_scheduler")):
            options["lr_scheduler"] = schedule(pl_module)
        if options.get("scorer") is not None:
            options["scorer"] = self._scorer(trainer)
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which is not ours to use
            target = [self.prepared(batch) for batch in self._target]
        losses = partial(self._losses, self._loss_fn)
        self.selector = Selector(
            model, trainer.optimizers[0], losses, target, self._keep, **options
        )
        if self._saved is not None:
            self.selector.load_state_dict(self._saved["selector"])
        self._saved, self._is_selected = None, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See that the batch was selected."""
        if not self._is_selected:
            raise ValueError(
                "the batches of training must be those of SelectCallback.pools, got one that was "
                "not selected; call trainer.fit(module, selection.pools(loader)), or return "
                "selection.pools(loader) from train_dataloader"
            )
        self._is_selected = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was selected, as means over the processes."""
        assert self.selector is not None
        last = self.selector.last
        assert last is not None
        values = metrics.of_selection(last)
        values |= {metrics.LOOKAHEAD_TARGET_LOSS: last.target_loss, metrics.SELECT_S: last.seconds}
        assert self._pools is not None
        values |= metrics.of_shares(getattr(self._pools.loader, "shares", {}))
        # By place: a process that kept nothing has no mean score, but the others wait for it.
        own = [math.nan if value is None else value for value in values.values()]
        means = self.selector.group.numbers(own).nanmean(0)
        named = zip(values, means.tolist(), strict=True)
        known = {name: mean for name, mean in named if not math.isnan(mean)}
        pl_module.log_dict(known, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the Trainer: the next one must have the callback, too."""
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """Of all processes, as rank 0 alone writes: the selector, and pools drawn but not used."""
        if self.selector is None or self._pools is None:
            return {}
        loader = self._pools.loader
        own = {
            "selector": self.selector.state_dict(with_peeked=False),
            "waiting": [plain(pool) for pool in self._pools.waiting],
            "loader": loader.state_dict() if hasattr(loader, "load_state_dict") else None,
        }
        return {"processes": self.selector.group.gather(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state for the training that begins now; Lightning calls it first."""
        assert self._trainer is not None
        if self._trainer.state.fn != "fit":
            return
        saved, num = state_dict["processes"], self._trainer.world_size
        if len(saved) == num:
            self._saved = saved[self._trainer.global_rank]
        else:
            _log.warning(
                "the checkpoint is of %d processes, and this training of %d: selection begins "
                "afresh",
                len(saved),
                num,
            )

    # --- pools --------------------------------------------------------------------------------

    def prepared(self, batch: Batch) -> Batch:
        """A batch in the type and on the device of training."""
        if self._trainer is None:
            raise ValueError(
                "the callback that made these pools must be one of the Trainer's, got a Trainer "
                "without it; pass Trainer(callbacks=[selection])"
            )
        converted = self._trainer.precision_plugin.convert_input(batch)
        return to_device(converted, self._trainer.strategy.root_device)

    def resumed(self, loader: Any, *, is_stream: bool) -> list[Batch]:
        """Pools that were drawn but not used at a checkpoint, if the loader continues after them.

        A loader that cannot, or that begins an epoch, gives them again.
        """
        saved = self._saved
        if saved is None or saved["loader"] is None or self._trainer is None:
            return []
        if not (is_stream or self._trainer.fit_loop.restarting):
            return []
        loader.load_state_dict(saved["loader"])
        return [self.prepared(restored(pool)) for pool in saved["waiting"]]

    def selected(self, pool: Batch, upcoming: Iterator[Batch]) -> Batch:
        """What is kept of a pool, given those that follow it."""
        assert self.selector is not None
        assert self._pools is not None
        self._is_selected = True
        kept = self.selector.select(pool, upcoming)
        if (follow := getattr(self._pools.loader, "follow", None)) is not None:
            follow(self.selector.last)
        return kept

    def _scorer(self, trainer: Trainer) -> Scorer:
        """The scorer on the device of training, and in its autocast."""
        scorer = placed(self._options["scorer"], trainer.strategy.root_device, trainer.world_size)
        self._options["scorer"] = scorer  # joined once, also where training begins again
        return replace(scorer, loss_fn=partial(self._losses, scorer.loss_fn or self._loss_fn))

    def _losses(self, loss_fn: LossFn, module: nn.Module, batch: Batch) -> Tensor:
        assert self._trainer is not None
        plugin = self._trainer.precision_plugin
        is_scaled = plugin.precision == "16-mixed"  # scores would need the scaler's factor
        with nullcontext() if is_scaled else plugin.train_step_context():
            return loss_fn(module, batch)


class _Pools(CombinedLoader):
    """A loader of pools, whose batches are selected where they are unpacked.

    Args:
        loader: of the pools.
        callback: which selects.
    """

    def __init__(self, loader: Iterable[Batch], callback: SelectCallback) -> None:
        super().__init__(loader, "max_size_cycle")
        if len(self.flattened) != 1:
            raise ValueError(
                "loader must be one, whose batches are pools, got a collection of "
                f"{len(self.flattened)}; make the batches in one dataset"
            )
        if getattr(getattr(loader, "dataset", None), "max_peeked", None) is not None:
            raise ValueError(
                "a stream with live shares must be told of what is kept and saved with its "
                f"position, got one in a {type(loader).__name__}; give the stream itself, which "
                "has workers of its own (num_workers), or fixed shares"
            )
        self.waiting: deque[Batch] = deque()
        """Pools that were drawn and not selected from, in order."""
        self._callback = callback
        self._num_promised = 0

    def __iter__(self) -> _Pools:
        loader = self.loader
        is_stream = isinstance(loader, Iterator)  # it goes on; others begin anew at each epoch
        if not is_stream:
            self.waiting.clear()
        self.waiting.extend(self._callback.resumed(loader, is_stream=is_stream))
        super().__iter__()
        self._num_promised = 0
        self._pools = PeekedPools(self._drawn(), self.waiting)
        return self

    def __next__(self) -> Any:
        # Lightning draws one batch ahead, before the optimizer step, where there is no length.
        if not any(True for _ in islice(self._pools.upcoming(), self._num_promised, None)):
            raise StopIteration
        self._num_promised += 1
        return self._unpacked()

    @property
    def loader(self) -> Any:
        """The loader itself, as Lightning has prepared it."""
        (loader,) = self.flattened
        return loader

    def _unpacked(self) -> Iterator[Any]:
        """The items (batch, its index, index of its loader), made when they are read."""
        pool = next(iter(self._pools))
        self._num_promised -= 1
        yield self._callback.selected(pool, self._pools.upcoming())
        yield from (0, 0)  # Lightning counts batches itself

    def _drawn(self) -> Iterator[Batch]:
        while True:
            try:
                pool, *_ = super().__next__()
            except StopIteration:
                return
            yield self._callback.prepared(pool)


def _check(trainer: Trainer, module: LightningModule, options: Mapping[str, Any]) -> None:
    """Refuse, by name, what a selection would be wrong in."""
    if not isinstance(trainer.strategy, _STRATEGIES):
        known = ", ".join(kind.__name__ for kind in _STRATEGIES)
        raise ValueError(
            f"strategy must be one of {known}, got {type(trainer.strategy).__name__}; pass "
            "Trainer(strategy='ddp'), or ModelParallelStrategy() with fully_shard in "
            "configure_model"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"configure_optimizers must return one optimizer, got {len(trainer.optimizers)}; put "
            "the parameters in groups of one, or select in a loop of your own"
        )
    hook = "configure_gradient_clipping"
    is_own = getattr(type(module), hook) is not getattr(LightningModule, hook)
    is_by_value = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
    if (is_own or is_by_value) and "max_grad_norm" not in options:
        got = f"a {hook} of the module" if is_own else "gradient_clip_algorithm='value'"
        raise ValueError(
            f"gradients must be clipped by norm, got {got}; pass "
            "SelectCallback(max_grad_norm=...) with the norm that comes nearest, or None"
        )
    followed = [config for config in trainer.lr_scheduler_configs if config.interval == "step"]
    is_odd = len(followed) > 1 or any(config.frequency != 1 for config in followed)
    if is_odd and module.automatic_optimization and "lr_scheduler" not in options:
        raise ValueError(
            "the schedule of steps must be one, of frequency 1, got "
            f"{[(type(c.scheduler).__name__, c.frequency) for c in followed]}; join schedules by "
            "torch.optim.lr_scheduler.ChainedScheduler, or pass SelectCallback(lr_scheduler=None), "
            "with which look-aheads hold the present rate"
        )


def _read(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Options of the selector that the Trainer has."""
    found: dict[str, Any] = {"pools_per_update": trainer.accumulate_grad_batches}
    if module.automatic_optimization:  # a schedule of epochs is constant within a look-ahead
        num_steps = trainer.estimated_stepping_batches
        found["num_steps"] = int(num_steps) if 0 < num_steps < math.inf else None
        configs = trainer.lr_scheduler_configs
        followed = (config.scheduler for config in configs if config.interval == "step")
        found["lr_scheduler"] = next(followed, None)
        found["max_grad_norm"] = trainer.gradient_clip_val or None
    return found
