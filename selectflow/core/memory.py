"""Limits on memory, in GiB."""

from __future__ import annotations

GIB = 2**30
USUAL_GIB = 1.0  # where no limit is given


def num_fitting(
    limit_gib: float | None, num_bytes: float, least: int, *, fixed: float = 0.0
) -> int:
    """How many pieces of `num_bytes` fit into a limit beside `fixed` bytes.

    With fewer than `least` the caller cannot go on, and says so. Without a limit, None, there is
    room for `least` in any case: a default must not stop those who train larger models.
    """
    if limit_gib is None:
        return max(least, num_fitting(USUAL_GIB, num_bytes, least, fixed=fixed))
    return int((limit_gib * GIB - fixed) / num_bytes)
