"""What a run reports while it trains: metrics.jsonl, decisions.jsonl, summary.json; its clock.

metrics.jsonl is the source of truth; W&B and TensorBoard are sinks of it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from selectflow.control.rules import Decision
from selectflow.control.shares import moved_most
from selectflow.core.batches import num_examples
from selectflow.core.files import atomic_file, size_on_disk
from selectflow.distributed import ALONE, Group
from selectflow.run import metrics, tensorboard, wandb
from selectflow.run.ledger import Ledger
from selectflow.run.sinks import Sinks
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


class Tracker:
    """The metrics of a run, kept in its directory and copied to W&B and TensorBoard.

    When one of these fails, it is switched off with one warning and the run goes on. An error in
    writing our own files always raises.

    Args:
        run_dir: directory of the run; made if it does not exist.
        config: the resolved configuration in plain values.
        name: name of the run in W&B.
        mode, project, group, job_type, tags: as the fields of `TrackConfig`, None for null; they
            name the run at W&B, which goes offline where it cannot be reached.
        run_id: id of an earlier W&B run that this one continues; None starts a new one.
        timeout_s: seconds that W&B may take to start, and again to upload the rest at the end.
        with_tensorboard: whether events for TensorBoard are written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        name: str,
        mode: wandb.Mode | None = None,
        project: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
        timeout_s: float = 30.0,
        with_tensorboard: bool = False,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir, self._metrics = run_dir, run_dir / "metrics.jsonl"
        self._last: dict[str, Any] = {}
        self._resumed_at: list[int] = []  # steps of the last evaluation before each resumption
        self.run_id: str | None = None
        _cut_torn_line(self._metrics)
        self._sinks = Sinks(self._metrics)
        if (used := wandb.mode_of(mode)) != "disabled":
            options = {
                "dir": str(run_dir), "config": dict(config), "name": name, "project": project,
                "group": group, "job_type": job_type, "tags": list(tags) or None, "id": run_id,
            }  # fmt: skip
            if run := wandb.start(options, used, timeout_s):
                self._sinks.add(wandb, run)
                self.run_id = run.id
        if with_tensorboard:
            self._sinks.add(tensorboard, tensorboard.Writer(run_dir))

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl, then send it to the sinks.

        Args:
            step: optimizer steps done.
            values: by metric name; one that is not finite is written as "NaN", "Infinity" or
                "-Infinity", unlike one that was not measured.

        Raises:
            OSError: the line cannot be written; it names the file.
            TypeError: a value is not a number.
        """
        found = {name: metrics.number(name, value) for name, value in values.items()}
        line: dict[str, float | int] = {metrics.STEP: step} | found
        _append_line(self._metrics, metrics.to_json(line))
        self._last |= line
        self._sinks.send(lambda sink, run: sink.log(run, line))

    def state_dict(self) -> dict[str, Any]:
        """The W&B run and how long metrics.jsonl is, all of it on the disk."""
        return {
            "run_id": self.run_id,
            "metrics_bytes": size_on_disk(self._metrics),
            "last": dict(self._last),
            "resumed_at": list(self._resumed_at),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`; later lines of metrics.jsonl are cut off."""
        os.truncate(self._metrics, state["metrics_bytes"])
        self._last = metrics.from_json(state["last"])
        self._resumed_at = [*state.get("resumed_at", ()), self._last.get(metrics.STEP, 0)]

    def show(
        self, samples: Callable[[], Sequence[Mapping[str, Any]]], name: str = "samples"
    ) -> None:
        """Send samples to the sinks, as pictures or text; without one, `samples` is not called.

        Args:
            samples: call for rows of equal keys: plain values, and maybe under "png" a picture.
            name: what they are logged under.
        """
        once = cache(samples)
        self._sinks.send(lambda sink, run: sink.show(run, once(), name))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and close the sinks; W&B takes along what was selected.

        Args:
            summary: what to add to the last logged value of each metric, as "status" and "steps".

        Raises:
            OSError: the file cannot be written; it names the file.
        """
        values = self._last | dict(summary)
        if self._resumed_at:
            values["resumed_at"] = self._resumed_at
        with atomic_file(self._run_dir / "summary.json") as file:
            text = json.dumps(metrics.to_json(values), indent=2, allow_nan=False)
            file.write(f"{text}\n".encode())
        self._sinks.send(lambda sink, run: sink.finish(run, values, self._run_dir))
        self._sinks.open.clear()


class DecisionLog:
    """Appends the controller's decisions to `decisions.jsonl`.

    A line is `{"step", "what", "before", "after", "reason", "measures"}`, its numbers as in
    metrics.jsonl.

    Args:
        run_dir: directory of the run.

    Attributes:
        measured: metric -> its last value.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / DECISIONS
        self.measured: dict[str, float] = {}

    def add(self, decision: Decision) -> None:
        """Write one decision.

        Raises:
            OSError: it cannot be written; names the file.
        """
        measures = {name: metrics.number(name, x) for name, x in decision.measures.items()}
        line = {"step": decision.step} | vars(decision) | {"measures": metrics.to_json(measures)}
        _append_line(self._path, metrics.to_json(line))
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
            measures = metrics.from_json(values["measures"])
            yield Decision(**metrics.from_json(values) | {"measures": measures})


