"""What other libraries put around a model or an optimizer, and how to see through it.

torch's DistributedDataParallel, DataParallel and compile wrap modules; Accelerate wraps optimizers,
schedulers and the forward of a model; transformers, peft and TRL hook embeddings.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from selectflow.distributed import Layout, num_processes


def check_group(layout: Layout, *, is_controlled: bool) -> None:
    """Say what several processes would get wrong where nothing joins their models.

    Args:
        layout: of the model.
        is_controlled: whether something is decided from measurements.

    Raises:
        ValueError: under control.
    """
    num = num_processes()
    if num == 1 or layout.group.size > 1:
        return
    advice = (
        "give the Selector the model as DistributedDataParallel or fully_shard made it, before it "
        "is unwrapped"
    )
    if is_controlled:
        raise ValueError(
            f"horizon, interval and lr must not be 'auto' in {num} processes whose models nothing "
            f"joins: each would decide for itself, and they would drift apart; {advice}"
        )
    warnings.warn(
        f"selection in {num} processes: each scores its own pools by its own target batches "
        f"and looks ahead with its own gradients, not with their mean; {advice}",
        stacklevel=4,
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and DataParallel; a compiled one stays compiled."""
    inner = uncompiled(model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(inner.module)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given."""
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def unadapted(model: nn.Module) -> nn.Module:
    """The model that peft was given, whose `forward` names what it takes."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def prepared_from(wrapper: Any, name: str) -> Any:
    """What `accelerate.Accelerator.prepare` was given, kept as attribute `name` of what it made."""
    is_made = type(wrapper).__module__.partition(".")[0] == "accelerate"
    return getattr(wrapper, name) if is_made else wrapper


@contextmanager
def without_input_hooks(model: nn.Module) -> Iterator[None]:
    """Without the hooks that let embeddings require gradients, for reentrant checkpointing.

    transformers, peft and TRL set them, under names that begin alike. The training step may need
    them; `torch.func` does not take them.
    """
    found = []
    for module in model.modules():
        hooks = module._forward_hooks
        if any(_marks_inputs(hook) for hook in hooks.values()):
            found.append((module, hooks))
            rest = {key: hook for key, hook in hooks.items() if not _marks_inputs(hook)}
            module._forward_hooks = OrderedDict(rest)
    try:
        yield
    finally:
        for module, hooks in found:
            module._forward_hooks = hooks


def _marks_inputs(hook: Callable[..., object]) -> bool:
    return getattr(hook, "__name__", "").startswith("make_inputs_require_grad")


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """The model's own forward, where Accelerate has put it under autocast, and no autocast around.

    Differences of losses drown in the rounding of half precision.
    """
    attributes = vars(model)
    original = attributes.get("_original_forward")  # where Accelerate keeps it
    device = next(model.parameters()).device.type
    if original is None:
        with torch.autocast(device, enabled=False):
            yield
        return
    prepared = attributes["forward"]
    attributes["forward"] = original
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        attributes["forward"] = prepared
