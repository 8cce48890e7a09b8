"""The values that a parameter of a sweep may have, as W&B writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from selectflow.fields import nearest

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
# Words that only W&B's server supports: an error must not call them misspelled.
ONLY_ON_WANDB = {
    "categorical_w_probabilities", "inv_log_uniform", "inv_log_uniform_values", "normal",
    "q_normal", "log_normal", "q_log_normal", "q_log_uniform", "q_log_uniform_values", "beta",
    "q_beta", "probabilities", "mu", "sigma", "custom", "envelope", "target", "impute",
    "impute_while_running", "controller", "job", "image_uri", "scheduler", "strict",
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A parameter with one of several values; a constant has one."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A parameter between two numbers, both included; `step` None: any number between."""

    low: float
    high: float
    is_log: bool = False
    step: float | None = None


Domain = Choice | Range


def counted(domain: Domain) -> Domain:
    """A range with a step as the choice of its values."""
    if isinstance(domain, Choice) or domain.step is None:
        return domain
    num = math.floor((domain.high - domain.low) / domain.step + 1e-9) + 1
    return Choice(tuple(domain.low + index * domain.step for index in range(num)))


def read_domains(
    parameters: Mapping[str, Any], problems: list[str], prefix: str = ""
) -> Iterator[tuple[str, Domain]]:
    """The domains in W&B's `parameters` by dotted key; adds a problem for each unusable one."""
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
        if word in ONLY_ON_WANDB:
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
    if "value" in spec or "values" in spec:
        return "constant" if "value" in spec else "categorical"
    # as W&B does: two integers are a range of integers
    return "int_uniform" if all(isinstance(spec.get(e), int) for e in ("min", "max")) else "uniform"


def _range(name: str, low: Any, high: Any, step: Any = None) -> Range:
    given = [low, high, *([] if step is None else [step])]
    kind, text = (int, "integers") if name == "int_uniform" else (int | float, "numbers")
    for value in given:
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            needed = ", ".join(_DISTRIBUTIONS[name])
            raise ValueError(f" must have {text} for {needed}, got {given}")
    if name == "log_uniform":
        low, high = math.exp(low), math.exp(high)
    if not low < high:
        raise ValueError(f" must have min < max, got {low} and {high}")
    is_log = name.startswith("log")
    if is_log and not low > 0:
        raise ValueError(f".min must be > 0 on a logarithmic scale, got {low}")
    if step is not None and not step > 0:
        raise ValueError(f".q must be > 0, got {step}")
    return Range(low, high, is_log, 1 if name == "int_uniform" else step)


# --- which values are the same ------------------------------------------------------------------


def identity(value: Any) -> str:
    """A text that is the same for the same value alone: not for 1, 1.0 and True, which Python
    calls equal.
    """
    return to_json(value, inf_nan_mode="constants").decode()


def distinct(values: Sequence[Any], resolved: Sequence[Any]) -> tuple[Any, ...]:
    """The values without those that resolve to the same as an earlier one."""
    found: dict[str, Any] = {}
    for value, becomes in zip(values, resolved, strict=True):
        found.setdefault(identity(becomes), value)
    return tuple(found.values())


def encode(values: Sequence[Any]) -> list[Any]:
    """Distinct values as optuna takes them, and tells them apart: by ==.

    A list or mapping as JSON; each as JSON where two would otherwise be equal.
    """
    plain = [
        value if value is None or isinstance(value, bool | int | float | str) else identity(value)
        for value in values
    ]
    is_told = all(one != other for i, one in enumerate(plain) for other in plain[:i])
    return plain if is_told else [identity(value) for value in values]
