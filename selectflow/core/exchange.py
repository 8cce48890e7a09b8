"""The best examples of all processes' pools, of which each process trains as many as it would have.

Scores go to all processes, examples only to where they are trained on: what a process keeps of its
own pool stays, and the rest of the best ones fills up those that have kept too few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selectflow.core.batches import Batch, device_of, join, take, to_device
from selectflow.core.plain import plain, restored
from selectflow.distributed import Group


class Place(NamedTuple):
    """Where a candidate is: the process that drew it, and its position in that one's pool."""

    rank: int
    position: int


def keep_best(group: Group, pool: Batch, scores: Tensor, size: int) -> tuple[Tensor, Batch]:
    """As many of the best candidates of all processes as each keeps of its own.

    Args:
        group: the processes.
        pool: this one's candidates.
        scores: theirs, shape (P,); larger is kept first.
        size: examples that this process trains on.

    Returns:
        Positions in this pool that are kept, here or elsewhere, best first, and the batch to train
        on here.

    Raises:
        ValueError: examples of two pools do not fit into one batch.
    """
    every = group.gather((scores.tolist(), size))
    shares = share_out(*zip(*every, strict=True))
    kept = [place.position for share in shares for place in share if place.rank == group.rank]
    kept.sort(key=lambda position: (-every[group.rank][0][position], position))
    return _index(kept), exchange(group, pool, shares)


def share_out(scores: Sequence[Sequence[float]], sizes: Sequence[int]) -> list[list[Place]]:
    """Which of all candidates each process trains on.

    Args:
        scores: of each process's pool.
        sizes: examples that each process trains on.

    Returns:
        Of each process, its own of the sum(sizes) best candidates, best first, and then others'.
        Of equal scores the lower rank, then the lower position comes first, in all processes alike.
    """
    everyone = [Place(rank, at) for rank, own in enumerate(scores) for at in range(len(own))]
    everyone.sort(key=lambda place: -scores[place.rank][place.position])  # stable
    best = everyone[: sum(sizes)]
    shares = [[place for place in best if place.rank == rank] for rank in range(len(sizes))]
    spare = [p for p in best if p in shares[p.rank][sizes[p.rank] :]]
    filled = []
    for share, size in zip(shares, sizes, strict=True):
        num = size - min(len(share), size)
        filled.append([*share[:size], *spare[:num]])
        spare = spare[num:]
    return filled


def exchange(group: Group, pool: Batch, shares: Sequence[Sequence[Place]]) -> Batch:
    """The batch that this process trains on.

    Args:
        group: the processes.
        pool: this one's.
        shares: as `share_out` gives them.

    Raises:
        ValueError: examples of two pools do not fit into one batch.
    """
    leaving = sorted(p for rank, share in enumerate(shares) for p in share if p.rank != rank)
    ours = [place.position for place in leaving if place.rank == group.rank]
    sent = plain(to_device(take(pool, _index(ours)), torch.device("cpu")))
    arrived = [restored(batch) for batch in group.gather(sent)] if leaving else []
    own = [place.position for place in shares[group.rank] if place.rank == group.rank]
    parts = [take(pool, _index(own))]
    for place in shares[group.rank][len(own) :]:
        row = [p for p in leaving if p.rank == place.rank].index(place)
        parts.append(to_device(take(arrived[place.rank], _index([row])), device_of(pool)))
    return join(parts)


def _index(positions: Sequence[int]) -> Tensor:
    return torch.tensor(positions, dtype=torch.int64, device="cpu")
