"""Runs of one task by strategy, and the notes that a reader of their comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from selectflow.report.runs import ReportError, Run, broken_at, series
from selectflow.run.metrics import DIVERGED_AT
from selectflow.run.yaml import flat

# Runs whose data or model differ are of different tasks; how data are read and stored may differ.
_TASK = ("data.", "model.", "target.")
_SAME_TASK = (
    "data.root", "data.seed", "data.pool", "data.num_workers", "data.buffer", "data.memory_gib",
    "data.max_errors", "data.target_batch",
)  # fmt: skip
# Runs of one group may differ in their seeds and in options that do not change the result.
_FREE = (
    "name", "root", "seed", "overwrite", "resume", "device", "num_threads", "max_wall_s",
    "eval_every", "checkpoint_every", "keep_checkpoints", "data.root", "data.seed",
    "data.num_workers", "data.memory_gib", "data.max_errors", "select.replay",
)  # fmt: skip
_LOOK_AHEAD = (
    "horizon", "horizon_schedule", "interval", "derivative", "curvature", "nominal",
    "memory_gib", "record_steps", "record_lr", "keep_samples",
)  # fmt: skip
_INFINITE = (math.inf, "Infinity", "inf", ".inf")  # as YAML and as W&B return it

_ENDED = ("finished", "diverged")
_STATES = {"running": "still running", "stopped": "stopped by a signal"}

Groups = dict[str, list[Run]]


def strategy(run: Run) -> str:
    """uniform, loss, offline, adaptive, online, replay, or the name of a custom strategy."""
    return _strategy(run.config.get("select", {}))


def _strategy(select: Mapping[str, Any]) -> str:
    name, horizon = str(select.get("strategy")), select.get("horizon")
    if select.get("replay"):
        return "replay"
    if name != "influence":
        return name
    return "offline" if horizon in _INFINITE else "adaptive" if horizon == "auto" else "online"


def label(run: Run) -> str:
    """The strategy of a run; online with horizon H and interval K, a replay with its source."""
    if strategy(run) == "replay" and run.replayed:
        return f"replay of {_label(run.replayed.get('select', {}))}"
    return _label(run.config.get("select", {}))


def _label(select: Mapping[str, Any]) -> str:
    name = _strategy(select)
    if name != "online":
        return name
    shape = select.get("horizon_schedule", {}).get("name", "constant")
    changing = "" if shape == "constant" else f" ({shape})"
    return f"{name} H={select.get('horizon')}{changing} K={select.get('interval')}"


def groups(runs: Sequence[Run]) -> Groups:
    """Runs that differ in their seeds only, by label in order of appearance.

    Where runs of one label differ in an option, the option is part of the label.

    Raises:
        ReportError: the runs are of different tasks, or two of one group have the same seed.
    """
    _check_task(runs)
    configs = [dict(flat(run.config)) for run in runs]
    found: Groups = {}
    for run, mine in zip(runs, configs, strict=True):
        same = [c for other, c in zip(runs, configs, strict=True) if label(other) == label(run)]
        extra = [
            f"{key.removeprefix('optimizer.').removeprefix('select.')}={mine.get(key)}"
            for key in sorted(set().union(*same))
            if _divides(key, run) and any(config.get(key) != mine.get(key) for config in same)
        ]
        members = found.setdefault(name := " ".join([label(run), *extra]), [])
        if twin := next((other for other in members if other.seed == run.seed), None):
            raise ReportError(
                f"runs of one group must differ in their seeds, got seed {run.seed[0]} twice in "
                f"{name!r}: {twin.where} and {run.where}; leave one out"
            )
        members.append(run)
    return found


def task_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The options that make the task, the same for all runs."""
    return {key: value for key, value in flat(runs[0].config) if _is_task(key)}


def _divides(key: str, run: Run) -> bool:
    """Whether runs that differ in an option are of different groups."""
    if key in _FREE or key.startswith("track."):
        return False
    if key == "steps":  # how long it went on, unless the learning rate depends on it
        return bool(run.config.get("schedule", {}).get("name", "constant") != "constant")
    looks_ahead = strategy(run) in ("online", "offline", "adaptive")
    return looks_ahead or key.split(".")[1:2] not in [[name] for name in _LOOK_AHEAD]


