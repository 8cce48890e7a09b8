"""A selector's state from a file, on the device of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selectflow.core.batches import to_device
from selectflow.selector import Selector


def load_state(selector: Selector, state: Mapping[str, Any], device: torch.device) -> None:
    """Continue from `Selector.state_dict`, which came back on the CPU.

    Args:
        selector: of the same options and model.
        state: what it returned.
        device: where batches are trained on.

    Raises:
        ValueError: as `Selector.load_state_dict`.
    """
    selector.load_state_dict(dict(state))
    rate = selector.state.rate
    if rate is not None and (window := rate.window) is not None:  # its batches are replayed
        window.target = to_device(window.target, device)
        window.batches = [[to_device(b, device) for b in parts] for parts in window.batches]
