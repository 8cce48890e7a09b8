"""What a run measures while it trains: metrics, the controller's decisions and the clock."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selectflow.control.rules import Decision
from selectflow.core.batches import num_examples
from selectflow.core.files import size_on_disk
from selectflow.run import metrics
from selectflow.run.ledger import Ledger
from selectflow.run.metrics import Means
from selectflow.run.tracker import Tracker, write_text
from selectflow.strategies import Selection

DECISIONS = "decisions.jsonl"


class Stopwatch:
    """Seconds of training: runs between `start` and `stop`, any number of times."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # up to the last stop
        self._started: float | None = None

    def start(self) -> None:
        """Go on counting."""
        self._started = time.perf_counter()

    def stop(self) -> float:
        """Stop counting; the seconds so far."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self._started = None
        return self.seconds


class RunLog:
    """Collects what each step did, and hands means over a stretch of steps to the tracker.

    Every pool and batch of a run is a mapping with a list "key" of sample ids.

    Args:
        ledger: takes what was kept.
        decisions: takes what the controller decided.
        tracker: takes the metrics.
        kinds: ids of samples by what they are, to report which share of the kept they make up.
        upfront_s: seconds of selection before the first step.
    """

    def __init__(
        self,
        ledger: Ledger,
        decisions: DecisionLog,
        tracker: Tracker,
        kinds: Mapping[str, frozenset[str]],
        upfront_s: float = 0.0,
    ) -> None:
        self._ledger, self._tracker, self._kinds = ledger, tracker, kinds
        self._decisions = decisions
        self._means = Means()  # since the last flush
        self._counts = Counter[str]()  # steps since then; samples and tokens since the start
        self._select_s = self._wall_s_before = upfront_s
        self._text: dict[str, float] = {}

    def close(self) -> None:
        """Put the rest of the ledger on the disk."""
        self._ledger.flush()

    def step(
        self, step: int, parts: Sequence[tuple[Mapping[str, Any], Selection]], loss: float
    ) -> None:
        """Record one optimizer step.

        Args:
            step: its number, from 1.
            parts: what was trained on, and the selection it comes from, for each of its pools.
            loss: mean over all of it.
        """
        self._means.add({metrics.TRAIN_LOSS: loss})
        self._counts["steps"] += 1
        for batch, selection in parts:
            self._pool(batch, selection, 1 / len(parts))
        self._ledger.add(step, *(selection for _, selection in parts))

    def _pool(self, batch: Mapping[str, Any], selection: Selection, share: float) -> None:
        size, kept = num_examples(selection.pool), num_examples(batch)
        found = metrics.of_selection(selection) | {metrics.LR_MULTIPLIER: selection.lr_multiplier}
        for kind, keys in self._kinds.items():
            found[metrics.kept_share(kind)] = sum(key in keys for key in batch["key"]) / kept
        self._means.add(found, share)
        self._counts["seen"] += kept
        if "tokens" in batch:
            self._counts["tokens"] += batch["tokens"].numel()
        if selection.losses is not None:
            self._counts["scored"] += size
        self._select_s += selection.seconds
        for decision in selection.decisions:
            self._decisions.add(decision)

    def flush(self, step: int, lr: float, wall_s: float, evaluation: Mapping[str, float]) -> None:
        """Send the means since the last flush, and an evaluation, to the tracker; write the ledger.

        Args:
            step: optimizer steps done.
            lr: the learning rate of the last one.
            wall_s: seconds of training so far: data, selection and updates.
            evaluation: metrics by name, as "test/accuracy".
        """
        counts, found = self._counts, self._means.pop()
        if num_steps := counts["steps"]:
            found |= {
                metrics.LEARNING_RATE: lr,
                metrics.SAMPLES_SEEN: counts["seen"],
                metrics.SAMPLES_SCORED: counts["scored"],
                **({metrics.TOKENS_SEEN: counts["tokens"]} if counts["tokens"] else {}),
                metrics.SELECT_S: self._select_s,
                metrics.STEP_S: (wall_s - self._wall_s_before) / num_steps,
            }
        found |= self._decisions.measured
        self._tracker.log(step, found | {metrics.WALL_S: wall_s} | dict(evaluation))
        counts["steps"], self._wall_s_before = 0, wall_s
        self._text = found | dict(evaluation)
        self._ledger.flush()

    def state_dict(self) -> dict[str, Any]:
        """What the next lines depend on, and how long the ledger is."""
        return {
            **self._means.state_dict(),
            "counts": dict(self._counts),
            "select_s": self._select_s,
            "wall_s_before": self._wall_s_before,
            "ledger": self._ledger.state_dict(),
            "decisions": self._decisions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on after `state_dict`, taken at `step`; later rows of the ledger are removed."""
        steps = state["counts"]["steps"]  # the weights in checkpoints that do not have them
        self._means.load_state_dict({"weights": dict.fromkeys(state["sums"], steps)} | dict(state))
        self._counts = Counter(state["counts"])
        self._select_s, self._wall_s_before = state["select_s"], state["wall_s_before"]
        self._ledger.load_state_dict(state["ledger"], step)
        self._decisions.load_state_dict(state["decisions"])

    def summary(self) -> str:
        """The last flush in a few words, for a progress line."""
        shown = {
            "loss": metrics.TRAIN_LOSS,
            "accuracy": metrics.TEST_ACCURACY,
            "altered": metrics.kept_share("altered"),
        }
        parts = [f"{k} {self._text[name]:.3f}" for k, name in shown.items() if name in self._text]
        return "  ".join(parts)


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
        write_text(self._path, json.dumps(line) + "\n", "a")
        for name, metric in metrics.CONTROLLED.items():
            if (value := measures.get(name)) is not None:
                self.measured[metric] = value

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
