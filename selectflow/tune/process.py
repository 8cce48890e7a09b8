"""Runs of a sweep's trainer in processes of their own.

Importing torch takes longer than a run on little data. So the imports are made once, in
multiprocessing's fork server, of which each run begins as a copy.
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
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from selectflow.run.directory import wait_until_free
from selectflow.run.metrics import DIVERGED_AT, STEP, from_json
from selectflow.tune.space import Sweep

# Imports that torch and pyarrow put off to their first use: most of the start of a short run.
_IMPORTED_LATE = ("torch._dynamo", "torch._decomp.decompositions_for_jvp", "pandas")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class RunFailed(Exception):
    """Why a run did not finish, or why its metric cannot be used."""


class RunDiverged(RunFailed):
    """Why the metric of a run is not a number: its setting is a bad one, and no defect."""


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
            del os.environ[name]
            if value is not None:
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
    """One run of a sweep's trainer in a process of its own; its output goes into `<name>.log`."""

    def __init__(
        self, context: ForkServerContext, sweep: Sweep, arguments: Sequence[str], run_dir: Path
    ) -> None:
        self._run_dir = run_dir
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        self.process = context.Process(
            target=_run_trainer, args=(sweep.keys.program, [*arguments], run_dir, self._log)
        )
        self.process.start()

    def stop(self) -> None:
        """Ask it to end its step, save and stop; does not wait."""
        if self.process.is_alive():
            self.process.terminate()

    def stopped(self) -> Iterator[RunProcess]:
        """Stop it, and yield it until it has ended."""
        self.stop()
        while self.process.is_alive():
            yield self

    def rows(self) -> Iterator[dict[str, Any] | None]:
        """The lines of its metrics.jsonl while it runs; None where there is no new one yet."""
        path, size_read, last_step = self._run_dir / "metrics.jsonl", 0, -1
        while True:
            is_running = self.process.is_alive()  # before reading, so that no last line is missed
            text = b""
            if path.exists():
                if path.stat().st_size < size_read:
                    size_read = 0  # cut back to the checkpoint that the run resumed from
                with path.open("rb") as file:
                    file.seek(size_read)
                    text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            size_read += len(whole)
            for row in map(from_json, map(json.loads, whole.splitlines())):
                # a resumed run does steps again that were read before it cut the file back
                if row[STEP] > last_step:
                    last_step = row[STEP]
                    yield row
            if not is_running:
                return
            yield None

    def check(self) -> None:
        """Of an ended run: that it finished.

        Raises:
            RunDiverged: a loss, gradient or score was not finite.
            RunFailed: it ended otherwise; says why, and where its output is.
        """
        path = self._run_dir / "summary.json"
        summary = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if self.process.exitcode == 0 and "status" in summary:
            if summary["status"] != "finished":
                raise RunFailed(str(summary["status"]))
            return
        lines = self._log.read_text("utf-8", "replace").splitlines() if self._log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        kind = RunDiverged if DIVERGED_AT in summary else RunFailed
        raise kind(f"{last.removeprefix('error: ')} (see {self._log})")


def _run_trainer(program: str, arguments: list[str], run_dir: Path, log: Path) -> None:
    """In the new process: run the trainer as from the command line, its output in a file."""
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A sweep that was killed leaves runs that are still saving when it is started again.
    wait_until_free(run_dir)
    sys.argv = [program, *arguments]
    sys.path.insert(0, str(Path(program).resolve().parent))  # as Python does for a script
    runpy.run_path(program, run_name="__main__")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
