"""What a run measures while it trains: metrics by step, the selection ledger and the clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from selectflow.core.batches import num_examples
from selectflow.run.decisions import DecisionLog
from selectflow.run.ledger import Ledger
from selectflow.run.tracking import Tracker
from selectflow.strategies import Selection


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
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
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
        self._sums["train/loss"] += loss
        self._counts["steps"] += 1
        for batch, selection in parts:
            self._pool(batch, selection, 1 / len(parts))
        self._ledger.add(step, *(selection for _, selection in parts))

    def _pool(self, batch: Mapping[str, Any], selection: Selection, share: float) -> None:
        size, kept = num_examples(selection.pool), num_examples(batch)
        score = float(selection.scores[selection.indices].mean())
        self._sums["select/score_mean"] += share * score
        self._sums["select/kept_fraction"] += share * kept / size
        self._sums["select/lr_multiplier"] += share * selection.lr_multiplier
        if selection.horizon is not None:
            self._sums["select/horizon"] += share * selection.horizon
        for kind, keys in self._kinds.items():
            found = sum(key in keys for key in batch["key"])
            self._sums[f"select/kept_{kind}"] += share * found / kept
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
        num_steps = self._counts["steps"]  # since the last flush
        metrics = {name: total / num_steps for name, total in self._sums.items()}
        if num_steps:
            metrics |= {
                "train/lr": lr,
                "data/samples_seen": self._counts["seen"],
                "data/samples_scored": self._counts["scored"],
                **({"data/tokens_seen": self._counts["tokens"]} if self._counts["tokens"] else {}),
                "perf/select_s": self._select_s,
                "perf/step_s": (wall_s - self._wall_s_before) / num_steps,
            }
        metrics |= self._decisions.measured
        self._tracker.log(step, metrics | {"perf/wall_s": wall_s} | dict(evaluation))
        self._sums.clear()
        self._counts["steps"], self._wall_s_before = 0, wall_s
        self._text = metrics | dict(evaluation)
        self._ledger.flush()

    def state_dict(self) -> dict[str, Any]:
        """What the next lines depend on, and how long the ledger is."""
        return {
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "select_s": self._select_s,
            "wall_s_before": self._wall_s_before,
            "ledger": self._ledger.state_dict(),
            "decisions": self._decisions.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on after `state_dict`, taken at `step`; later rows of the ledger are removed."""
        self._sums.update(state["sums"])
        self._counts.update(state["counts"])
        self._select_s, self._wall_s_before = state["select_s"], state["wall_s_before"]
        self._ledger.load_state_dict(state["ledger"], step)
        self._decisions.load_state_dict(state["decisions"])

    def summary(self) -> str:
        """The last flush in a few words, for a progress line."""
        shown = {
            "loss": "train/loss",
            "accuracy": "test/accuracy",
            "altered": "select/kept_altered",
        }
        parts = [f"{k} {self._text[name]:.3f}" for k, name in shown.items() if name in self._text]
        return "  ".join(parts)
