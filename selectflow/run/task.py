"""What a run trains and how it is judged; its pools, and where they go on after a stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import nn

from selectflow.core.batches import Batch, to_device
from selectflow.core.passes import LossFn
from selectflow.data import Sources


class RunError(ValueError):
    """A run that cannot start: the message says why, and what to do."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        model: the module, initialised.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        evaluate: `evaluate(model, batches)` -> means by name, such as loss and accuracy.
        pools: the stream of candidate pools: mappings with a list "key" of sample ids. What else a
            run makes use of, where the pools have it, is in `Resumable`, `CountsErrors` and
            `Identified`.
        target: batches that define the goal; never trained on.
        test: batches that only evaluation sees.
        kinds: ids of training samples by what they are, as "altered" or a domain. For reports:
            selection never sees them.
        source: the dataset whose split "train" the pools come from, as `PoolStream` takes it;
            offline selection reads the kept samples there.
        show: `show(batch, index)` -> an example as text, for tables of samples.
        score_view: `score_view(num_tokens)` -> the `score_view` of a `Selector`, a window of that
            many tokens of each example; None: the examples have none.
        save: `save(folder)` writes the trained model in its library's own form.
    """

    model: nn.Module
    loss_fn: LossFn
    evaluate: Callable[[nn.Module, Sequence[Batch]], dict[str, float]]
    pools: Iterable[Batch]
    target: Sequence[Batch]
    test: Sequence[Batch]
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: Sources | None = None
    show: Callable[[Batch, int], str] | None = None
    score_view: Callable[[int], Callable[[Batch], Batch]] | None = None
    save: Callable[[Path], None] | None = None


@runtime_checkable
class Resumable(Protocol):
    """Pools that can go on from where they were, as those of `PoolStream`."""

    def state_dict(self) -> Any:
        """The position after the last pool."""

    def load_state_dict(self, state: Any, /) -> None:
        """Go to a position."""


@runtime_checkable
class CountsErrors(Protocol):
    """Pools that count the samples that could not be read."""

    @property
    def errors(self) -> Mapping[str, int]:
        """Unreadable samples so far, by shard."""


@runtime_checkable
class Identified(Protocol):
    """Pools that say which dataset and order they are of, so that a replay can compare."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the pools depend on, as `PoolStream.identity`."""


def identity_of(pools: Iterable[Batch]) -> dict[str, Any]:
    """What pools depend on; empty where they do not say."""
    return dict(pools.identity) if isinstance(pools, Identified) else {}


class PoolSource:
    """The pools of a run on its device; resumed after the last one that was handed out.

    A look-ahead peeks at pools that are handed out later. Each is held with the position after it,
    so that the state of the source never counts a pool that was only peeked at: a resumed run
    draws it again.

    Args:
        pools: any iterable of batches; it can be resumed if it is `Resumable`.
        device: where the pools go.

    Attributes:
        seconds: waited for pools.
    """

    def __init__(self, pools: Iterable[Batch], device: torch.device) -> None:
        self._pools, self._device = pools, device
        self._iterator: Iterator[Batch] | None = None
        self._peeked: deque[tuple[Batch, Any]] = deque()  # pools, and the position after each
        self._position: Any = None  # after the last pool handed out, once there is an iterator
        self.seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        pool, self._position = self._peeked.popleft() if self._peeked else self._draw()
        return pool

    def upcoming(self) -> Iterator[Batch]:
        """The pools after the last one handed out, drawn only when they are asked for."""
        for place in count():
            if place == len(self._peeked):
                try:
                    self._peeked.append(self._draw())
                except StopIteration:
                    return
            yield self._peeked[place][0]

    def _draw(self) -> tuple[Batch, Any]:
        if self._iterator is None:
            self._iterator = iter(self._pools)
            self._position = self._present()
        began = time.perf_counter()
        pool = next(self._iterator)
        self.seconds += time.perf_counter() - began
        return to_device(pool, self._device), self._present()

    def _present(self) -> Any:
        return self._pools.state_dict() if isinstance(self._pools, Resumable) else None

    @property
    def errors(self) -> dict[str, int]:
        """Samples that could not be read so far, by shard, as the pools count them."""
        return dict(self._pools.errors) if isinstance(self._pools, CountsErrors) else {}

    def state_dict(self) -> Any:
        """The position after the last pool handed out; None where the pools have none."""
        return self._present() if self._iterator is None else self._position

    def load_state_dict(self, state: Any) -> None:
        """Draw again from a position that `state_dict` returned.

        Raises:
            ValueError: the pools cannot be resumed.
        """
        if state is None or not isinstance(self._pools, Resumable):
            raise ValueError(
                "pools must have state_dict and load_state_dict to be resumed, got "
                f"{type(self._pools).__name__}; use selectflow.data.PoolStream"
            )
        self._pools.load_state_dict(state)
        self._iterator = None
        self._peeked.clear()
