"""Selection inside the Hugging Face Trainer: every micro-batch is a pool, its best part is kept.

    class SelectTrainer(SelectTrainerMixin, Trainer):  # or trl.SFTTrainer
        pass

    trainer = SelectTrainer(model, args, train_dataset=data, target=clean, keep=4)

`data` may be a `PoolStream`, whose shares of sources then follow what is kept.

The Trainer's loop is untouched: `get_batch_samples`, where it draws the micro-batches of an update,
draws selected ones. All else is public, too: a callback saves the selector beside each checkpoint,
and `log` reports what was selected.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from selectflow.core.batches import Batch, PeekedPools, num_examples
from selectflow.core.files import atomic_file
from selectflow.core.passes import LossFn
from selectflow.core.wrappers import without_autocast
from selectflow.data import PoolStream
from selectflow.integrations.example_rows import (
    Grouped,
    RowsChecked,
    check_rows,
    collated,
    counts_rows,
    grouped,
)
from selectflow.integrations.scorers import check_takes, placed
from selectflow.integrations.stream_batches import micro_batches
from selectflow.integrations.task_losses import TaskLosses
from selectflow.integrations.trainer_checks import check_loss
from selectflow.options import refuse_weights
from selectflow.run import metrics
from selectflow.run.task import PoolSource
from selectflow.selector import Selector
from selectflow.strategies.scorer import Scorer

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

STATE_FILE = "selector.pt"  # in each checkpoint folder, of one process

_log = logging.getLogger(__name__)


class SelectTrainerMixin(_Base):
    """Makes a `transformers.Trainer` train on the most helpful part of each micro-batch.

    `per_device_train_batch_size` is then P, the size of a pool, and `keep` the batch that is
    trained on. Gradient accumulation, clipping, the schedule and the seed are read from the
    training arguments; a look-ahead follows them. An example may be several rows of a batch, as
    the pairs of TRL's DPOTrainer and RewardTrainer are: they are kept together or not at all.
    Scoring and look-ahead run as the training does: under bf16 autocast where it is; under fp16
    they are in the precision of the parameters. Under torchrun each process selects from its own
    micro-batches. While `horizon="auto"` finds that it is better not to select, a random part of
    each pool is trained on.

    `train_dataset` may be a `PoolStream`, given itself and not in a loader. Its pools are the
    micro-batches: `data_collator` gets their tokens as "input_ids" and "labels", images as
    "pixel_values" and "labels", texts as "text". It has its own workers, `rank` and `world_size`.
    Live shares follow what is kept, as always `delay` pools later, by as many as its workers and
    the look-ahead may be ahead. From a checkpoint it goes on where it was, to the bit. Set
    `max_steps`. TRL's SFTTrainer refuses it: it takes those of the library datasets alone.

    Args:
        args: of the Trainer.
        target: the target set: a dataset of the same form as `train_dataset`, or the name of one in
            `eval_dataset` (SFTTrainer tokenises those). Collated as in evaluation,
            `per_device_eval_batch_size` examples to a look-ahead, and held in memory.
        keep: examples kept of each micro-batch: a count, or a fraction in (0, 1]. With a count, set
            `dataloader_drop_last`, or the last pool of an epoch may be too small.
        loss_fn: `loss_fn(model, batch)` of a batch as the collator makes it -> one loss for each
            example, shape (N,), of which the training loss is the mean. The default is that of the
            task, `task_losses.TaskLosses`, in which an example weighs by its tokens, as in the
            Trainer's mean over tokens: of each micro-batch, where the Trainer's is over all of an
            update; with `chunk_size`, of the first pool.
            On single examples of the first micro-batch it is compared, in eval mode, with the
            Trainer's `compute_loss`; if your own differs, a warning says so.
        select_options: further arguments of `Selector`, as `{"horizon": 0, "params": ["!*wte*"]}`.
            A `Scorer` among them is moved to the Trainer's device, joined by DDP where there are
            several processes, and saved with the checkpoints. Its loss_fn None is the loss as
            here, of the same task; under bf16 its passes are under autocast, too.
        kwargs: of the Trainer.

    Attributes:
        selector: the `Selector` of the present or last training; None before.

    Raises:
        ValueError: `weighting` among the options; several devices in a process, or DeepSpeed; no
            such target; a micro-batch that is not the same number of rows for each example, as
            collators without padding make; a loss that is trained, by the model or the Trainer,
            other than the default one; a stream of another pool or other processes, or a checkpoint
            that has no position of it.
        TypeError: an optimizer or schedule that is not modelled.
    """

    def __init__(
        self,
        *args: Any,
        target: Any,
        keep: int | float,
        loss_fn: LossFn | None = None,
        select_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_weights(select_options or {}, "the Trainer")
        super().__init__(*args, **kwargs)
        self.selector: Selector | None = None
        self._target, self._keep, self._loss_fn = target, keep, loss_fn
        self._task: TaskLosses | None = None  # where there is no loss_fn
        self._mean_tokens: float | None = None  # of an example, where pools are scored in chunks
        self._is_compared = False  # whether the losses that are trained and scored were
        self._counts_rows = False  # whether the collator's rows are counted against its examples
        self._select_options = dict(select_options or {})
        self._means, self._select_s = metrics.Means(), 0.0
        self._resume_from: str | None = None
        self._source: Iterator[Batch] | None = None
        self._stream: PoolSource | None = None  # the micro-batches of a PoolStream
        self._selected: Iterator[Batch] = iter(())
        self.add_callback(_SelectorCallback(self))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As in the Trainer; the selector is resumed with the rest of the checkpoint."""
        if resume_from_checkpoint is True:
            # the Trainer says so if there is none
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True  # type: ignore[no-untyped-call]
        is_path = isinstance(resume_from_checkpoint, str)
        self._resume_from = str(resume_from_checkpoint) if is_path else None
        found = super().train(resume_from_checkpoint, *args, **kwargs)
        if self._stream is not None:  # what was only peeked at is drawn again
            assert isinstance(self.train_dataset, PoolStream)
            self.train_dataset.load_state_dict(self._stream.state_dict())
        return found

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """As in the Trainer; its collator must make equally many rows of each example."""
        if isinstance(self.train_dataset, PoolStream):
            collator = RowsChecked(self.data_collator, type(self).__name__)
            self._counts_rows = True
            self._stream = micro_batches(self.train_dataset, collator, self._checked, self.args)
            return DataLoader(self.train_dataset, batch_size=None)  # which is not drawn from
        self._stream = None
        with self._rows_counted():
            loader = super().get_train_dataloader()
        self._counts_rows = counts_rows(loader)
        return loader

    @contextmanager
    def _rows_counted(self) -> Iterator[None]:
        """Let the collator say which rows are of one example."""
        collator = self.data_collator
        self.data_collator = RowsChecked(collator, type(self).__name__)
        try:
            yield
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The selected parts of the next micro-batches, and the number of items in them."""
        assert self.selector is not None
        if epoch_iterator is not self._source:
            self._source = epoch_iterator
            # Of an epoch that was stopped early: the Trainer begins each anew.
            (peeked := self.selector.state.peeked).clear()
            pools = PeekedPools(map(self._checked, epoch_iterator), peeked)
            self._selected = self._kept(self._stream or pools)
        kept = []
        for batch in islice(self._selected, num_batches):
            last = self.selector.last
            assert last is not None
            ahead = {metrics.LOOKAHEAD_TARGET_LOSS: last.target_loss}
            self._means.add(metrics.of_selection(last) | ahead)
            self._select_s += last.seconds
            kept.append(collated(batch))
        return super().get_batch_samples(iter(kept), num_batches, device)

    def _kept(self, pools: PeekedPools | PoolSource) -> Iterator[Batch]:
        """One batch of each pool, also while nothing is selected: the Trainer counts on as many."""
        assert self.selector is not None
        for pool in pools:
            batch = self.selector.select(pool, pools.upcoming())
            if isinstance(pools, PoolSource):
                assert self.selector.last is not None
                pools.follow(self.selector.last)
            yield batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in the Trainer; means of what was selected, and shares, go with the training loss."""
        if "loss" in logs and self.selector is not None:
            every = self.selector.group.gather((self._means.state_dict(), self._select_s))
            states, seconds = zip(*every, strict=True)
            self._means.pop()
            mean_s = {metrics.SELECT_S: sum(seconds) / len(seconds)}
            logs = logs | metrics.Means.over(states).pop() | mean_s
            logs |= metrics.of_shares({} if self._stream is None else self._stream.shares)
        super().log(logs, *args, **kwargs)

    def start_selecting(self) -> None:
        """Build the selector for the model and optimizer as they are now; load its state if any.

        Called when training begins, after the Trainer has prepared and resumed all of its own.
        """
        args = self.args
        if args.n_gpu > 1 or self.is_deepspeed_enabled:
            got = "DeepSpeed" if self.is_deepspeed_enabled else f"{args.n_gpu} devices in one"
            raise ValueError(
                f"selection must run with one device to a process, by DistributedDataParallel or "
                f"FSDP2 (fsdp_config={{'fsdp_version': 2}}), got {got}; start it with torchrun, or "
                "set CUDA_VISIBLE_DEVICES to one"
            )
        options: dict[str, Any] = {
            "lr_scheduler": self.lr_scheduler,
            "max_grad_norm": args.max_grad_norm or None,
            "pools_per_update": args.gradient_accumulation_steps,
            "seed": args.seed,
            "num_steps": self.state.max_steps or None,
        } | self._select_options
        assert isinstance(self.model_wrapped, nn.Module)
        self._task = TaskLosses(self) if self._loss_fn is None else None
        if options.get("scorer") is not None:
            options["scorer"] = self._with_losses(self._placed_scorer())
        self.selector = Selector(
            self.model_wrapped if args.world_size > 1 else self.model,  # type: ignore[arg-type]
            self.optimizer,  # type: ignore[arg-type]
            self._scored_losses,
            self._target_batches(),
            self._keep,
            **options,
        )
        self._source, self._is_compared, self._mean_tokens = None, False, None
        self._means, self._select_s = metrics.Means(), 0.0
        if self._resume_from is not None:
            self._load(Path(self._resume_from, self._state_file()))

    def _placed_scorer(self) -> Scorer:
        """The scorer on the Trainer's device; refused where the task's losses are not its own."""
        args, options = self.args, self._select_options
        scorer = placed(options["scorer"], args.device, args.world_size)
        options["scorer"] = scorer  # joined once, also where training begins again
        if scorer.loss_fn is None and self._task is not None:
            self._task.check_scorer(scorer.model)
            if scorer.view is not None and options.get("chunk_size") is not None:
                raise ValueError(
                    "the loss of a scorer with a view must be given where pools are scored in "
                    "chunks, since tokens are counted before the view, got None; pass "
                    "Scorer(loss_fn=...), or chunk_size=None"
                )
        return scorer

    def _with_losses(self, scorer: Scorer) -> Scorer:
        """The scorer with losses of batches by examples, in the precision of training."""
        own = scorer.loss_fn
        losses = self._losses if own is None else lambda model, batch: own(model, collated(batch))
        low = torch.bfloat16 if self.args.bf16 else None
        return replace(scorer, loss_fn=losses, autocast=scorer.autocast or low)

    def save_selector(self, folder: Path) -> None:
        """Write the selector's state into a checkpoint folder.

        Pools that were only peeked at are left out: a resumed Trainer draws them again.
        """
        assert self.selector is not None
        state = self.selector.state_dict(with_peeked=False)
        state["mean_tokens"] = self._mean_tokens
        state["stream"] = None if self._stream is None else self._stream.state_dict()
        with atomic_file(folder / self._state_file()) as file:
            torch.save(state, file)

    def _state_file(self) -> str:
        """In each checkpoint folder; of several processes each has its own."""
        num, rank = self.args.world_size, self.args.process_index
        return STATE_FILE if num == 1 else f"selector-{rank}-of-{num}.pt"

    def _load(self, path: Path) -> None:
        assert self.selector is not None
        if not path.exists():
            if self._stream is not None:
                raise ValueError(
                    f"a stream must go on from where it was saved, but {path} does not exist: the "
                    "checkpoint was saved without selection, by another number of processes, or "
                    "not to its end; start afresh from its model"
                )
            _log.warning(
                "%s does not exist: the checkpoint was saved without selection, by another number "
                "of processes, or not to its end; selection begins afresh here",
                path,
            )
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.selector.load_state_dict(state)
        self._mean_tokens = state.get("mean_tokens")
        if self._stream is not None:
            if state.get("stream") is None:
                raise ValueError(
                    f"the checkpoint has no position of the stream: {path} was saved in a training "
                    "on another dataset; resume with that one, or start afresh from its model"
                )
            self._stream.load_state_dict(state["stream"])

    def _target_batches(self) -> list[Batch]:
        dataset = self._target
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
            if dataset not in named:
                raise ValueError(
                    f"target must be a dataset or the name of one in eval_dataset, got {dataset!r} "
                    f"and the names {sorted(named)}; pass eval_dataset={{{dataset!r}: ...}}"
                )
            dataset = named[dataset]
        with torch.random.fork_rng(devices=[]), self._rows_counted():
            # a loader draws a seed, which is not ours to use
            return list(map(self._by_examples, self.get_test_dataloader(dataset)))

    def _by_examples(self, batch: Batch) -> Batch:
        """A collated batch by examples, with what the losses need of a reference model."""
        batch = grouped(batch, type(self).__name__)
        scorer = self._select_options.get("scorer")
        views = {"score_view": self._select_options.get("score_view")}
        views["view of the scorer"] = None if scorer is None else scorer.view
        for name, view in views.items():
            if isinstance(batch, Grouped) and view is not None:
                raise ValueError(
                    f"{name} must be None where an example has several rows, got a view, which is "
                    "of batches of one row each; cut the texts in the data_collator"
                )
        return batch if self._task is None else self._task.with_constants(batch)

    def _checked(self, collated_pool: Batch) -> Batch:
        """A micro-batch, also from a loader of the user's own; the first one is looked at."""
        expected = self.args.per_device_train_batch_size
        if not self._counts_rows:
            rows = num_examples(collated_pool)
            if rows > expected or rows == 1 < expected:
                check_rows(collated_pool, expected, "the loader", type(self).__name__)
        pool = self._by_examples(collated_pool)
        if not self._is_compared:
            self._is_compared = True
            assert isinstance(self.model, nn.Module)
            task = None if self._task is None else self._task.task
            with without_autocast(self.model):
                check_loss(self, pool, self._losses, task)
            scorer = self._select_options.get("scorer")
            if self._task is not None and scorer is not None and scorer.loss_fn is None:
                check_takes(scorer, self._task, pool)
            self._weigh_alike(pool)
        return pool

    def _weigh_alike(self, pool: Batch) -> None:
        """Where pools are scored in chunks, let tokens weigh alike in all of them."""
        if self._task is None or self._select_options.get("chunk_size") is None:
            return
        if self._mean_tokens is None and (num := self._task.num_tokens(pool)) is not None:
            assert self.selector is not None
            self._mean_tokens = float(self.selector.group.numbers([num]).mean())
        self._task.mean_tokens = self._mean_tokens

    def _losses(self, model: nn.Module, batch: Batch) -> Any:
        if self._loss_fn is None:
            assert self._task is not None
            return self._task(model, batch)
        return self._loss_fn(model, collated(batch))

    def _scored_losses(self, model: nn.Module, batch: Batch) -> Any:
        # Accelerate's autocast to bf16 is followed; fp16 would need the scaler's loss scale.
        with without_autocast(model) if self.args.fp16 else nullcontext():
            return self._losses(model, batch)


class _SelectorCallback(TrainerCallback):
    """Starts the selector with the training and saves it with each checkpoint."""

    def __init__(self, trainer: SelectTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.start_selecting()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.save_only_model and (args.should_save or args.world_size > 1):
            folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            self._trainer.save_selector(folder)
