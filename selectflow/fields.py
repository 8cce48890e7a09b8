"""Sections of checked fields, and errors in the words of the person who wrote the values.

Options of a selection, configurations of runs and audits, and spaces of sweeps are such sections:
strict about types and unknown keys, and lax only where YAML has no type of its own.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from selectflow.core.counts import is_count

# --- what is wrong, in the words of the person who wrote it ---------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line for each thing wrong."""


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """The end of an error about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_key(path: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown key, given the dotted paths of all known ones."""
    section, _, leaf = path.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    # A right name in the wrong section (`horizon: 2`) is as common as a misspelt one.
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return nearest(path, elsewhere, cutoff=0.0)
    near = siblings or known
    return nearest(path, near) or f"; known are {', '.join(near)}"


# The rule of pydantic's error types in words of YAML; other types bring their own message.
_RULES = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "path_type": "a path",
    "model_type": "a mapping of its fields",
    "model_attributes_type": "a mapping of its fields",
    "finite_number": "finite",
}


def describe(error: Mapping[str, Any], known: Sequence[str]) -> str:
    """One error of pydantic as `path must be <rule>, got <value>; <fix>`.

    Args:
        error: an item of `ValidationError.errors()`.
        known: dotted paths of all keys.

    Returns:
        One line.
    """
    path = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))
    kind, message, value = error["type"], error["msg"], error["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        section, _, leaf = path.partition(".")
        if path in known and len(error["loc"]) == 1:  # dotted, as only an override is
            return f"{path} must be nested, got {value!r}; write {section}: {{{leaf}: ...}}"
        return f"{path} must be a known key, got {value!r}{nearest_key(path, known)}"
    if kind == "missing":
        return f"{path} must be given"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = nearest(str(value), choices)
        return f"{path} must be one of {', '.join(choices)}, got {value!r}{near}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        fix = f"put it in quotes, on a command line as '{path}=\"{value}\"'"
        return f"{path} must be a string, got {value!r}; {fix}"
    rule = _RULES.get(kind, message.removeprefix("Input should be ").removeprefix("must be "))
    return f"{path} must be {rule}, got {value!r}{error.get('ctx', {}).get('fix', '')}"


def must_be(rule: str, holds: Callable[[object], object]) -> BeforeValidator:
    """A check before the type is looked at: a value that fails `must be <rule>`."""

    # Pydantic reports a union once per type and a pattern as a regex; this once, and in words.
    def check(value: object) -> object:
        if not holds(value):
            raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})
        return _own_number(value)

    return BeforeValidator(check)


def _own_number(value: object) -> object:
    """A number of numpy as Python's own, which is saved and printed as such."""
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


# --- types of fields ------------------------------------------------------------------------------


class Section(BaseModel):
    """Strict and immutable: an unknown key, or a value of another type, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1), must_be("an integer >= 1", is_count)]
# YAML has lists and strings where Python has tuples and paths; only the container is lax.


def expanded(value: object) -> object:
    """A path or URL of a configuration with `~` and `$NAME` filled in, which no shell has done.

    Raises:
        PydanticCustomError: a variable of a path is not set, or a user not known.
    """
    if not isinstance(value, str | Path):
        return value
    filled = os.path.expandvars(os.path.expanduser(value))
    if "://" in filled:
        return filled  # "$" may be a part of it
    if left := re.search(r"\$(\w+|\{\w+\})", filled) or re.match(r"~\w*", filled):
        rule, fix = "a path whose variables are set", f"; {left[0]} is not, set it or write it out"
        raise PydanticCustomError("rule", "must be {rule}", {"rule": rule, "fix": fix})
    return type(value)(filled)


Directory = Annotated[Path, BeforeValidator(expanded), Field(strict=False)]