def _is_task(key: str) -> bool:
    return key.startswith(_TASK) and key not in _SAME_TASK


def _check_task(runs: Sequence[Run]) -> None:
    for one, two in pairwise(runs):
        first, second = dict(flat(one.config)), dict(flat(two.config))
        for config in (first, second):
            if config.get("data.name") == "shards":  # the directory is the dataset
                config["data.shards"] = str(Path(str(config.get("data.root"))).resolve())
        for key in first.keys() & second.keys():  # an option of a later version is not a difference
            if _is_task(key) and first[key] != second[key]:
                raise ReportError(
                    f"runs must be of one task, got {key} {first[key]!r} in {one.where} and "
                    f"{second[key]!r} in {two.where}; compare them separately"
                )


# --- notes ----------------------------------------------------------------------------------


def finished(runs: Sequence[Run], partial: bool) -> tuple[list[Run], list[Run], list[str]]:
    """The runs to compare, the runs left out, and notes on both.

    Runs that have not finished are compared where `partial`, and where none has finished. One that
    diverged has come to its end: what is left of its group is not all of it.
    """
    # One crashed run would otherwise pull the common last step of all the others down to its own.
    done = [run for run in runs if run.status in _ENDED]
    others = [run for run in runs if run.status not in _ENDED]
    none_finished = all(run.status != "finished" for run in runs)
    if partial or none_finished:
        notes = [f"as far as it got, {_state(run)}" for run in others]
        if others and none_finished:
            notes.insert(0, "no run has finished yet: all are compared as far as they got")
        return list(runs), [], notes
    return done, others, [f"left out, {_state(run)}" for run in others]


def _state(run: Run) -> str:
    state = _STATES.get(run.status, run.status)
    return f"{state} at step {run.last_step} of {run.config.get('steps', '?')}: {run.where}"


def broken(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    """A line for each run that diverged, or of which a metric is not finite at some step."""
    lines = []
    for run in runs:
        if run.status == "diverged":
            at = run.summary[DIVERGED_AT]
            lines.append(f"diverged at step {at}, no values from there on: {run.where}")
            continue
        for metric in dict.fromkeys(metrics):
            steps = [step for step, value in series(run, metric) if math.isnan(value)]
            if steps:
                since, listed = broken_at(run, metric), ", ".join(f"{step:.0f}" for step in steps)
                when = f"at step {listed}" if since is None else f"from step {since:.0f} on"
                lines.append(f"{metric} is not finite {when}: {run.where}")
    return lines


def lengths(found: Groups) -> list[str]:
    """A line for each group whose runs are of different lengths."""
    lines = []
    for name, members in found.items():
        steps = sorted({run.last_step for run in members if run.status != "diverged"})
        if len(steps) > 1:
            lines.append(
                f"runs of {name} are of different lengths, {steps[0]} to {steps[-1]} steps: the "
                "end of each is its own, lines are drawn as far as all of them go"
            )
    return lines


def resumed(runs: Sequence[Run]) -> list[str]:
    """A line for each run that was resumed: its seconds are those of the steps it kept."""
    return [
        f"resumed at step {', '.join(map(str, at))}: {run.where}; its clock goes on from the "
        "checkpoint, what was lost after it is not counted"
        for run in runs
        if (at := run.summary.get("resumed_at"))
    ]


def differences(found: Groups) -> list[str]:
    """Options outside the selection that are not the same for all groups, a line for each."""
    firsts = {name: dict(flat(members[0].config)) for name, members in found.items()}
    lines = []
    for key in sorted(set().union(*firsts.values())):
        if key in _FREE or (key.startswith(("select.", "track.")) and key != "select.keep"):
            continue
        names: dict[str, list[str]] = {}
        for name, config in firsts.items():
            if key in config:
                names.setdefault(str(config[key]), []).append(name)
        if len(names) > 1:
            values = "; ".join(f"{value} in {', '.join(of)}" for value, of in names.items())
            lines.append(f"groups differ in {key}: {values}")
    return lines
