"""Checks of arguments that are numbers or names."""

from __future__ import annotations

from typing import Any


def check_range(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an integer >= least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the known names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_keep(keep: int | float) -> None:
    """Raise ValueError unless `keep` is a count >= 1 or a fraction in (0, 1]."""
    is_count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    is_fraction = isinstance(keep, float) and 0 < keep <= 1
    if not (is_count or is_fraction):
        raise ValueError(f"keep must be an integer >= 1 or a fraction in (0, 1], got {keep!r}")
