"""Reading a live `torch.optim` optimizer: its state, its next update and the ones after that."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from selectflow.core.optim import SGD, AdamW, Rule, State
from selectflow.core.params import Params
from selectflow.core.update import Update
from selectflow.core.wrappers import prepared_from
from selectflow.distributed import local

_RULES: dict[type[Optimizer], type[AdamW | SGD]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: AdamW,
    torch.optim.SGD: SGD,
}


class OptimizerReader:
    """A view of a model and its optimizer as the vectors and updates of `dynamics`.

    Holds references, changes nothing but by `write`. Frozen parameters are no part of any vector;
    tied weights count once.

    Args:
        model: names the parameters.
        optimizer: `torch.optim.AdamW`, `Adam` or `SGD`, over parameters of the model; one that
            Accelerate has prepared is looked through, and so is its scheduler.
        lr_scheduler: stepped by the user once after every optimizer step; None: the present
            hyperparameters hold for the whole look-ahead.
        max_grad_norm: what the user clips gradients to by norm; None: no clipping.

    Raises:
        TypeError: another optimizer, or a scheduler that cannot be run ahead.
        ValueError: an option that is not modelled; a parameter that the model does not have, that
            is complex, or on another device than its optimizer state; nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        optimizer = prepared_from(optimizer, "optimizer")
        lr_scheduler = prepared_from(lr_scheduler, "scheduler")
        _check_supported(optimizer)
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise TypeError(
                "lr_scheduler must be a function of the step count, got ReduceLROnPlateau, whose "
                "next value depends on a measurement; pass lr_scheduler=None to hold the present lr"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0 or None, got {max_grad_norm}")
        self._optimizer = optimizer
        self._scheduler = lr_scheduler
        self._max_grad_norm = max_grad_norm
        self._model = model
        self._steps_seen = 0
        self._writes_seen: int | None = None
        self.num_taken_back = 0  # steps that were taken and are no longer in the optimizer's count
        self.lr_multiplier = 1.0  # of every learning rate, as `RateControl` applies it
        if not (params := self.params()):
            raise ValueError("optimizer must train a parameter, got none with requires_grad=True")
        for name, param in params.items():
            if param.is_complex():
                raise ValueError(
                    f"parameters must be real, got {name} of {param.dtype}; train a real tensor "
                    "and use torch.view_as_complex of it in the model"
                )

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer itself."""
        return self._optimizer

    def params(self) -> Params:
        """The live parameters that the optimizer trains, by the model's names; DTensors too."""
        return Params((name, param) for _, name, param in self._trained())

    def values(self) -> Params:
        """Their values in float32 or float64, sharing storage where they are of such a type.

        Of sharded ones the part that this process holds, as everywhere in this class.
        """
        return Params((name, _precise(param)) for _, name, param in self._trained())

    def state(self) -> State:
        """State before the next update; zero moments before the first step.

        In float32 or float64, sharing storage where the optimizer holds such a type.
        """
        params, first, second = Params(), Params(), Params()
        is_sgd = isinstance(self._optimizer, torch.optim.SGD)
        has_momentum = not is_sgd or any(g["momentum"] for g in self._optimizer.param_groups)
        for _, name, param in self._trained():
            state = self._optimizer.state.get(param, {})
            _check_device(name, param, state)
            params[name] = _precise(param)
            if has_momentum:
                first[name] = _moment(state, "momentum_buffer" if is_sgd else "exp_avg", param)
            if not is_sgd:
                second[name] = _moment(state, "exp_avg_sq", param)
        return State(params, first, second)

    def updates(self, num: int) -> list[Update]:
        """The next `num` updates: step counts rise, hyperparameters follow the scheduler.

        The scheduler is copied and run ahead on a shadow of the optimizer's groups; the real
        ones do not move. A schedule that ends sooner, as OneCycleLR or a table, holds its last
        values from there on.
        """
        groups, scheduler = _shadow(self._optimizer, self._scheduler)
        parts = self._parts()
        updates = []
        for ahead in range(num):
            if ahead and scheduler is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # advice to callers about the real scheduler
                    try:
                        scheduler.step()
                    except (ValueError, LookupError):
                        scheduler = None
            rules: list[Rule] = [
                self._rule(groups[index], tuple(names), done + 1 + ahead)
                for (index, done), names in parts.items()
            ]
            updates.append(Update(tuple(rules), self._max_grad_norm))
        return updates

    def num_steps(self) -> int:
        """Steps that the optimizer has taken; never falls.

        Adam and AdamW count them, but for those that were taken back. SGD does not: each change,
        between two calls, in the number of in-place writes that torch has seen on the parameters
        counts as one.
        """
        if not isinstance(self._optimizer, torch.optim.SGD):
            counts = _num_updates(list(self._optimizer.state.values()))
            return max(counts, default=0) + self.num_taken_back
        writes = self._num_writes()
        self._steps_seen += self._writes_seen is not None and writes != self._writes_seen
        self._writes_seen = writes
        return self._steps_seen

    def _num_writes(self) -> int:
        return sum(param._version for _, _, param in self._trained())

    def resume_at(self, num_steps: int) -> None:
        """Let `num_steps` count on from here, for optimizers without a count of their own."""
        self._steps_seen, self._writes_seen = num_steps, None

    def counts(self) -> dict[str, int]:
        """Updates of each parameter that its moments are of; for SGD 1 stands for any number."""
        trained = list(self._trained())
        counts = _num_updates([self._optimizer.state.get(param, {}) for *_, param in trained])
        return {name: num for (_, name, _), num in zip(trained, counts, strict=True)}

    @torch.no_grad()
    def write(self, state: State, counts: Mapping[str, int] | None = None) -> None:
        """Make `state` the live one: parameters and moments, in place.

        No step is counted or forgotten: `num_steps` is the same as before.

        Args:
            state: to go on from.
            counts: `counts` at that state, which its moments are corrected by; None: those of now,
                as after a replay of the steps that the optimizer has really taken.
        """
        is_sgd = isinstance(self._optimizer, torch.optim.SGD)
        before = self.num_steps()
        for _, name, param in self._trained():
            live = self._optimizer.state.get(param, {})
            local(param).copy_(state.params[name])
            for key, part in (
                ("momentum_buffer" if is_sgd else "exp_avg", state.exp_avg),
                ("exp_avg_sq", state.exp_avg_sq),
            ):
                if name in part and live.get(key) is not None:
                    local(live[key]).copy_(part[name])
            if counts is not None:
                _set_count(live, counts[name])
        self._writes_seen = self._num_writes()
        self.num_taken_back += before - self.num_steps()

    def _trained(self) -> Iterator[tuple[int, str, Tensor]]:
        """(index of its group, name, parameter) of all that is trained."""
        # Read each time: layers may have been added, exchanged or wrapped since.
        names = {id(param): name for name, param in self._model.named_parameters()}
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                if not param.requires_grad:
                    continue
                if id(param) not in names:
                    raise ValueError(
                        f"optimizer must hold parameters of the model only, got one of shape "
                        f"{tuple(param.shape)} in group {index} that the model does not have, or "
                        "not any more; build the optimizer from this model's parameters"
                    )
                yield index, names[id(param)], param

    def _parts(self) -> dict[tuple[int, int], list[str]]:
        """Names by (group, updates made): a parameter that was skipped lags behind its group."""
        parts: dict[tuple[int, int], list[str]] = defaultdict(list)
        counts = self.counts()
        for index, name, _ in self._trained():
            parts[index, counts[name]].append(name)
        return parts

    def _rule(self, group: dict[str, Any], names: tuple[str, ...], step: int) -> AdamW | SGD:
        lr, weight_decay = self.lr_multiplier * float(group["lr"]), float(group["weight_decay"])
        if _RULES[type(self._optimizer)] is SGD:
            momentum, dampening = float(group["momentum"]), float(group["dampening"])
            return SGD(names, step, lr, momentum, dampening, weight_decay, group["nesterov"])
        beta1, beta2 = (float(beta) for beta in group["betas"])
        decoupled = type(self._optimizer) is torch.optim.AdamW or group.get(
            "decoupled_weight_decay", False
        )
        return AdamW(names, step, lr, beta1, beta2, float(group["eps"]), weight_decay, decoupled)


def _num_updates(states: Sequence[Mapping[str, Any]]) -> list[int]:
    """Updates of each parameter so far; for SGD 1 stands for any number above 0.

    Counts on a device, as of fused optimizers, are read together: one by one, each would wait.
    """
    counts: list[Any] = [
        s["step"] if "step" in s else s.get("momentum_buffer") is not None for s in states
    ]
    places: dict[torch.device, list[int]] = defaultdict(list)
    for place, count in enumerate(counts):
        if isinstance(count, Tensor):
            places[count.device].append(place)
    for on_device in places.values():
        read = torch.stack([counts[place] for place in on_device]).tolist()
        for place, count in zip(on_device, read, strict=True):
            counts[place] = count
    return [int(count) for count in counts]


def _set_count(state: dict[str, Any], num: int) -> None:
    if isinstance(state.get("step"), Tensor):
        state["step"].fill_(num)
    elif "step" in state:
        state["step"] = num
    elif num == 0 and "momentum_buffer" in state:
        state["momentum_buffer"] = None  # so that the next update is the first


def _moment(state: dict[str, Any], key: str, param: Tensor) -> Tensor:
    value = state.get(key)
    if value is None:
        return torch.zeros_like(_precise(param))
    return _precise(local(value).to_dense())  # SGD's is sparse where its gradients are


def _precise(tensor: Tensor) -> Tensor:
    """What this process holds, without history, in float32 where it is of a lower precision."""
    tensor = local(tensor.detach())
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _check_supported(optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if kind not in _RULES:
        known = ", ".join(f"torch.optim.{known.__name__}" for known in _RULES)
        raise TypeError(
            f"optimizer must be one of {known} (not a subclass, whose step may differ), "
            f"got {kind.__module__}.{kind.__qualname__}; its influence is not modelled"
        )
    for index, group in enumerate(optimizer.param_groups):
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise ValueError(
                    f"optimizer option {option} must be False, got True in group {index} of "
                    f"{kind.__name__}; selectflow does not model it"
                )
        if kind is torch.optim.SGD and group.get("fused"):
            raise ValueError(
                "optimizer option fused must be False for SGD, got True: fused SGD leaves no "
                "trace by which its steps can be counted; use foreach=True"
            )


def _check_device(name: str, param: Tensor, state: dict[str, Any]) -> None:
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        value = state.get(key)
        if value is not None and value.device != param.device:
            raise ValueError(
                f"model and optimizer must be on one device, got {name} on {param.device} and "
                f"its {key} on {value.device}; move the model before building the optimizer"
            )


def _shadow(
    optimizer: Optimizer, scheduler: LRScheduler | None
) -> tuple[list[dict[str, Any]], LRScheduler | None]:
    """Copies of the groups' hyperparameters, and of the scheduler bound to those copies."""
    groups = [
        {key: _copied(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    if scheduler is None:
        return groups, None
    shadow = SimpleNamespace(param_groups=groups, step=None, defaults=optimizer.defaults)
    # Wherever the copy meets the optimizer it finds the shadow: nested schedulers too.
    memo: dict[int, Any] = {id(optimizer): shadow}
    # A method of the user's trainer is called, not copied with all that the trainer holds.
    memo |= {id(function): function for function in _functions(scheduler)}
    return groups, copy.deepcopy(scheduler, memo)


def _copied(value: Any) -> Any:
    # A copy of a tensor shares its storage, into which schedulers write the learning rate.
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _functions(scheduler: LRScheduler) -> Iterator[Callable[..., float]]:
    """The methods and partial functions that the schedules in a scheduler call."""
    for function in getattr(scheduler, "lr_lambdas", ()):
        if isinstance(function, MethodType | partial):
            yield function
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _functions(part)
