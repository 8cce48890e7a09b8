"""The user's model and loss as a pure function of the trained parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectflow.core.batches import Batch, describe, num_examples
from selectflow.core.wrappers import unwrap, without_input_hooks

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` -> per-example losses, shape (N,)."""


class Objective:
    """Per-example losses of a model as a pure function of its trained parameters.

    The model is never written to: parameters are passed in, through `torch.func.functional_call`.

    Args:
        model: the user's module; a DistributedDataParallel or compiled one is looked through.
        loss_fn: `loss_fn(model, batch)` -> losses of shape (N,), differentiable.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = unwrap(model)
        self._bound = _Bound(self.model, loss_fn)
        named = dict(self.model.named_parameters())
        first = {id(param): name for name, param in named.items()}
        self._aliases = {
            name: first[id(param)]
            for name, param in self.model.named_parameters(remove_duplicate=False)
            if name not in named
        }

    def losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Loss of each example, shape (N,), at the given parameters.

        Raises:
            ValueError: loss_fn returned another shape.
            FloatingPointError: a loss is not finite; names the examples.
        """
        values = self.call(params, batch)
        check_finite("losses", values, batch)
        return values

    def call(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`losses` without the check of the values, which `torch.func` could not trace."""
        given = {f"model.{name}": param for name, param in params.items()}
        tied = {
            f"model.{alias}": params[name]
            for alias, name in self._aliases.items()
            if name in params
        }
        values = torch.func.functional_call(
            self._bound, {**given, **tied}, (batch,), tie_weights=False
        )
        expected = (num_examples(batch),)
        if not isinstance(values, Tensor) or values.shape != expected:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"loss_fn must return one loss per example, shape {expected}, got {got}; "
                "use reduction='none' and average over everything but the examples (for a causal "
                "language model: selectflow.models.language.causal_lm_losses)"
            )
        return values

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Deterministic losses: dropout off, batch norm on running statistics.

        Modes, hooks and random generators are as before afterwards, also after an exception.
        """
        training = [module for module in self.model.modules() if module.training]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        for module in training:
            module.training = False
        try:
            with torch.random.fork_rng(devices=list(devices)), without_input_hooks(self.model):
                yield
        finally:
            for module in training:
                module.training = True
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


class _Bound(nn.Module):
    """`loss_fn` with its model as a submodule, so that `functional_call` reaches the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def check_finite(name: str, values: Tensor, batch: Batch) -> None:
    """Raise FloatingPointError, naming the examples, unless `values`, (..., N), are finite."""
    values = values.detach()
    if not math.isfinite(values.sum()):  # one small kernel in the usual case
        bad = ~values.isfinite()
        if bad.any():  # else finite values with an infinite sum
            index = bad.reshape(-1, bad.shape[-1]).any(0).nonzero().flatten()
            raise FloatingPointError(
                f"{name} must be finite, got {values[bad][0].item()} for {describe(batch, index)}"
            )
