"""The runs of a sweep as processes: each a fork of one that has the trainer's imports already.

A run on little data takes less time than importing torch does. So the imports are made once, in
multiprocessing's fork server, and each run begins as a copy of it: a fresh process, with nothing
of another run in it, that starts in milliseconds.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from selectflow.run.directory import wait_until_free

# What torch and pyarrow import at their first use; most of a short run's start. None is needed.
_IMPORTED_LATE = ("torch._dynamo", "torch._decomp.decompositions_for_jvp", "pandas")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def run_server(program: Path) -> Iterator[ForkServerContext]:
    """Where runs are forked from: one thread each, the imports of `program` made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_imports(program), *_IMPORTED_LATE, __name__])
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # read when the server imports torch
    try:
        yield context
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _imports(program: Path) -> list[str]:
    names: list[str] = []
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return names


class RunProcess:
    """One run of a trainer in a process of its own, followed by what it writes.

    Args:
        context: what `run_server` gave.
        program: the trainer.
        arguments: its command line.
        run_dir: the run directory that it will write; what it prints goes beside, `<name>.log`.
    """

    def __init__(
        self, context: ForkServerContext, program: Path, arguments: Sequence[str], run_dir: Path
    ) -> None:
        self.run_dir = run_dir
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        self._read, self._step = 0, -1  # bytes of metrics.jsonl, and the last step in them
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self._process: ForkServerProcess = context.Process(
            target=_run, args=(str(program), list(arguments), str(run_dir), str(self._log))
        )
        self._process.start()

    @property
    def sentinel(self) -> int:
        """Becomes ready when the process ends, for `multiprocessing.connection.wait`."""
        return self._process.sentinel

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        """Ask it to end its step, save and stop; does not wait."""
        if self.is_running:
            self._process.terminate()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.join()

    def new_rows(self) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl, of steps that were not read before."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return []
        size = path.stat().st_size
        if size < self._read:  # cut back to the checkpoint that the run resumed from
            self._read = 0
        with path.open("rb") as file:
            file.seek(self._read)
            text = file.read(size - self._read)
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        # a resumed run does steps again that were read before it cut the file back
        new = [row for row in rows if row["train/step"] > self._step]
        self._step = max([self._step, *(row["train/step"] for row in new)])
        return new

    def failure(self) -> str | None:
        """Why an ended run did not finish; None if it did."""
        summary = self.run_dir / "summary.json"
        if self._process.exitcode == 0 and summary.exists():
            status = json.loads(summary.read_text("utf-8"))["status"]
            return None if status == "finished" else str(status)
        lines = self._log.read_text("utf-8", "replace").splitlines() if self._log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return f"{last.removeprefix('error: ')} (see {self._log})"


def _run(program: str, arguments: list[str], run_dir: str, log: str) -> None:
    """In the new process: run the trainer as from the command line, its output in a file."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A sweep that was killed leaves runs that are still saving when it is started again.
    wait_until_free(Path(run_dir))
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).resolve().parent))  # as Python does for a script
    runpy.run_path(program, run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
