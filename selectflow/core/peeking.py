"""Pools that were looked at ahead of their time: none is lost, none is used twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from selectflow.core.batches import Batch


class PeekedPools:
    """Pools drawn from a stream and not yet handed out, in the stream's order.

    Args:
        pools: those of an earlier process.
    """

    def __init__(self, pools: Iterable[Batch] = ()) -> None:
        self._pools: deque[Batch] = deque(pools)

    def __len__(self) -> int:
        return len(self._pools)

    def pools(self) -> list[Batch]:
        """The pools, the next one first."""
        return list(self._pools)

    def handed_out(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """All pools, those that were peeked at first; `source` is drawn from when none is left."""
        while True:
            if not self._pools:
                self._pools.extend(islice(source, 1))
            if not self._pools:
                return
            yield self._pools.popleft()

    def upcoming(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """The pools to come, remembered as they are drawn."""
        position = 0
        while True:
            if position == len(self._pools):
                self._pools.extend(islice(source, 1))
            if position == len(self._pools):
                return
            yield self._pools[position]
            position += 1
