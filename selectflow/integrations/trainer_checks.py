"""Whether the loss that a Trainer trains is the one that is scored."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.passes import LossFn, Objective
from selectflow.core.wrappers import unadapted
from selectflow.integrations.example_rows import Grouped, collated
from selectflow.models.language import IGNORED, shifted_labels

if TYPE_CHECKING:
    from transformers import Trainer

_NUM_COMPARED = 4  # examples; near the first random weights one alone may agree by chance
_SAME = 1e-4  # relative difference of two losses that are one loss, in float32
_SAME_IN_HALF = 2e-2

_log = logging.getLogger(__name__)


def check_loss(trainer: Trainer, pool: Batch, loss_fn: LossFn, task: str | None) -> None:
    """Compare, on single examples, the loss that is trained with the one that is scored.

    Of a single example the means over tokens and over examples are the same. What differs is
    another loss: labels that are not shifted, inputs that are not given to the model, label
    smoothing, a loss of the user's own. A task's losses are compared on some examples together,
    too, since they weigh these as training does. Model and trainer are as before.

    Args:
        trainer: its model and optimizer are prepared.
        pool: a micro-batch by examples; its first ones are compared.
        loss_fn: per-example losses.
        task: whose losses they are by default; None: those of a loss_fn of the user's own, which
            may differ, with a warning.

    Raises:
        ValueError: the default loss is another than that of the Trainer, or does not take the
            model and its batches.
    """
    model = trainer.model
    assert isinstance(model, nn.Module)
    objective = Objective(model, loss_fn)
    num = min(_NUM_COMPARED, num_examples(pool))
    parts = [torch.tensor([at]) for at in range(num)]
    if task is not None and num > 1:
        parts.append(torch.arange(num))
    losses = []
    for index in parts:
        with objective.scoring():
            try:
                with torch.no_grad():
                    ours = _ours(trainer, model, take(pool, index), loss_fn, task)
                theirs = _theirs(trainer, model, collated(take(pool, index)))
            except Exception as error:
                if task is not None or isinstance(error, torch.OutOfMemoryError):
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
        losses.append((index.tolist(), ours, theirs))
    for places, ours, theirs in losses:  # after all passes, which sharded models share
        if not _is_same(ours, theirs, next(model.parameters()).dtype):
            text = _difference(trainer, model, places, ours, theirs)
            if task is not None:
                raise ValueError(f"{text}; {_two_lines(trainer)}")
            _log.warning("%s; examples are selected by that of loss_fn", text)
            return


def _ours(
    trainer: Trainer, model: nn.Module, batch: Batch, loss_fn: LossFn, task: str | None
) -> Tensor:
    try:
        return loss_fn(model, batch).detach().mean()
    except Exception as error:
        if task is None or isinstance(error, torch.OutOfMemoryError):
            raise
        got = f"{type(unadapted(model)).__name__} with {_fields(batch)}"
        raise ValueError(
            f"the default loss, that of {task}, must take the model and batches "
            f"of {type(trainer).__name__}, got {got}, and {type(error).__name__}: {error}; "
            f"{_two_lines(trainer)}"
        ) from error


def _two_lines(trainer: Trainer) -> str:
    """What a user adds for a loss that is not known here."""
    return (
        "pass loss_fn, as in\n"
        "    def loss_fn(model, batch): return ...  # trained loss of each example, shape (N,)\n"
        f"    trainer = {type(trainer).__name__}(..., loss_fn=loss_fn)"
    )


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


def _difference(
    trainer: Trainer, model: nn.Module, places: list[int], ours: Tensor, theirs: Tensor
) -> str:
    causes = []
    if trainer.label_smoother is not None:
        causes.append(f"label_smoothing_factor is {trainer.args.label_smoothing_factor}")
    if trainer.compute_loss_func is not None:
        causes.append("it has a compute_loss_func")
    because = f" ({', '.join(causes)})" if causes else ""
    of = f"example {places[0]}" if len(places) == 1 else f"the first {len(places)} examples"
    return (
        f"the loss that is scored must be the one that is trained, but of {of} of the "
        f"first micro-batch it is {ours.item():.6g}, where {type(trainer).__name__} trains "
        f"{type(unadapted(model)).__name__} by {theirs.item():.6g}{because}"
    )


def _fields(batch: Batch) -> str:
    if isinstance(batch, Grouped):
        return ", ".join([*batch.rows, *batch.rest]) + " of several rows an example"
    return ", ".join(map(str, batch)) if hasattr(batch, "keys") else type(batch).__name__
