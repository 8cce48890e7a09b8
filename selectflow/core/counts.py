"""Whole numbers as users give them: Python's own and numpy's, but not True and False."""

from __future__ import annotations

from numbers import Integral


def is_count(value: object, least: int | None = 1) -> bool:
    """Whether a value is an integer, of at least `least`; None: of any size."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    return is_integer and (least is None or value >= least)  # type: ignore[operator]


def as_count(name: str, value: object, least: int | None = 1) -> int:
    """The value as Python's own integer, which can be saved and printed as such.

    Raises:
        ValueError: it is no integer, or less than `least`.
    """
    if not is_count(value, least):
        bound = "" if least is None else f" >= {least}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
    return int(value)  # type: ignore[call-overload, no-any-return]
