"""The target's batches: drawn one by one, by position, round after round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain, islice

import numpy as np
from torch import Tensor

from selectflow.core.batches import Batch, tensors
from selectflow.core.snapshot import Randomness

_MOST_REMEMBERED = 2**30  # bytes


class Cycle:
    """The target's batches, again and again, by position; each is drawn when it is asked for.

    They are drawn under random generators of the target's own, which begin as the global ones are
    at the first draw: so those stay as they are, and random batches are new ones each time.

    Args:
        batches: any iterable of batches. One without a length, as a generator, may have no end, or
            come only once: its first round is remembered, up to `_MOST_REMEMBERED`.

    Raises:
        ValueError: it is a single batch, or not iterable.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, Mapping | Tensor | np.ndarray):  # iterated: names, or single rows
            of = " of " + ", ".join(map(str, batches)) if isinstance(batches, Mapping) else ""
            raise ValueError(
                f"target must be an iterable of batches, got one batch, a {type(batches).__name__}"
                f"{of}; put it into a list"
            )
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise ValueError(
                f"target must be an iterable of batches, got {type(batches).__name__}; pass a list "
                "of batches or a DataLoader"
            )
        self._batches = batches
        self._remembered: list[Batch] | None = None if hasattr(batches, "__len__") else []
        self._num_bytes, self._num_drawn = 0, 0
        self._iterator: Iterator[Batch] | None = None  # a DataLoader starts its workers at `iter`
        self._at = 0  # where in its round the iterator is
        self._randomness: Randomness | None = None

    @property
    def num_batches(self) -> int | None:
        """Batches of a round; None where that is not known."""
        return len(self._batches) if isinstance(self._batches, Sized) else None

    def draw(self, position: int) -> tuple[Batch, int]:
        """The batch at a position of a round, and the next position; after the last, the first.

        Raises:
            ValueError: there is none, or it cannot be drawn a second time.
        """
        if isinstance(self._batches, list | tuple) and self._batches:
            position %= len(self._batches)
            return self._batches[position], position + 1
        outside = Randomness.now()
        if self._randomness is not None:
            self._randomness.put_back()
        try:
            return self._first_round(position) or self._draw(position)
        finally:
            self._randomness = Randomness.now()
            outside.put_back()

    def _first_round(self, position: int) -> tuple[Batch, int] | None:
        """The batch as it is remembered; None where nothing is, or not any more."""
        while self._remembered is not None:
            if position < len(self._remembered):
                return self._remembered[position], position + 1
            if self._iterator is None:
                self._iterator = iter(self._batches)
            for batch in islice(self._iterator, 1):
                self._remembered.append(batch)
                self._num_drawn += 1
                self._num_bytes += sum(
                    leaf.numel() * leaf.element_size() for _, leaf in tensors(batch)
                )
                if self._num_bytes > _MOST_REMEMBERED:
                    self._num_drawn -= 1
                    self._iterator, self._at = chain([batch], self._iterator), self._num_drawn
                    self._remembered = None
                break
            else:
                self._iterator, self._at = iter(self._batches), 0
                again = list(islice(self._iterator, 1))
                if again:  # it comes again
                    self._iterator = chain(again, self._iterator)
                else:
                    self._batches, self._iterator = self._remembered, None
                self._remembered = None
        return None

    def _draw(self, position: int) -> tuple[Batch, int]:
        if self._iterator is None or position < self._at:
            self._iterator, self._at = self._open(), 0
        for batch in islice(self._iterator, position - self._at, position - self._at + 1):
            self._at = position + 1
            self._num_drawn += 1
            return batch, self._at
        if position:
            self._iterator = None
            return self._draw(0)
        if self._num_drawn:
            raise ValueError(self._used_up())
        raise ValueError("target must yield at least one batch, got none; pass a list of batches")

    def _open(self) -> Iterator[Batch]:
        if self._num_drawn and isinstance(self._batches, Iterator):
            raise ValueError(self._used_up())
        return iter(self._batches)

    def _used_up(self) -> str:
        return (
            "target must yield its batches again in each round, got a "
            f"{type(self._batches).__name__} that is used up after {self._num_drawn} batches; pass "
            "a list of batches or a DataLoader"
        )
