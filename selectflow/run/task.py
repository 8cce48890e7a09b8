"""What a run trains and how it is judged; its pools, and where they go on after a stop."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from selectflow.core.batches import Batch, to_device
from selectflow.core.passes import LossFn
from selectflow.data import DataError, Sources
from selectflow.distributed import ALONE, Group
from selectflow.strategies import Selection

# what the processes of a group report to each other when they draw
_HAS_POOL, _HAS_ENDED, _HAS_FAILED = range(3)


class RunError(ValueError):
    """A run that cannot start: the message says why, and what to do."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        model: the module, initialised.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        evaluate: `evaluate(model, batches)` -> means over the examples by name, such as loss and
            accuracy.
        pools: the stream of candidate pools: mappings with a list "key" of sample ids. Where they
            have them, a run also uses `state_dict` and `load_state_dict` to be resumed, `errors`,
            `identity`, `follow` and `shares`, as of `PoolStream`.
        target: batches that define the goal; never trained on.
        test: batches that only evaluation sees.
        kinds: ids of training samples by what they are, as "altered" or a domain. For reports:
            selection never sees them.
        source: the dataset whose split "train" the pools come from, as `PoolStream` takes it;
            offline selection reads the kept samples there.
        show: `show(batch, index)` -> an example as text, for tables of samples.
        score_view: `score_view(num_tokens)` -> the `score_view` of a `Selector`, a window of that
            many tokens of each example; None: the examples have none.
        scorer: a small module that scores in the place of the model; None: the model does.
        scorer_view: what makes of a batch what the scorer reads; None: the batch itself.
        save: `save(folder, weights)` writes the trained model in its library's own form; weights
            is its `state_dict`, put together where it is sharded. Called in one process alone.
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
    scorer: nn.Module | None = None
    scorer_view: Callable[[Batch], Batch] | None = None
    save: Callable[[Path, Mapping[str, Any]], None] | None = None


class PoolSource:
    """The pools of a run on its device; resumed after the last one that was handed out.

    A look-ahead peeks at pools that are handed out later. Each is held with the position after it,
    so that the state of the source never counts a pool that was only peeked at: a resumed run
    draws it again.

    Args:
        pools: any iterable of batches; it can be resumed if it has `state_dict` and
            `load_state_dict`.
        device: where the pools go.
        group: processes that draw at the same time, each its own pools. They end together, and an
            error of one is raised in all: none waits for another's next pool.
        max_errors: samples that they may find unreadable, all together.

    Attributes:
        seconds: waited for pools.
    """

    def __init__(
        self,
        pools: Iterable[Batch],
        device: torch.device,
        group: Group = ALONE,
        max_errors: int = 0,
    ) -> None:
        self._pools: Any = pools
        self._device, self._group, self._max_errors = device, group, max_errors
        self._faults: list[dict[str, str]] = []  # of each process: the shards of unreadable rows
        self._num_faults = torch.empty(0, dtype=torch.float64)  # of each process
        self._is_resumable = hasattr(pools, "state_dict") and hasattr(pools, "load_state_dict")
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
        """The pools after the last one handed out, drawn only when they are read."""
        for place in count():
            if place == len(self._peeked):
                try:
                    self._peeked.append(self._draw())
                except StopIteration:
                    return
            yield self._peeked[place][0]

    def follow(self, selection: Selection) -> None:
        """Tell the pools what was kept of the last one handed out, if they have `follow`."""
        if hasattr(self._pools, "follow"):
            self._pools.follow(selection)

    def _draw(self) -> tuple[Batch, Any]:
        if self._iterator is None:
            self._iterator = iter(self._pools)
            self._position = self._present()
        began = time.perf_counter()
        is_alone = self._group.size == 1
        pool = next(self._iterator) if is_alone else self._next_together(self._iterator)
        self.seconds += time.perf_counter() - began
        return to_device(pool, self._device), self._present()

    def _next_together(self, iterator: Iterator[Batch]) -> Batch:
        """The next pool of this process, if all processes have one."""
        pool, error, state = None, None, _HAS_POOL
        try:
            pool = next(iterator)
        except StopIteration:
            state = _HAS_ENDED
        except (ValueError, OSError) as found:
            error, state = found, _HAS_FAILED
        own = self._own_faults()
        told = self._group.numbers([state, len(own)])
        states, counts = told.unbind(1)
        if (states == _HAS_FAILED).any():
            with self._group.together(DataError, ValueError, OSError):
                if error is not None:
                    raise error
        if not torch.equal(counts, self._num_faults):  # rows: two may have met the same one
            self._num_faults, self._faults = counts, self._group.gather(own)
        if sum(self.errors.values()) > self._max_errors:
            raise DataError(
                f"unreadable samples must be at most data.max_errors, {self._max_errors}, in all "
                f"processes together, got {self.errors}; restore these shards, or raise it to go "
                "on without such samples"
            )
        if (states == _HAS_ENDED).any():
            raise StopIteration
        return pool

    def _own_faults(self) -> dict[str, str]:
        """The shard of each row that this process could not read."""
        present = self._present()
        return dict(present.get("errors", {})) if isinstance(present, Mapping) else {}

    def _present(self) -> Any:
        return self._pools.state_dict() if self._is_resumable else None

    @property
    def errors(self) -> dict[str, int]:
        """Samples that could not be read so far, by shard; {} where the pools do not count them."""
        if self._group.size > 1:
            rows = {row: shard for faults in self._faults for row, shard in faults.items()}
            return dict(Counter(rows.values()))
        return dict(getattr(self._pools, "errors", {}))

    @property
    def identity(self) -> dict[str, Any]:
        """What the pools depend on, as `PoolStream.identity`; {} where they do not say."""
        return dict(getattr(self._pools, "identity", {}))

    @property
    def shares(self) -> dict[str, float]:
        """The newest share of each source, as `PoolStream.shares`; {} where they have none."""
        return dict(getattr(self._pools, "shares", {}))

    def state_dict(self) -> Any:
        """The position after the last pool handed out; None where the pools have none."""
        present = self._present()
        if self._iterator is None:
            return present
        if (
            isinstance(present, Mapping) and "told" in present
        ):  # of later pools, too, which stay as they are
            return self._position | {"told": present["told"]}
        return self._position

    def load_state_dict(self, state: Any) -> None:
        """Draw again from a position that `state_dict` returned.

        Raises:
            ValueError: the pools cannot be resumed.
        """
        if state is None or not self._is_resumable:
            raise ValueError(
                "pools must have state_dict and load_state_dict to be resumed, got "
                f"{type(self._pools).__name__}; use selectflow.data.PoolStream"
            )
        self._pools.load_state_dict(state)
        self._iterator = None
        self._peeked.clear()
