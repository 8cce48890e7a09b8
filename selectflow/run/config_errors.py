"""What is wrong with a configuration, in the words of the person who wrote it."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line for each thing wrong."""


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """The end of an error about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


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
        return f"{path} must be a known key, got {value!r}{nearest_key(path, known)}"
    if kind == "missing":
        return f"{path} must be given"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = nearest(str(value), choices)
        return f"{path} must be one of {', '.join(choices)}, got {value!r}{near}"
    rule = _RULES.get(kind, message.removeprefix("Input should be ").removeprefix("must be "))
    return f"{path} must be {rule}, got {value!r}"
