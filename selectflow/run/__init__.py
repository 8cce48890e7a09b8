"""A configuration becomes a run directory."""

from selectflow.run.loop import RunError, train
from selectflow.run.task import Task

__all__ = ["RunError", "Task", "train"]
