"""Derivatives of the user's per-example losses: pool scores, gradients, Hessian-vector products.

Each directional derivative exists in two forms. `exact` is forward-mode differentiation through
`torch.func`. `central` is a central difference of plain passes,

    d loss / d direction  ~  (loss(theta + e direction) - loss(theta - e direction)) / 2e

which costs two forward passes for a whole pool, works with every kernel, and has an error that
falls with e^2 until rounding takes over. e is set so that |e direction| is a fixed share of
|theta|; one share does not serve both uses, see `_STEP`. `auto` takes central differences where
a check on a few examples finds them right, since they are the cheaper form on every model
measured, and the exact form otherwise.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from selectflow.batches import Batch, chunks, describe, num_examples, take
from selectflow.params import Params

LossFn = Callable[[nn.Module, Any], Tensor]
Method = Literal["auto", "exact", "central"]
Curvature = Literal["exact", "fisher", "none"]

_log = logging.getLogger(__name__)

# Norm of the perturbation over norm of the parameters: (losses, gradients). Losses lose fewer
# digits to cancellation than gradients do, so they afford a smaller step and less curvature.
_STEP = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-6, 1e-5)}
_SMALLEST_RMS = 1e-2  # parameters smaller than this, as zeros at the start, count as this large
_NUM_CHECKED = 8  # examples on which the two forms are compared
_TOLERANCE = 0.02  # relative error at which central differences still rank a pool rightly


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
                "use reduction='none' and average over everything but the examples"
            )
        return values

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Deterministic losses: dropout off, batch norm on running statistics.

        Modes and random generators are as before afterwards, also after an exception.
        """
        training = [module for module in self.model.modules() if module.training]
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        for module in training:
            module.training = False
        try:
            with torch.random.fork_rng(devices=list(devices)):
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
    """Raise FloatingPointError, naming the examples, unless `values`, shape (N,), are finite."""
    values = values.detach()
    if not math.isfinite(values.sum()):  # one small kernel in the usual case
        index = (~values.isfinite()).nonzero().flatten()
        if len(index):  # else finite values with an infinite sum
            raise FloatingPointError(
                f"{name} must be finite, got {values[index[0]].item()} for {describe(batch, index)}"
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


class Derivatives:
    """Directional derivatives of an objective, by one method, a chunk of examples at a time.

    Args:
        objective: the per-example losses.
        method: "exact", "central" or "auto": decided at the first use, for losses and gradients
            apart, and kept in `decided`.
        chunk_size: examples per pass; None: all at once.
    """

    def __init__(
        self, objective: Objective, method: Method = "auto", chunk_size: int | None = None
    ) -> None:
        if method not in ("auto", "exact", "central"):
            raise ValueError(f"derivative must be 'auto', 'exact' or 'central', got {method!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, got {chunk_size}")
        self.objective = objective
        self.chunk_size = chunk_size
        self.method = method
        self.decided: dict[str, str] = {}

    # --- the quantities -------------------------------------------------------------------

    @torch.no_grad()
    def losses(self, params: Params, batch: Batch) -> Tensor:
        """Loss of each example, shape (N,), without a graph."""
        losses = self._losses(params, batch)
        check_finite("losses", losses, batch)
        return losses

    def _losses(self, params: Params, batch: Batch) -> Tensor:
        parts = [self.objective.call(params, part) for part in self._chunks(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradient(
        self, params: Params, batch: Batch, weights: Tensor | None = None
    ) -> tuple[float, Params]:
        """Weighted sum of the losses and its gradient.

        Args:
            params: where to differentiate.
            batch: N examples.
            weights: shape (N,); None: 1/N each, the batch mean.

        Returns:
            The sum of weights * losses, and its gradient by parameter.
        """
        names, leaves = list(params), [p.detach().requires_grad_() for p in params.values()]
        size = None if self.chunk_size is None else num_examples(batch)
        total, value, start = None, 0.0, 0
        for part in self._chunks(batch):
            with torch.enable_grad():
                losses = self.objective.losses(dict(zip(names, leaves, strict=True)), part)
                stop = start + len(losses)
                if weights is None:
                    loss = losses.sum() / (size or stop)
                else:
                    loss = (losses * weights[start:stop].to(losses)).sum()
            # Parameters that the loss does not use have a gradient of zero.
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            grad = Params(zip(names, grads, strict=True))
            total = grad if total is None else total + grad
            value += loss.item()
            start = stop
        assert total is not None
        return value, total

    @torch.no_grad()
    def along(self, params: Params, direction: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses of the examples and their derivatives along a direction.

        Args:
            params: where to differentiate.
            direction: same names and shapes, any length.
            batch: N examples.

        Returns:
            losses and sum(d loss / d params * direction), each of shape (N,).
        """
        method = self._decide("losses", params, direction, batch)
        form = self._along_exact if method == "exact" else self._along_central
        losses, slopes = form(params, direction, batch)
        check_finite("losses", losses, batch)
        check_finite("derivatives of the losses", slopes, batch)
        return losses, slopes

    def hessian_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """H direction, with H the Hessian of the batch's mean loss."""
        method = self._decide("gradients", params, direction, batch)
        if method == "central":
            return self._hessian_central(params, direction, batch)
        return self._hessian_exact(params, direction, batch)

    def fisher_product(self, params: Params, direction: Params, batch: Batch) -> Params:
        """F direction, with F = mean over examples of g g^T, the empirical Fisher matrix.

        g g^T direction = (slope along direction) g, so F direction is the gradient of the
        losses weighted by their slopes: no per-example gradient is formed.
        """
        _, slopes = self.along(params, direction, batch)
        return self.gradient(params, batch, slopes / len(slopes))[1]

    # --- the two forms --------------------------------------------------------------------

    def _along_exact(
        self, params: Params, direction: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        def both(part: Batch) -> tuple[Tensor, Tensor]:
            at, to = (dict(params),), (dict(direction),)
            losses, slopes = torch.func.jvp(lambda p: self.objective.call(p, part), at, to)[:2]
            return losses, slopes

        with _forward_mode():
            losses, slopes = zip(*map(both, self._chunks(batch)), strict=True)
        return torch.cat(losses), torch.cat(slopes)

    def _along_central(
        self, params: Params, direction: Params, batch: Batch, shrink: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        step = shrink * _step(params, direction, 0)
        if step == 0:
            losses = self._losses(params, batch)
            return losses, torch.zeros_like(losses)
        ahead = self._losses(params.add(direction, step), batch)
        behind = self._losses(params.add(direction, -step), batch)
        return (ahead + behind) / 2, (ahead - behind) / (2 * step)

    def _hessian_exact(self, params: Params, direction: Params, batch: Batch) -> Params:
        size, total = num_examples(batch), direction.zeros_like()
        at, to = (dict(params),), (dict(direction),)
        for part in self._chunks(batch):
            gradient = torch.func.grad(lambda p, part=part: self.objective.call(p, part).sum())
            with _forward_mode():
                product: dict[str, Tensor] = torch.func.jvp(gradient, at, to)[1]
            total = total.add(Params(product).detach(), 1 / size)
        return total

    def _hessian_central(
        self, params: Params, direction: Params, batch: Batch, shrink: float = 1.0
    ) -> Params:
        step = shrink * _step(params, direction, 1)
        if step == 0:
            return direction.zeros_like()
        _, ahead = self.gradient(params.add(direction, step), batch)
        _, behind = self.gradient(params.add(direction, -step), batch)
        return (ahead - behind) / (2 * step)

    # --- choosing between them ------------------------------------------------------------

    def _decide(self, use: str, params: Params, direction: Params, batch: Batch) -> str:
        if self.method != "auto":
            return self.method
        if use not in self.decided:
            few = take(batch, slice(0, min(_NUM_CHECKED, self.chunk_size or _NUM_CHECKED)))
            self.decided[use], why = self._compare(use, params, direction, few)
            _log.info("derivatives of %s: %s (%s)", use, self.decided[use], why)
        return self.decided[use]

    def _compare(
        self, use: str, params: Params, direction: Params, batch: Batch
    ) -> tuple[str, str]:
        """The form to use, and why: central where it agrees with the exact form, or itself."""
        flat = self._flat(use, params, direction, batch)
        central = flat("central", 1.0)
        try:
            reference, against = flat("exact", 1.0), "the exact form"
        except (RuntimeError, NotImplementedError) as error:  # no forward mode for some operator
            reference, against = flat("central", 0.5), "half the step"
            reason = str(error).strip().splitlines()[0]
            _log.info("no forward-mode derivative of this model (%s)", reason)
        scale = reference.norm()
        apart = float((central - reference).norm() / scale) if scale > 0 else 0.0
        agrees = apart <= _TOLERANCE
        if not agrees and against == "half the step":
            raise FloatingPointError(
                f"central differences of {use} must agree to {_TOLERANCE:.0%} between a step and "
                f"half of it, got {apart:.1%}, and the model has no forward-mode derivative; "
                "compute the losses in float32 without autocast, or make the model smooth"
            )
        return ("central" if agrees else "exact"), f"{apart:.1e} from {against}"

    def _flat(
        self, use: str, params: Params, direction: Params, batch: Batch
    ) -> Callable[[str, float], Tensor]:
        def losses(form: str, shrink: float) -> Tensor:
            if form == "exact":
                return self._along_exact(params, direction, batch)[1]
            return self._along_central(params, direction, batch, shrink)[1]

        def gradients(form: str, shrink: float) -> Tensor:
            if form == "exact":
                product = self._hessian_exact(params, direction, batch)
            else:
                product = self._hessian_central(params, direction, batch, shrink)
            return torch.cat([tensor.flatten() for tensor in product.values()])

        return losses if use == "losses" else gradients

    def _chunks(self, batch: Batch) -> Iterator[Batch]:
        return chunks(batch, self.chunk_size)


def _step(params: Params, direction: Params, order: int) -> float:
    """Step size with |step * direction| a fixed share of |params|; 0 for a direction of zeros."""
    dtype = next(iter(params.values())).dtype
    if dtype not in _STEP:
        raise ValueError(
            f"central differences need float32 or float64 parameters, got {dtype}; "
            "keep the parameters in float32 and use autocast in the training step"
        )
    length = direction.norm()
    num_entries = sum(tensor.numel() for tensor in params.values())
    scale = max(params.norm(), _SMALLEST_RMS * math.sqrt(num_entries))
    return _STEP[dtype][order] * scale / length if length > 0 else 0.0


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention by its plain formula: the fused kernels have no forward-mode derivative."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # torch's own forward-mode rules are scripted at their first use, and it warns of that
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        yield
