"""Limits on memory, in GiB."""

from __future__ import annotations

GIB = 2**30
USUAL_GIB = 1.0  # where no limit is given


def num_fitting(limit_gib: float | None, num_bytes: int, least: int) -> int:
    """How many pieces of `num_bytes` fit into a limit; below `least`, the caller cannot go on.

    Without a limit, None, as many as fit into 1 GiB, and `least` in any case: what a user did not
    ask for is to stop no one who trains a larger model.
    """
    if limit_gib is None:
        return max(least, int(USUAL_GIB * GIB / num_bytes))
    return int(limit_gib * GIB / num_bytes)