class RunLog:
    """Collects what each step did, and hands means over a stretch of steps to the tracker.

    Every pool and batch of a run is a mapping with a list "key" of sample ids. Of several processes
    the first one logs, what all of them did.

    Args:
        ledger: takes what was kept.
        decisions: takes what the controller decided; None: another process logs.
        tracker: takes the metrics; None: another process logs.
        kinds: ids of samples by what they are, to report which share of the kept they make up.
        upfront_s: seconds of selection before the first step.
        group: the processes that log together.
    """

    def __init__(
        self,
        ledger: Ledger,
        decisions: DecisionLog | None,
        tracker: Tracker | None,
        kinds: Mapping[str, frozenset[str]],
        upfront_s: float = 0.0,
        group: Group = ALONE,
    ) -> None:
        self._ledger, self._decisions, self._tracker = ledger, decisions, tracker
        self._kinds, self._group = kinds, group
        self._means = metrics.Means()  # since the last flush
        self._counts = Counter[str]()  # steps since then; samples and tokens since the start
        self._select_s = self._wall_s_before = upfront_s
        self._last: dict[str, float] = {}
        self._shares: dict[str, float] = {}  # at the last flush

    def step(
        self,
        step: int,
        parts: Sequence[tuple[Mapping[str, Any], Selection]],
        loss: float,
        mixed: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one optimizer step.

        Args:
            step: its number, from 1.
            parts: what was trained on, and the selection it comes from, for each of its pools.
            loss: mean over all of it.
            mixed: target examples that were trained on, too; they are no candidates, and not in
                the ledger.
        """
        self._means.add({metrics.TRAIN_LOSS: loss})
        self._counts["steps"] += 1
        for batch, selection in parts:
            self._pool(batch, selection, 1 / len(parts))
        if mixed is not None:
            self._counts["target"] += self._seen(mixed)
        self._ledger.add(step, *(selection for _, selection in parts))

    def _pool(self, batch: Mapping[str, Any], selection: Selection, share: float) -> None:
        kept = num_examples(batch)
        found = metrics.of_selection(selection) | {metrics.LR_MULTIPLIER: selection.lr_multiplier}
        weighing = selection.weighing
        weights = [1.0] * kept if weighing is None else weighing.values.tolist()
        for kind, keys in self._kinds.items():
            of_kind = (w for key, w in zip(batch["key"], weights, strict=True) if key in keys)
            found[metrics.kept_share(kind)] = sum(of_kind) / kept
        # of the best of all pools, some processes had more than others
        if self._group.size > 1 and metrics.SCORE_MEAN in found:
            score = {metrics.SCORE_MEAN: found.pop(metrics.SCORE_MEAN)}
            self._means.add(score, share * len(selection.indices))
        self._means.add(found, share)
        for name, part, num in metrics.kept_by_source(selection):
            self._means.add({metrics.SOURCE_KEPT + name: part}, num)
        self._seen(batch)
        if selection.losses is not None:
            self._counts["scored"] += num_examples(selection.pool)
        self._select_s += selection.seconds
        if self._decisions is not None:  # they are the same in all processes
            for decision in selection.decisions:
                self._decisions.add(decision)

    def _seen(self, batch: Mapping[str, Any]) -> int:
        """Count a batch that was trained on; its examples."""
        self._counts["seen"] += (num := num_examples(batch))
        if "tokens" in batch:
            self._counts["tokens"] += batch["tokens"].numel()
        return num

    def flush(
        self,
        step: int,
        lr: float,
        wall_s: float,
        evaluation: Mapping[str, float],
        shares: Mapping[str, float] | None = None,
    ) -> None:
        """Send the means since the last flush, and an evaluation, to the tracker; write the ledger.

        Args:
            wall_s: seconds of training so far: data, selection and updates.
            evaluation: metrics by name, as "test/accuracy".
            shares: of the sources of the pools, where they have any.
        """
        told = self._group.gather((self._means.state_dict(), dict(self._counts), self._select_s))
        self._means.pop()
        found = metrics.Means.over(means for means, _, _ in told).pop()
        counts = sum((Counter(own) for _, own, _ in told), Counter[str]())
        if num_steps := self._counts["steps"]:
            found |= {
                metrics.LEARNING_RATE: lr,
                metrics.SAMPLES_SEEN: counts["seen"],
                metrics.SAMPLES_SCORED: counts["scored"],
                **{
                    name: counts[kind]
                    for name, kind in (
                        (metrics.TARGET_SAMPLES_SEEN, "target"),
                        (metrics.TOKENS_SEEN, "tokens"),
                    )
                    if counts[kind]
                },
                metrics.SELECT_S: sum(seconds for _, _, seconds in told) / len(told),
                metrics.STEP_S: (wall_s - self._wall_s_before) / num_steps,
            }
        if shares:
            kept = {name: found.get(metrics.SOURCE_KEPT + name) for name in shares}
            if self._decisions and (moved := moved_most(self._shares, shares, kept, step)):
                self._decisions.add(moved)
            self._shares = dict(shares)
            found |= metrics.of_shares(shares)
        measured = self._decisions.measured if self._decisions else {}
        found |= measured | {metrics.WALL_S: wall_s} | dict(evaluation)
        if self._tracker is not None:
            self._tracker.log(step, found)
        self._counts["steps"], self._wall_s_before, self._last = 0, wall_s, found
        self._ledger.flush()

    def state_dict(self) -> dict[str, Any]:
        """What the next lines depend on, and how long the ledger is."""
        return {
            **self._means.state_dict(),
            "counts": dict(self._counts),
            "select_s": self._select_s,
            "wall_s_before": self._wall_s_before,
            "ledger": self._ledger.state_dict(),
            "decisions": self._decisions and self._decisions.state_dict(),
            "shares": self._shares,
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on after `state_dict`, taken at `step`; later rows of the ledger are removed."""
        steps = state["counts"]["steps"]  # the weights in checkpoints that do not have them
        self._means.load_state_dict({"weights": dict.fromkeys(state["sums"], steps)} | dict(state))
        self._counts = Counter(state["counts"])
        self._select_s, self._wall_s_before = state["select_s"], state["wall_s_before"]
        self._shares = dict(state.get("shares", {}))
        self._ledger.load_state_dict(state["ledger"], step)
        if self._decisions is not None:
            self._decisions.load_state_dict(state["decisions"])

    def summary(self) -> str:
        """The last flush in a few words, for a progress line: the most wanted first."""
        shown = {
            metrics.TRAIN_LOSS: "loss {:.3f}",
            metrics.KEPT_FRACTION: "kept {:.0%}",
            metrics.HORIZON: "H {:.3g}",
            metrics.LEARNING_RATE: "lr {:.2g}",
            metrics.TEST_ACCURACY: "accuracy {:.3f}",
            metrics.kept_share("altered"): "altered {:.3f}",
        }
        return "  ".join(
            text.format(self._last[name]) for name, text in shown.items() if name in self._last
        )


def log_state_of(states: Sequence[Mapping[str, Any]], rank: int) -> dict[str, Any]:
    """The state of the `RunLog` of one process, from those of another number of processes.

    Args:
        states: of all processes that there were, by rank.
        rank: of the process that goes on; the first takes over what was counted.
    """
    first, steps = states[0], {"steps": states[0]["counts"]["steps"]}
    taken_over = states if rank == 0 else []
    counts = sum((Counter(state["counts"]) for state in taken_over), Counter[str]())
    return dict(first) | {
        **metrics.Means.over(taken_over).state_dict(),
        "counts": dict(counts) | steps,
        "select_s": sum(state["select_s"] for state in states) / len(states),
        "ledger": None,
    }


def _append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line of JSON; an OSError names the file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, allow_nan=False) + "\n")
    except OSError as error:
        # A full disk is only noticed on closing, and then the error does not say where.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cut_torn_line(path: Path) -> None:
    """Drop a last line without its end, left by a run that was killed while writing it."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
