"""The target set trained on: alone, or mixed into the batches that are kept of the stream.

One part of it is then held out, and the target loss is its mean: what was trained on looks learnt.
What is mixed in also selects: in trials that did better than to keep a part for each. Where the
target set is all that is trained on, the held-out part selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectflow.core.batches import Batch, chunks, join, num_examples, num_kept, take, to_device
from selectflow.distributed import Group
from selectflow.run.config import RunConfig
from selectflow.run.task import RunError, Task


class TargetPools:
    """Pools of the target set, without end: each epoch has every example once, in random order.

    The order depends on seed and position alone. Several processes share an epoch: together they
    draw what one would draw in pools of the size of all of theirs.

    Args:
        examples: the part of the target set that is trained on.
        num: examples of a pool of this process.
        seed: of the order.
        rank: of this process among those that draw.
        size: how many these are.
    """

    def __init__(self, examples: Batch, num: int, seed: int, rank: int = 0, size: int = 1) -> None:
        self.examples, self._num, self._seed = examples, num, seed
        self._rank, self._size, self._position = rank, size, 0

    def at(self, position: int) -> Batch:
        """The pool of this process at a position, from 0."""
        size = num_examples(self.examples)
        start = (position * self._size + self._rank) * self._num
        rows = [
            _order(size, self._seed, place // size)[place % size]
            for place in range(start, start + self._num)
        ]
        return take(self.examples, torch.stack(rows))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._position += 1
            yield self.at(self._position - 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What the pools depend on but for the data themselves."""
        share = {"rank": self._rank, "world_size": self._size}
        return {"of": "the target set", "pool": self._num, "seed": self._seed} | share

    def state_dict(self) -> dict[str, Any]:
        """The position after the last pool."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after `state_dict`."""
        self._position = state["position"]


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(size))


def divided(
    config: RunConfig, task: Task, group: Group, device: torch.device
) -> tuple[Task, TargetPools | None]:
    """The task as `data.target_share` has it, and what to mix into each batch, if anything.

    Returns:
        The task with the held-out part as its target set, and, where nothing else is trained on,
        with the rest as its pools; and else pools of the rest on the device, one a step.

    Raises:
        RunError: the target set is too small for what is asked of it.
    """
    share = config.data.target_share
    if not share:
        return task, None
    held_out, rest = _split(task.target, config.data.target_held_out, config.seed)
    num = config.data.pool if share == 1 else _num_mixed(config)
    there, needed = num_examples(rest), num * group.size
    if there < needed:
        key = "data.pool" if share == 1 else "data.target_share"
        raise RunError(
            f"what is not held out of the target set must have the {needed} examples of a step, "
            f"got {there}; lower {key} or data.target_held_out, or add target examples"
        )
    draw = partial(TargetPools, num=num, seed=config.seed, rank=group.rank, size=group.size)
    if share == 1:
        return replace(task, target=held_out, pools=draw(rest), kinds={}, source=None), None
    return replace(task, target=held_out), draw(to_device(rest, device))


def _num_mixed(config: RunConfig) -> int:
    """As many that they are the share of what is kept and themselves, at least one."""
    share, select = config.data.target_share, config.select
    kept = num_kept(select.keep, config.data.pool) * select.pools_per_update
    return max(1, round(kept * share / (1 - share)))


def _split(batches: Sequence[Batch], held_out: float, seed: int) -> tuple[list[Batch], Batch]:
    """The held-out examples, in batches as large as the first one, and all others in one."""
    whole = join(batches)
    size = num_examples(whole)
    if size < 2:
        raise RunError(
            f"the target set must have at least 2 examples where data.target_share is above 0, "
            f"got {size}; one of them is held out"
        )
    order = torch.from_numpy(np.random.default_rng(seed).permutation(size))
    num = min(max(1, round(held_out * size)), size - 1)
    parts = chunks(take(whole, order[:num]), num_examples(batches[0]))
    return list(parts), take(whole, order[num:])
