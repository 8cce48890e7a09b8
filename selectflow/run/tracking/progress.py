"""How far a run has got, on stdout."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar at a terminal, a plain line now and then elsewhere; written to stdout.

    Args:
        total: steps of the whole run.
        every: steps between two plain lines.
        description: what is going on.
        force_terminal: True or False overrides the look at stdout.
    """

    def __init__(
        self,
        total: int,
        *,
        every: int = 50,
        description: str = "train",
        force_terminal: bool | None = None,
    ) -> None:
        self._total, self._every, self._description = total, every, description
        self._console = Console(file=sys.stdout, force_terminal=force_terminal)
        self._bar: Bar | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(description, total=total, text="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def update(self, step: int, text: str = "") -> None:
        """Show that `step` steps are done.

        Args:
            step: optimizer steps done, at most `total`.
            text: what to show beside it, as "loss 0.41".
        """
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._every == 0 or step == self._total:
            print(f"{self._description} {step}/{self._total} {text}".rstrip(), flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
