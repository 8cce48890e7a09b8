"""Seconds of work, on whichever device it is done."""

from __future__ import annotations

import time

import torch


def work_s(device: torch.device) -> float:
    """Seconds of work so far, for differences.

    On an accelerator by the wall's clock, once it has finished what was started on it; on a
    processor those of this thread alone, in which other programs, and waiting, do not count.
    """
    if device.type == "cpu":
        return time.thread_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
