"""Standard output that takes every character."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """From here on, print what the encoding of stdout does not have as Python source has it.

    A run must not end because a terminal, a pipe or a log cannot show a character of its data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
