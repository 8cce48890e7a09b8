"""One optimizer step: the losses that it takes, their gradient, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selectflow.core.batches import Batch, chunks, describe, num_examples
from selectflow.core.passes import LossFn
from selectflow.run.sections import TrainConfig
from selectflow.run.task import RunError


def build_losses(
    model: nn.Module, loss_fn: LossFn, config: TrainConfig, device: torch.device
) -> Callable[[Batch], Tensor]:
    """Losses of the examples of a batch as the training step takes them; scoring takes `loss_fn`.

    Args:
        model: on `device`; with `checkpointing`, switched to it in place; in evaluation
            mode, in which scores are taken, its layers run as without.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        config: autocast, checkpointing and compilation.
        device: of the model.

    Returns:
        A function of a batch: losses of shape (N,), in float32 under autocast.

    Raises:
        RunError: the model cannot recompute its activations; or, when the losses are first taken,
            there is no compiler.
    """
    if config.checkpointing:
        _checkpoint(model)
    trained = cast(nn.Module, torch.compile(model)) if config.compile else model

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if config.autocast else nullcontext()

    def losses(batch: Batch) -> Tensor:
        with precision():
            found = loss_fn(trained, batch)
        return found.float() if found.dtype == torch.bfloat16 else found

    return _explained(losses) if config.compile else losses


def _checkpoint(model: nn.Module) -> None:
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # new and old
    enable = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if enable is None:
        raise RunError(
            f"train.checkpointing must be false for a model without {names[0]}, which those of "
            f"transformers have, got true for {type(model).__name__}; split the batch by "
            "train.accumulate instead"
        )
    enable({"use_reentrant": False})


def _explained(losses: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    from torch._dynamo.exc import BackendCompilerFailed  # noqa: PLC0415 - takes a second

    def compiled(batch: Batch) -> Tensor:
        try:
            return losses(batch)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"train.compile must be false where torch.compile cannot build code, got true "
                f"({reason}); install a C++ compiler (on a GPU: triton), or set train.compile=false"
            ) from error

    return compiled


def update(
    model: nn.Module,
    losses: Callable[[Batch], Tensor],
    batch: Batch,
    optimizer: Optimizer,
    step: int,
    *,
    max_grad_norm: float | None = None,
    accumulate: int = 1,
) -> float:
    """One optimizer step on the mean loss of a batch, which it returns.

    Args:
        model: whose gradients are clipped and checked.
        losses: of the examples of a batch, shape (N,).
        batch: the examples of the step.
        optimizer: of the model's parameters.
        step: number of the step, for errors.
        max_grad_norm: clips the whole gradient to this norm; None: no clipping.
        accumulate: micro-batches that the batch is passed in, as equal as they can be. Each is
            weighted by its examples: the gradient is that of the whole.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; nothing was changed.
    """
    size = num_examples(batch)
    parts = list(chunks(batch, math.ceil(size / accumulate)))
    optimizer.zero_grad()
    total = torch.zeros(())
    for part in parts:
        loss = losses(part).mean() * (num_examples(part) / size)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total.to(loss) + loss.detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if not (total.isfinite() and norm.isfinite()):
        raise FloatingPointError(
            f"loss and gradient must be finite, got {total.item()} and norm {norm.item()} at "
            f"optimizer step {step} on {_named(parts)}; lower optimizer.lr or set "
            "optimizer.max_grad_norm"
        )
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    optimizer.step()
    return total.item()


def _named(parts: Sequence[Batch]) -> str:
    return ", ".join(describe(part, torch.arange(num_examples(part))) for part in parts)
