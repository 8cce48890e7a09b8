"""Whether what a Trainer trains on is what is scored: its rows are examples, its loss is ours."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.passes import LossFn, Objective
from selectflow.core.wrappers import unadapted
from selectflow.models.language import IGNORED, shifted_labels

if TYPE_CHECKING:
    from transformers import Trainer

_NUM_COMPARED = 4  # examples; near the first random weights one alone may agree by chance
_SAME = 1e-4  # relative difference of two losses that are one loss, in float32
_SAME_IN_HALF = 2e-2

_log = logging.getLogger(__name__)


# --- rows ---------------------------------------------------------------------------------------


class RowsChecked:
    """A collator, refused where its batches are not one row of every tensor for each example.

    Collators of pairs put the chosen rows before the rejected ones, those without padding join all
    examples into one row, and those of images may stack the patches of all images: what a selection
    took from such a batch would be parts of examples.

    Args:
        collator: of the Trainer.
        trainer: name of its class, for the message.
    """

    def __init__(self, collator: Callable[[list[Any]], Batch], trainer: str) -> None:
        self._collator, self._trainer = collator, trainer

    def __call__(self, examples: list[Any]) -> Batch:
        num = len(examples)  # before the collator, which may take the list apart
        batch = self._collator(examples)
        name = getattr(self._collator, "__name__", type(self._collator).__name__)
        check_rows(batch, num, name, self._trainer)
        return batch


def counts_rows(loader: Any) -> bool:
    """Whether the batches of a loader come from a `RowsChecked`."""
    collator = getattr(loader, "collate_fn", None)
    # transformers puts its own around it, which removes columns
    return isinstance(getattr(collator, "data_collator", collator), RowsChecked)


def check_rows(batch: Batch, num: int, collator: str, trainer: str) -> None:
    """Raise ValueError unless a batch has one row for each of its `num` examples."""
    try:
        found = num_examples(batch)
    except ValueError as error:
        raise ValueError(
            f"a micro-batch must have one row of each tensor for each example, but that of "
            f"{collator} in {trainer} has not: {error}. Switch padding_free off, or pass a "
            "data_collator that gives each example a row of its own, padded where they differ"
        ) from error
    if found == num:
        return
    if found == 1:
        advice = (
            "got a single row; switch padding_free off, and packing or set "
            "packing_strategy='wrapped'"
        )
    else:
        advice = (
            f"got {found} rows of {num} examples. Where they are pairs (DPO, reward models), a "
            "selection would tear them apart: select in a loop of your own, from batches in which "
            "a row is a pair, with a loss_fn of pairs"
        )
    raise ValueError(
        f"a micro-batch must have one row for each example, but {collator} in {trainer} made "
        f"others: {advice}"
    )


# --- losses -------------------------------------------------------------------------------------


def check_loss(trainer: Trainer, pool: Batch, loss_fn: LossFn, is_default: bool) -> None:
    """Compare, on single examples, the loss that is trained with the one that is scored.

    Of a single example the means over tokens and over examples are the same. What differs is
    another loss: labels that are not shifted, inputs that are not given to the model, label
    smoothing, a loss of the user's own. Model and trainer are as before.

    Args:
        trainer: its model and optimizer are prepared.
        pool: a micro-batch; its first examples are compared.
        loss_fn: per-example losses.
        is_default: whether `loss_fn` is the default, which the user may not have thought of.
            Another loss is refused then; a loss_fn of the user's own may differ, with a warning.

    Raises:
        ValueError: the default loss is another than that of the Trainer, or does not take the
            model and its batches.
    """
    model = trainer.model
    assert isinstance(model, nn.Module)
    objective = Objective(model, loss_fn)
    losses = []
    for at in range(min(_NUM_COMPARED, num_examples(pool))):
        index = torch.tensor([at])
        with objective.scoring():
            try:
                with torch.no_grad():
                    ours = _ours(trainer, model, take(pool, index), loss_fn, is_default)
                theirs = _theirs(trainer, model, take(pool, index))
            except Exception as error:
                if is_default or isinstance(error, torch.OutOfMemoryError):
                    error.add_note(f"while {type(trainer).__name__} took the loss of one example")
                    raise
                _log.warning(
                    "loss_fn could not be compared on a single example with %s.compute_loss "
                    "(%s: %s): whether its mean is the loss that is trained is not known",
                    type(trainer).__name__,
                    type(error).__name__,
                    error,
                )
                return
        losses.append((ours, theirs))
    for at, (ours, theirs) in enumerate(losses):  # after all passes, which sharded models share
        if not _is_same(ours, theirs, next(model.parameters()).dtype):
            text = _difference(trainer, model, at, ours, theirs)
            if is_default:
                raise ValueError(
                    f"{text}; pass loss_fn(model, batch) that returns the trained loss of each "
                    "example, shape (N,), or, to select by the default all the same, "
                    "loss_fn=lambda model, batch: causal_lm_losses(model, batch)"
                )
            _log.warning("%s; examples are selected by that of loss_fn", text)
            return


def _ours(
    trainer: Trainer, model: nn.Module, batch: Batch, loss_fn: LossFn, is_default: bool
) -> Tensor:
    try:
        return loss_fn(model, batch).detach().mean()
    except Exception as error:
        if not is_default or isinstance(error, torch.OutOfMemoryError):
            raise
        got = f"{type(unadapted(model)).__name__} with {_fields(batch)}"
        raise ValueError(
            f"the default loss, that of causal language models, must take the model and batches "
            f"of {type(trainer).__name__}, got {got}, and {type(error).__name__}: {error}; pass "
            "loss_fn(model, batch) that returns one loss per example, shape (N,)"
        ) from error


def _theirs(trainer: Trainer, model: nn.Module, batch: Batch) -> Tensor:
    """The Trainer's own loss of a batch, as a mean of its own."""
    # The Trainer counts the items of some models (GPT-2) before labels are shifted, which scales
    # all losses alike; a compute_loss_func has to be told some number.
    num_items = None
    if trainer.compute_loss_func is not None:
        with suppress(KeyError, ValueError, IndexError, AttributeError):
            num_items = (shifted_labels(batch) != IGNORED).sum()
    with _as_before(trainer), torch.enable_grad():
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items)
        return torch.as_tensor(loss).detach().mean()


