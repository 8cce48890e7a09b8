"""Where the metrics and samples of a run go besides its directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selectflow.run import wandb


class Sink(Protocol):
    """What copies a run elsewhere: the modules `wandb` and `tensorboard`; `run` is its part."""

    NAME: str

    def log(self, run: Any, metrics: Mapping[str, float | int]) -> None:
        """Send the metrics of one step."""

    def show(self, run: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """Send samples."""

    def finish(self, run: Any, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Send the summary, and close it."""


class Sinks:
    """The sinks of a run. One that fails is switched off with one warning, and the run goes on.

    Args:
        source: the file of which they are copies.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self.open: dict[str, tuple[Sink, Any]] = {}

    def add(self, sink: Sink, run: Any) -> None:
        """Send to one more."""
        self.open[sink.NAME] = sink, run

    def send(self, send: Callable[[Sink, Any], object]) -> None:
        """Call `send(sink, run)` for each."""
        for name, (sink, run) in list(self.open.items()):
            try:
                send(sink, run)
            except Exception as error:  # W&B raises anything, and none of it is worth losing a run
                del self.open[name]
                wandb.warn(
                    f"{name} failed and is switched off, the run goes on with {self._source}", error
                )
