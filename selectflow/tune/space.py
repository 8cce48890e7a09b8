"""What a parameter of a sweep may be: W&B's distributions as a choice or a range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from selectflow.options import nearest

# distribution -> the keys that it needs
_DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform": ("min", "max"),  # of the exponents of e
    "log_uniform_values": ("min", "max"),
}
# What W&B's server has beside: known, so that the error can say that it is not a misspelling.
OTHERS_OF_WANDB = {
    "categorical_w_probabilities", "inv_log_uniform", "inv_log_uniform_values", "normal",
    "q_normal", "log_normal", "q_log_normal", "q_log_uniform", "q_log_uniform_values", "beta",
    "q_beta", "probabilities", "mu", "sigma", "custom", "envelope", "target", "impute",
    "impute_while_running", "controller", "job", "image_uri", "scheduler", "strict",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """One of several values; a constant is a choice of one."""

    values: tuple[Any, ...]

    @property
    def is_constant(self) -> bool:
        return len(self.values) == 1


@dataclass(frozen=True)
class Range:
    """A number between two, both included; `step` None: any number between."""

    low: float
    high: float
    is_log: bool = False
    step: float | None = None
    is_constant = False

    @property
    def is_integer(self) -> bool:
        """Whether all of its values are integers."""
        return self.step is not None and all(
            isinstance(number, int) for number in (self.low, self.high, self.step)
        )

    def values(self) -> tuple[float, ...] | None:
        """All of its values, None if they cannot be counted."""
        if self.step is None:
            return None
        num = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self.low + index * self.step for index in range(num))


Domain = Choice | Range
Setting = dict[str, Any]
"""Values of the parameters by dotted key."""


def read_domains(
    parameters: Mapping[str, Any], problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Domain]]:
    """The domains in a sweep's `parameters`, by dotted key.

    Args:
        parameters: W&B's mapping, whose keys may be dotted or nested.
        problems: takes a line for each parameter that cannot be used.
        prefix: of the keys.
    """
    for name, spec in parameters.items():
        key = f"{prefix}{name}"
        if isinstance(spec, dict) and isinstance(spec.get("parameters"), dict):
            yield from read_domains(spec["parameters"], problems, f"{key}.")
            continue
        try:
            yield key, _domain(spec)
        except ValueError as error:
            problems.append(f"parameters.{key}{error}")


def _domain(spec: Any) -> Domain:
    """The values of one parameter; a ValueError's text follows the parameter's name."""
    if not isinstance(spec, dict):
        raise ValueError(f" must be a mapping with value, values, or min and max, got {spec!r}")
    name = spec.get("distribution") or _inferred(spec)
    for word in (name, *spec):
        if word in OTHERS_OF_WANDB:
            raise ValueError(f" must be left to W&B's server: {word!r} is not supported here")
    if name not in _DISTRIBUTIONS:
        near = nearest(str(name), list(_DISTRIBUTIONS))
        raise ValueError(
            f".distribution must be one of {', '.join(_DISTRIBUTIONS)}, got {name!r}{near}"
        )
    needed, given = _DISTRIBUTIONS[name], spec.keys() - {"distribution"}
    if given != set(needed):
        raise ValueError(f" must have {' and '.join(needed)} ({name}), got {sorted(given)}")
    if name == "constant":
        return Choice((spec["value"],))
    if name == "categorical":
        if not isinstance(spec["values"], list) or not spec["values"]:
            raise ValueError(f".values must be a list that is not empty, got {spec['values']!r}")
        return Choice(tuple(spec["values"]))
    return _range(name, *(spec[key] for key in needed))


def _inferred(spec: Mapping[str, Any]) -> str:
    # as W&B does: two integers are a range of integers
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    ends = (spec.get("min"), spec.get("max"))
    return "int_uniform" if all(isinstance(end, int) for end in ends) else "uniform"


def _range(name: str, low: Any, high: Any, step: Any = None) -> Range:
    if not all(_is_number(number) for number in (low, high, 1 if step is None else step)):
        raise ValueError(f" must have numbers for min, max and q, got {[low, high, step]}")
    if name == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    if not low < high:
        raise ValueError(f" must have min < max, got {low} and {high}")
    is_log = name.startswith("log")
    if is_log and not low > 0:
        raise ValueError(f".min must be > 0 on a logarithmic scale, got {low}")
    if name == "int_uniform":
        if not (isinstance(low, int) and isinstance(high, int)):
            raise ValueError(f" must have integers for min and max, got {low} and {high}")
        step = 1
    if step is not None and not step > 0:
        raise ValueError(f".q must be > 0, got {step}")
    return Range(low, high, is_log, step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
