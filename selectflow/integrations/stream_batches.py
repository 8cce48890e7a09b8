"""The pools of a `PoolStream` as micro-batches of transformers' Trainer, told of what was kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from selectflow.core.batches import Batch, to_device
from selectflow.data import PoolStream
from selectflow.run.task import PoolSource
from selectflow.strategies import Selection

if TYPE_CHECKING:
    from transformers import TrainingArguments

# fields of a pool -> names that the models of transformers take
_NAMES = {
    "tokens": ("input_ids", "labels"), "image": ("pixel_values",), "label": ("labels",),
    "text": ("text",),
}  # fmt: skip


class StreamBatches:
    """A stream's pools, collated, with `follow` and the position as `PoolSource` asks for them.

    Args:
        stream: endless or not; it has workers and an order of its own.
        collator: makes a micro-batch of examples, one for each of the pool: of tokens "input_ids"
            and "labels", of images "pixel_values" and "labels", and "text".
    """

    def __init__(self, stream: PoolStream, collator: Callable[[list[Any]], Batch]) -> None:
        self._stream, self._collator = stream, collator
        # of each pool that was drawn and not told of: models do not take such names
        self._sources: deque[list[str] | None] = deque()

    def __iter__(self) -> Iterator[Batch]:
        for pool in self._stream:
            self._sources.append(pool.get("source"))
            yield self._collator(_examples(pool))

    def follow(self, selection: Selection) -> None:
        """Tell the stream what was kept of the next pool."""
        self._stream.follow(replace(selection, pool={"source": self._sources.popleft()}))

    @property
    def shares(self) -> dict[str, float]:
        """As of the stream."""
        return self._stream.shares

    def state_dict(self) -> dict[str, Any]:
        """As of the stream."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of the stream."""
        self._stream.load_state_dict(state)
        self._sources.clear()


def micro_batches(
    stream: PoolStream,
    collator: Callable[[list[Any]], Batch],
    checked: Callable[[Batch], Batch],
    args: TrainingArguments,
) -> PoolSource:
    """The micro-batches of a Trainer with these arguments.

    Args:
        stream: of the pools.
        collator: of the Trainer.
        checked: what the Trainer makes of each micro-batch on its device.
        args: of the Trainer.

    Raises:
        ValueError: the stream has another pool, or is cut for other processes.
    """
    cut = {name: stream.identity[name] for name in ("pool", "rank", "world_size")}
    asked = {
        "pool": args.per_device_train_batch_size,
        "rank": args.process_index,
        "world_size": args.world_size,
    }
    if cut != asked:
        raise ValueError(
            f"the stream must be cut as the Trainer trains, {asked}, got {cut}; pass "
            "PoolStream(pool=args.per_device_train_batch_size, rank=args.process_index, "
            "world_size=args.world_size)"
        )
    device = args.device
    batches = StreamBatches(stream, lambda examples: checked(to_device(collator(examples), device)))
    return PoolSource(batches, device)


def _examples(pool: Batch) -> list[dict[str, Any]]:
    """What a collator takes of a pool."""
    fields = {new: pool[old] for old, names in _NAMES.items() if old in pool for new in names}
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
