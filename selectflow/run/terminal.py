"""What a run shows at a terminal, and the signals by which it is stopped there."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text


class _Pace(ProgressColumn):
    max_refresh = 0.5  # seconds: digits that change with each step cannot be read

    def render(self, task: Task) -> Text:
        return Text(pace(task))


def pace(task: Task) -> str:
    """Steps a second, or seconds a step, and seconds left; evaluation counts. "" if not known.

    Of the steps of the last half minute, those that a resumed run found done left out.
    """
    if not task.speed:
        return ""
    speed = f"{task.speed:.1f} steps/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s/step"
    left = task.time_remaining
    return f"{speed}  {left:.0f} s left" if left else speed


def progress_bar(
    name: str, steps: int, *, is_shown: bool = True, get_time: Callable[[], float] | None = None
) -> Progress:
    """A bar on stdout at a terminal, and elsewhere nothing; `get_time` is another clock."""
    console = Console(file=sys.stdout)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=min(20, max(4, (console.width - 80) // 2))),
        MofNCompleteColumn(),
        _Pace(table_column=Column(no_wrap=True)),
        # what is left of the width is its own: it alone is cut
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
        expand=True,
        console=console,
        get_time=get_time,
        disable=not (is_shown and console.is_terminal),
    )
    bar.add_task(name, total=steps, text="")
    return bar


def show_progress(bar: Progress, step: int, text: str, *, with_line: bool) -> None:
    """Move the bar to a step; where none is drawn, print a line if there is to be one."""
    (task,) = bar.tasks
    bar.update(task.id, completed=step, text=text)
    if bar.disable and with_line:
        print(f"{task.description} {step}/{task.total} {text}  {pace(task)}".rstrip(), flush=True)


@dataclass
class StopRequest:
    """The signal by which the process was asked to stop, if it was."""

    name: str | None = None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Let the running step end on SIGTERM or the first Ctrl-C; a second signal ends at once."""
    request, signals = StopRequest(), (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        request.name = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
