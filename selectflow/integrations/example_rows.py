"""Which rows of a Trainer's batch are an example: one, or several that go together.

A pair of DPO or of a reward model is two rows of the collator's batch, completions of one prompt
are more. A batch of such is grouped by examples on its way to the selector, so that rows of an
example are scored together and kept together, and put back in the collator's order for the Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from selectflow.core.batches import Batch, num_examples

ROWS = "selectflow_example_of_row"
"""Entry of a collated batch whose examples have several rows: the example of each, int64."""


@dataclass(frozen=True)
class Grouped:
    """A batch of N examples with k rows each.

    Attributes:
        rows: what has rows, tensors of shape (N, k, ...).
        rest: what else is in the batch; tensors of one row for each example.
        constants: numbers of each example that losses need and training finds itself, (N,).
        is_blocks: the collator puts first rows of all examples before second ones; else the rows of
            an example follow each other.
    """

    rows: dict[str, Tensor]
    rest: dict[str, Any]
    is_blocks: bool
    constants: dict[str, Tensor] = field(default_factory=dict)


def grouped(batch: Batch, trainer: str) -> Batch:
    """A collated batch by examples, where these have several rows; else the batch itself.

    Raises:
        ValueError: rows were lost or moved on their way from the collator.
    """
    if not isinstance(batch, Mapping) or ROWS not in batch:
        return batch
    owner = batch[ROWS]
    num = int(owner.max()) + 1
    k = len(owner) // num
    index = torch.arange(num, device=owner.device)
    is_blocks = torch.equal(owner, index.repeat(k))
    if not is_blocks and not torch.equal(owner, index.repeat_interleave(k)):
        raise ValueError(
            f"rows of one example must stay in one micro-batch, but some went astray on their way "
            f"to {trainer}; switch dispatch_batches and split_batches of Accelerate off"
        )
    rows, rest = {}, {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == len(owner) and name != ROWS:
            shape = value.shape[1:]
            blocks = value.view(k, num, *shape).transpose(0, 1)
            rows[name] = blocks if is_blocks else value.view(num, k, *shape)
        elif name != ROWS:
            rest[name] = value
    return Grouped(rows, rest, is_blocks)


def collated(batch: Batch, *, with_constants: bool = False) -> Batch:
    """A batch as the collator made it, from one by examples; of others the batch itself.

    Args:
        batch: what `grouped` returned, or a part of it.
        with_constants: whether they are entries of it, too.
    """
    if not isinstance(batch, Grouped):
        return batch
    by_row = {
        name: (value.transpose(0, 1) if batch.is_blocks else value).flatten(0, 1)
        for name, value in batch.rows.items()
    }
    return by_row | batch.rest | (batch.constants if with_constants else {})


class RowsChecked:
    """A collator whose batches say which example a row is of, where examples have several.

    Refused are batches whose rows are not those of examples: collators without padding join all
    examples into one row, and those of images may stack the patches of all images. What a selection
    took from such a batch would be parts of examples.

    Args:
        collator: of the Trainer.
        trainer: name of its class, for the message.
    """

    def __init__(self, collator: Callable[[list[Any]], Batch], trainer: str) -> None:
        self._collator, self._trainer = collator, trainer
        self._is_blocks: bool | None = None  # not known yet

    def __call__(self, examples: list[Any]) -> Batch:
        num = len(examples)  # before the collator, which may take the list apart
        first = list(map(copy.copy, examples[:2])) if self._is_blocks is None else []
        batch = self._collator(examples)
        name = getattr(self._collator, "__name__", type(self._collator).__name__)
        k = rows_per_example(batch, num, name, self._trainer)
        if k == 1:
            return batch
        if self._is_blocks is None and num > 1:
            self._is_blocks = self._finds_blocks(first, batch, num, k, name)
        index = torch.arange(num)
        batch[ROWS] = index.repeat_interleave(k) if self._is_blocks is False else index.repeat(k)
        return batch

    def _finds_blocks(self, first: list[Any], batch: Batch, num: int, k: int, name: str) -> bool:
        """Whether a row of an example is `num` rows after its last one, by collating it alone."""
        with torch.random.fork_rng(devices=[]):
            singles = [self._collator([example]) for example in first]
        places = [(at, row) for at in range(len(first)) for row in range(k)]
        for is_blocks in (True, False):
            if all(
                _is_same_row(singles[at], row, batch, at + row * num if is_blocks else at * k + row)
                for at, row in places
            ):
                return is_blocks
        raise ValueError(
            f"the {k} rows of an example must follow each other in a micro-batch, or come first "
            f"rows first, but {name} in {self._trainer} has another order; pass a data_collator "
            "with one of these orders"
        )


def counts_rows(loader: Any) -> bool:
    """Whether the batches of a loader come from a `RowsChecked`."""
    collator = getattr(loader, "collate_fn", None)
    # transformers puts its own around it, which removes columns
    return isinstance(getattr(collator, "data_collator", collator), RowsChecked)


def rows_per_example(batch: Batch, num: int, collator: str, trainer: str) -> int:
    """How many rows each of the `num` examples of a batch has.

    Raises:
        ValueError: the rows of its tensors are not the same whole number for each example.
    """
    if isinstance(batch, Mapping):
        sizes = {name: len(t) for name, t in batch.items() if isinstance(t, Tensor) and t.ndim}
        size = sizes.get("input_ids", next(iter(sizes.values()), 0))
        if size > num and size % num == 0 and set(sizes.values()) <= {num, size}:
            return size // num
    check_rows(batch, num, collator, trainer)
    return 1


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
    advice = "pass a data_collator that gives each example a row, or the same number of rows"
    if found == 1:
        advice = "switch padding_free off, and packing or set packing_strategy='wrapped'"
    raise ValueError(
        f"a micro-batch must have one row for each example, but {collator} in {trainer} made "
        f"others: got {'a single row' if found == 1 else f'{found} rows of {num} examples'}; "
        f"{advice}"
    )


def _is_same_row(single: Batch, row: int, batch: Batch, place: int) -> bool:
    """Whether two rows hold the same, but for padding."""
    name = "input_ids" if "input_ids" in batch else next(iter(batch))
    one, other = single[name][row], batch[name][place]
    if "attention_mask" in batch:
        one = one[single["attention_mask"][row].bool()]
        other = other[batch["attention_mask"][place].bool()]
        return torch.equal(one, other)
    if not one.ndim:
        return torch.equal(one, other)
    least = min(len(one), len(other))
    return torch.equal(one[:least], other[:least]) or torch.equal(one[-least:], other[-least:])
