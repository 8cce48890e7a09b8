"""What the sections of a configuration share: their base, and types of fields."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def must_be(rule: str, holds: Callable[[object], object]) -> BeforeValidator:
    """A check before the type is looked at: a value that fails `must be <rule>`."""

    # Pydantic reports a union once per type and a pattern as a regex; this once, and in words.
    def check(value: object) -> object:
        if not holds(value):
            raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})
        return value

    return BeforeValidator(check)


def _matches(pattern: str) -> Callable[[object], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


Count = Annotated[int, Field(ge=1)]
# YAML has lists and strings where Python has tuples and paths; only the container is lax.
Directory = Annotated[Path, Field(strict=False)]
RunName = Annotated[
    str,
    must_be(
        "a directory name of letters, digits, '.', '_' and '-'; {seed} stands for the seed",
        _matches(r"[A-Za-z0-9](\{[a-z_.]+\}|[A-Za-z0-9._-])*"),
    ),
]
Device = Annotated[
    str,
    must_be("auto, cpu, cuda, cuda:N, mps or xpu", _matches(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")),
]


class Section(BaseModel):
    """Strict and immutable: an unknown key, or a value of another type, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
