"""What the controller decided in a run, and why: one line of decisions.jsonl each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selectflow.control.rules import Decision
from selectflow.core.files import size_on_disk

DECISIONS = "decisions.jsonl"

# Measures that are metrics, too: the last value of each is reported.
_METRICS = ("proxy_first_order", "proxy_second_order", "relative_error", "trust_ratio")


class DecisionLog:
    """Appends decisions to `decisions.jsonl`.

    A line is `{"step", "what", "before", "after", "reason", "measures"}`; a measure that is not
    finite is null.

    Args:
        run_dir: directory of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / DECISIONS
        self.measured: dict[str, float] = {}  # metric -> its last value

    def add(self, decision: Decision) -> None:
        """Write one decision.

        Raises:
            OSError: it cannot be written; names the file.
        """
        measures = {
            name: value if math.isfinite(value) else None
            for name, value in decision.measures.items()
        }
        line = {
            "step": decision.step,
            "what": decision.what,
            "before": decision.before,
            "after": decision.after,
            "reason": decision.reason,
            "measures": measures,
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for name in _METRICS:
            if (value := measures.get(name)) is not None:
                self.measured[f"select/{name}"] = value

    def state_dict(self) -> dict[str, Any]:
        """How long the file is, all of it on the disk, and the last measures."""
        return {"bytes": size_on_disk(self._path), "measured": dict(self.measured)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`; later lines are cut off."""
        if self._path.exists() and self._path.stat().st_size > state["bytes"]:
            os.truncate(self._path, state["bytes"])
        self.measured = dict(state["measured"])


def read_decisions(run_dir: str | Path) -> Iterator[Decision]:
    """The decisions of a run, in order; none where nothing was under control.

    A last line that is still being written is left out.
    """
    path = Path(run_dir, DECISIONS)
    if not path.exists():
        return
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            known = {key: x for key, x in values["measures"].items() if x is not None}
            yield Decision(**values | {"measures": known})