@contextmanager
def _as_before(trainer: Trainer) -> Iterator[None]:
    """The trainer's attributes, and the metrics that TRL gathers, as they were."""
    attributes = vars(trainer)
    before, metrics = dict(attributes), copy.deepcopy(attributes.get("_metrics"))
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)
        if metrics is not None:
            attributes["_metrics"] = metrics


def _is_same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    share = _SAME_IN_HALF if dtype in (torch.float16, torch.bfloat16) else _SAME
    return torch.allclose(
        ours.double(), theirs.double().to(ours.device), rtol=share, atol=share / 10, equal_nan=True
    )


def _difference(trainer: Trainer, model: nn.Module, at: int, ours: Tensor, theirs: Tensor) -> str:
    causes = []
    if trainer.label_smoother is not None:
        causes.append(f"label_smoothing_factor is {trainer.args.label_smoothing_factor}")
    if trainer.compute_loss_func is not None:
        causes.append("it has a compute_loss_func")
    because = f" ({', '.join(causes)})" if causes else ""
    return (
        f"the loss that is scored must be the one that is trained, but of example {at} of the "
        f"first micro-batch it is {ours.item():.6g}, where {type(trainer).__name__} trains "
        f"{type(unadapted(model)).__name__} by {theirs.item():.6g}{because}"
    )


def _fields(batch: Batch) -> str:
    return ", ".join(map(str, batch)) if hasattr(batch, "keys") else type(batch).__name__
