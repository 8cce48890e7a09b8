"""What a reader of a comparison must know: runs left out, still going, resumed, of two lengths."""

from __future__ import annotations

from collections.abc import Sequence

from selectflow.report.groups import Groups
from selectflow.report.runs import Run

_STATES = {"running": "still running", "stopped": "stopped by a signal"}


def finished(runs: Sequence[Run], partial: bool) -> tuple[list[Run], list[Run], list[str]]:
    """The runs to compare, those left out, and what to say of it.

    Args:
        runs: all of them.
        partial: compare those that have not finished too. They also are if none has finished.
    """
    # One crashed run would otherwise pull the common last step of all the others down to its own.
    done = [run for run in runs if run.status == "finished"]
    others = [run for run in runs if run.status != "finished"]
    if partial or not done:
        notes = [f"as far as it got, {_state(run)}" for run in others]
        if others and not done:
            notes.insert(0, "no run has finished yet: all are compared as far as they got")
        return list(runs), [], notes
    return done, others, [f"left out, {_state(run)}" for run in others]


def _state(run: Run) -> str:
    state = _STATES.get(run.status, run.status)
    return f"{state} at step {run.last_step} of {run.config.get('steps', '?')}: {run.where}"


def lengths(found: Groups) -> list[str]:
    """Groups whose runs are of different lengths."""
    lines = []
    for name, members in found.items():
        steps = sorted({run.last_step for run in members})
        if len(steps) > 1:
            lines.append(
                f"runs of {name} are of different lengths, {steps[0]} to {steps[-1]} steps: the "
                "end of each is its own, lines are drawn as far as all of them go"
            )
    return lines


def resumed(runs: Sequence[Run]) -> list[str]:
    """Runs that were resumed, and what that means for their seconds."""
    return [
        f"resumed at step {', '.join(map(str, at))}: {run.where}; its clock goes on from the "
        "checkpoint, what was lost after it is not counted"
        for run in runs
        if (at := run.summary.get("resumed_at"))
    ]


def too_short(baseline: str, untimed: Sequence[str]) -> list[str]:
    """Groups that the baseline cannot be compared with in the same time, and the way out."""
    if not untimed:
        return []
    return [
        f"{baseline} was not run with all seeds for as long as {', '.join(untimed)}: give it more "
        "steps to compare in the same time"
    ]
