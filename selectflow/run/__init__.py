"""A configuration becomes a run directory."""

from selectflow.run.loop import train
from selectflow.run.task import RunError, Task

__all__ = ["RunError", "Task", "train"]
