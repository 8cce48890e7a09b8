"""Passes of the user's module as it is, at given values of its own parameters.

A pass puts the values into the live parameters, runs forward (and backward) through whatever is
around the module - autocast, compile, checkpointing, fused attention -, and takes them out again.
The parameters' own storage is never written: for the time of a pass `param.data` points to the
values, so that what was there before is there afterwards to the bit, whatever happened in between.
Of parameters that `fully_shard` has sharded, the local shards are written in place, since it
gathers from them, and copied back.
Recomputed activations, closures, tied weights and modules of several names all see the values,
since the `Parameter` objects stay the same.

`Objective.pure` is the reference form: a pure function of the parameters, by
`torch.func.functional_call`, for forward-mode derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_versions

from selectflow.core.batches import Batch, describe, num_examples
from selectflow.core.params import Params
from selectflow.core.snapshot import Snapshot
from selectflow.core.wrappers import uncompiled, unwrap, without_input_hooks
from selectflow.distributed import Layout, check_reducing, local, recover, reshard, sharing

LossFn = Callable[[nn.Module, Any], Tensor]
"""`loss_fn(model, batch)` -> per-example losses, shape (N,)."""

_IN_EVAL = (
    "while scoring: the model is in eval mode there (dropout off, batch norm on running "
    "statistics), and loss_fn must work in it as well"
)
_LOSS_SCALE = 2.0**12  # a power of 2 rounds nothing
_REENTRANT = "incompatible with .grad()"  # as reentrant checkpointing says it


class Objective:
    """Per-example losses of a model at any values of its parameters.

    Args:
        model: the user's module. DistributedDataParallel and DataParallel are looked through; a
            compiled module is run compiled.
        loss_fn: `loss_fn(model, batch)` -> losses of shape (N,), differentiable.
        autocast: low-precision type of the passes, as of the user's own; None: as it is around the
            selection and in loss_fn.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, autocast: torch.dtype | None = None
    ) -> None:
        self.layout = Layout.of(model)
        self.module = unwrap(model)  # what a pass runs
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in self.module.modules()):
            raise ValueError(
                "DistributedDataParallel must be around the whole model, got it inside of "
                f"{type(self.module).__name__}: passes of it would wait for its own reductions; "
                "wrap the outermost module"
            )
        self.model = uncompiled(self.module)  # has the names of the parameters
        self._loss_fn, self._autocast = loss_fn, autocast
        self._bound = _Bound(self.model, loss_fn)
        self._live = dict(self.model.named_parameters())
        self._renormed: set[str] = set()  # parameters that the model writes in forward
        self._uses_backward = False  # gradients by `backward`, as reentrant checkpointing needs
        self._is_probed = False  # whether `_renormed` is known
        self._is_reached = False  # whether `_uses_backward` is known
        self._loss_scale: float | None = None  # of gradients; above 1 where they are in float16
        self._snapshot: Snapshot | None = None

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Around all that reads parameters or makes passes: where sharded, they are shards."""
        if not self.layout.is_sharded:
            yield
            return
        reshard(self.model)
        check_reducing(self.model)
        with self.summing():
            yield

    def summing(self) -> AbstractContextManager[None]:
        """Where sums over all entries of vectors are of this model's: of one beside it, which may
        be whole where the other is sharded, they would count each entry too often, or too rarely.
        """
        return sharing(self.layout.shards)

    # --- losses and gradients at given values ----------------------------------------------------

    def losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Loss of each example, shape (N,), without a graph, in float32 or more.

        Args:
            params: values of the trained parameters; those that are not named stay as they are.
            batch: N examples.

        Raises:
            ValueError: loss_fn returned another shape.
        """
        with torch.no_grad(), self._at(params):
            return _at_least_float32(self._forward(batch))

    def gradients(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        weigh: Callable[[Tensor], Tensor],
        names: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Losses, and the gradient of their sum as weighed.

        Args:
            params: values of the trained parameters.
            batch: N examples.
            weigh: losses, shape (N,) -> their weights, shape (N,) or (Q, N) for Q gradients.
            names: parameters to differentiate in.

        Returns:
            The losses, detached, and a gradient by name, with a leading dimension Q where the
            weights have one; None where the losses do not use the parameter.
        """
        with torch.inference_mode(False), torch.enable_grad(), self._at(params):
            values, grads = self._differentiate(batch, weigh, names)
            while self._loss_scale != 1.0 and not self._are_finite(grads):
                assert self._loss_scale is not None
                self._loss_scale /= 16  # as a GradScaler backs off
                values, grads = self._differentiate(batch, weigh, names)
            is_known = self._is_reached or self.layout.is_sharded
            if not is_known and any(grad is None for grad in grads):
                # Parameters inside a reentrant checkpoint are no inputs of its node: `grad` may
                # pass it by without a word, where `backward` goes through it.
                self._uses_backward = True
                _, through = self._differentiate(batch, weigh, names)
                self._uses_backward = [g is None for g in through] != [g is None for g in grads]
                grads = through if self._uses_backward else grads
            self._is_reached, scale = True, self._loss_scale or 1.0
        found = (g if g is None or scale == 1.0 else g.float() / scale for g in grads)
        return _at_least_float32(values), dict(zip(names, found, strict=True))

    def pure(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`losses` as a pure function, which `torch.func` can transform: values are not checked.

        The reference form, outside of autocast, whose rounding has no forward mode for all kernels.
        """
        live = self._live
        params = {name: value.to(live[name].dtype) for name, value in params.items()}
        given = {f"model.{name}": value for name, value in params.items()}
        with torch.autocast(self._device_type(), enabled=False):
            values = torch.func.functional_call(
                self._bound, given | self._aliases(params), (batch,), tie_weights=False
            )
        return _at_least_float32(_one_per_example(values, batch))

    def apart(self, params: Params) -> Params:
        """The values, in storage of their own where the model writes its parameters in forward."""
        written = self._renormed if self._is_probed else params.keys()
        return Params((k, x.clone() if k in written else x) for k, x in params.items())

    def _aliases(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values for the further names of tied parameters, each place in a module once."""
        first = {id(param): name for name, param in self.model.named_parameters()}
        found, places = {}, set()
        for path, module in self.model.named_modules(remove_duplicate=False):
            for leaf, param in module._parameters.items():
                name = f"{path}.{leaf}" if path else leaf
                is_new = (id(module), leaf) not in places
                places.add((id(module), leaf))
                own = first.get(id(param))
                if is_new and own is not None and own != name and own in params:
                    found[f"model.{name}"] = params[own]
        return found

    # --- one pass --------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> Tensor:
        """Losses by the user's own function, under the user's own autocast."""
        torch.clear_autocast_cache()  # of weights at other values
        try:
            with self._under_autocast():
                values = self._loss_fn(self.module, batch)
        except Exception as error:
            if self._snapshot is not None and not isinstance(error, torch.OutOfMemoryError):
                error.add_note(_IN_EVAL)
            raise
        return _one_per_example(values, batch)

    def _under_autocast(self) -> AbstractContextManager[None]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device_type(), self._autocast)

    def _device_type(self) -> str:
        return next(self.model.parameters()).device.type

    @contextmanager
    def _noting_float16(self) -> Iterator[None]:
        """Find out, in the first pass, whether gradients need a loss scale, as float16 does."""
        types = {param.dtype for param in self.model.parameters()} | {self._autocast}
        if self._loss_scale is not None or self.module is not self.model:  # hooks break graphs
            if self._loss_scale is None:
                self._loss_scale = _LOSS_SCALE if torch.float16 in types else 1.0
            yield
            return

        def note(tensor: Tensor) -> Tensor:
            types.add(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self._loss_scale = _LOSS_SCALE if torch.float16 in types else 1.0

    def _at(self, params: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The live parameters at the given values; everything is put back afterwards."""
        return self._at_shards(params) if self.layout.is_sharded else self._at_whole(params)

    @contextmanager
    def _at_shards(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        reshard(self.model)
        live = self._parameters()
        homes = [
            (local(live[name].detach()), value.detach())
            for name, value in params.items()
            if value.data_ptr() != local(live[name].detach()).data_ptr()
        ]
        kept = [home.clone() for home, _ in homes]
        snapshot = self._snapshot or Snapshot.of(self.model)

        def put_back(is_whole: bool) -> None:
            reshard(self.model) if is_whole else recover(self.model)
            for (home, _), bits in zip(homes, kept, strict=True):
                home.copy_(bits)
            snapshot.put_back()
            torch.clear_autocast_cache()

        is_whole = False
        # no graph is of the shards themselves: forward passes gather copies
        with preserve_versions(tuple(home for home, _ in homes) + tuple(live.values())):
            try:
                for home, value in homes:
                    home.copy_(value)
                yield
                is_whole = True
            finally:
                try:
                    put_back(is_whole)
                except BaseException:  # a second Ctrl-C
                    put_back(is_whole)
                    raise

    @contextmanager
    def _at_whole(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        live = self._parameters()
        values = {
            name: value.detach()
            for name, value in params.items()
            if value.data_ptr() != live[name].data_ptr()
        }
        guarded = self._renormed if self._is_probed else live.keys()
        values |= {name: live[name].detach().clone() for name in guarded if name not in values}
        homes = [(live[name], live[name].data) for name in values]
        written = tuple(live[name] for name in guarded)
        snapshot = self._snapshot or Snapshot.of(self.model)

        def put_back() -> None:
            for param, home in homes:
                param.data = home
            snapshot.put_back()
            torch.clear_autocast_cache()

        with preserve_versions(written):
            before = {name: live[name]._version for name in guarded}
            try:
                for name, value in values.items():
                    live[name].data = value.to(live[name].dtype)
                yield
                self._renormed |= {n for n in before if live[n]._version != before[n]}
                self._is_probed = True
            finally:
                try:
                    put_back()
                except BaseException:  # a second Ctrl-C
                    put_back()
                    raise

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The live parameters; what was learned of others, before layers came or went, is over."""
        live = dict(self.model.named_parameters())
        if live.keys() != self._live.keys() or any(live[k] is not self._live[k] for k in live):
            self._live, self._renormed = live, set()
            self._uses_backward = self._is_probed = self._is_reached = False
        return self._live

    def _differentiate(
        self, batch: Batch, weigh: Callable[[Tensor], Tensor], names: Sequence[str]
    ) -> tuple[Tensor, list[Tensor | None]]:
        with self._noting_float16():
            values = self._forward(batch)
        assert self._loss_scale is not None
        weights = weigh(values.detach()).to(values.dtype) * self._loss_scale
        leaves = [self._live[name] for name in names]
        if not self._uses_backward and not self.layout.is_sharded:
            batched = weights.ndim == 2
            try:
                grads = torch.autograd.grad(
                    values, leaves, weights, is_grads_batched=batched, allow_unused=True
                )
            except RuntimeError as error:
                if _REENTRANT not in str(error):
                    raise
                self._uses_backward = True
                return self._differentiate(batch, weigh, names)
            return values.detach(), list(grads)
        return values.detach(), self._backward(values, leaves, weights)

    def _are_finite(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether all gradients are; of shards, in all processes."""
        are = all(bool(grad.isfinite().all()) for grad in grads if grad is not None)
        return bool(self.layout.group.least(are)) if self.layout.is_sharded else are

    def _backward(
        self, values: Tensor, leaves: Sequence[Tensor], weights: Tensor
    ) -> list[Tensor | None]:
        """Gradients by `backward`; those that the user holds, and hooks on them, are untouched.

        Of shards they are means over all processes, as fully_shard makes them.
        """
        params = [param for param in self._live.values() if param.requires_grad]
        grads, hooks = [param.grad for param in params], []
        for param in params:
            found = param._post_accumulate_grad_hooks
            hooks.append(dict(found or {}))
            if found:
                found.clear()
        try:
            rows = []
            for row in weights if weights.ndim == 2 else weights[None]:
                for param in params:
                    param.grad = None
                torch.autograd.backward(values, row, retain_graph=weights.ndim == 2)
                rows.append([g if g is None else local(g) for g in (leaf.grad for leaf in leaves)])
        finally:
            for param, grad, kept in zip(params, grads, hooks, strict=True):
                param.grad = grad
                if kept:
                    param._post_accumulate_grad_hooks.update(kept)
        if weights.ndim == 1:
            return rows[0]
        return [
            None if all(g is None for g in each) else torch.stack([_dense(g, each) for g in each])
            for each in zip(*rows, strict=True)
        ]

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Deterministic losses: dropout off, batch norm on running statistics.

        Modes, buffers, hooks and random generators are as before afterwards, also after an
        exception. Vectors of parameters are this model's, whole or shards, whatever is around.
        """
        training = [module for module in self.model.modules() if module.training]
        # cuDNN has no backward pass of recurrent layers in eval mode: training without dropout
        recurrent = [module for module in training if isinstance(module, nn.RNNBase)]
        rates = [module.dropout for module in recurrent]
        try:
            for module in training:
                module.training = module in recurrent
            for module in recurrent:
                module.dropout = 0.0
            with without_input_hooks(self.model), self.summing():
                outer, self._snapshot = self._snapshot, Snapshot.of(self.model)
                try:
                    yield
                finally:
                    self._snapshot.put_back()
                    self._snapshot = outer
        finally:
            for module in training:
                module.training = True
            for module, rate in zip(recurrent, rates, strict=True):
                module.dropout = rate

    def write_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Copy values into the live buffers, to stay there when `scoring` ends."""
        live = dict(self.model.named_buffers())
        with torch.no_grad():
            for name in buffers.keys() & live.keys():
                live[name].copy_(buffers[name])
        if self._snapshot is not None:
            self._snapshot = Snapshot.of(self.model)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Buffers, attributes and random generators as before, where `pure` is transformed."""
        snapshot = self._snapshot or Snapshot.of(self.model)
        try:
            yield
        finally:
            snapshot.put_back()


class _Bound(nn.Module):
    """`loss_fn` with its model as a submodule, so that `functional_call` reaches the model."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self._loss_fn(self.model, batch)


def _one_per_example(values: Any, batch: Batch) -> Tensor:
    expected = (num_examples(batch),)
    if not isinstance(values, Tensor) or values.shape != expected:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"loss_fn must return one loss per example, shape {expected}, got {got}; "
            "use reduction='none' and average over everything but the examples (for a causal "
            "language model: selectflow.models.language.causal_lm_losses)"
        )
    return values


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _dense(grad: Tensor | None, others: Sequence[Tensor | None]) -> Tensor:
    if grad is not None:
        return grad.to_dense()
    return torch.zeros_like(next(each for each in others if each is not None).to_dense())


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
