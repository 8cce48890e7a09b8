"""Checkpoints of several processes: a folder in which each has written its part.

`step-<n>/` holds `state/`, model and optimizer by torch.distributed.checkpoint; `rank-<r>.pt`, what
else that process needs to continue; and `files.json`. The folder gets its name when
all parts are on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from selectflow.core.files import atomic_file
from selectflow.distributed import Group
from selectflow.run.log import log_state_of
from selectflow.run.spread import Parallel, load_state, load_whole_state, save_state
from selectflow.run.task import RunError

_FILES = "files.json"


def save_together(
    folder: Path, own: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, group: Group
) -> None:
    """Write a checkpoint, each process its part.

    Args:
        folder: its name; an earlier one of that name is replaced.
        own: what this process's part holds besides the model and the optimizer.

    Raises:
        OSError: a part cannot be written; in all processes.
    """
    beside = folder.with_suffix(".tmp")
    group.on_first(lambda: _renew(beside))
    save_state(beside / "state", model, optimizer)
    with group.together(OSError):
        write_state(beside / f"rank-{group.rank:05d}.pt", own)
    group.on_first(lambda: _complete(beside, folder, group.size))


def _renew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill
    folder.mkdir(parents=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state, whole and on the disk before it has its name; an OSError names the file."""
    try:
        with atomic_file(path, durable=True) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise OSError(f"checkpoint {path} cannot be written: {_cause(error)}") from error


def _cause(error: BaseException) -> BaseException:
    """The error of the disk behind one of torch's writer, which speaks of positions."""
    behind = error.__cause__ or error.__context__
    if isinstance(error, OSError) or behind is None:
        return error
    return _cause(behind)


def _complete(beside: Path, folder: Path, size: int) -> None:
    listed = {"processes": size, "bytes": _sizes(beside)}
    with atomic_file(beside / _FILES, durable=True) as file:
        file.write((json.dumps(listed, indent=2) + "\n").encode())
    shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
    os.replace(beside, folder)


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _FILES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def num_processes_of(folder: Path) -> int:
    """How many processes have written a checkpoint.

    Raises:
        ValueError: a file is missing, or of another length.
    """
    listed = json.loads((folder / _FILES).read_text("utf-8"))
    found = _sizes(folder)
    for name, size in listed["bytes"].items():
        if found.get(name) != size:
            raise ValueError(f"{name} must have {size} bytes, got {found.get(name)}")
    return int(listed["processes"])


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint to go on from.

    Attributes:
        path: its file or folder.
        state: of `read_checkpoint`.
    """

    path: Path
    state: Mapping[str, Any]

    @property
    def is_of_one(self) -> bool:
        """Whether one process has written it, whole."""
        return self.path.suffix == ".pt"

    @property
    def num_processes(self) -> int:
        """How many processes have written it."""
        return 1 if self.is_of_one else int(self.state["processes"])

    def part(self, rank: int) -> dict[str, Any]:
        """What the process of a rank has written besides the model and the optimizer."""
        if self.is_of_one:
            return dict(self.state)
        path = self.path / f"rank-{rank:05d}.pt"
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


def load_together(saved: Saved, model: nn.Module, optimizer: Optimizer) -> None:
    """Load model and optimizer of a checkpoint of any number of processes into any other."""
    if saved.is_of_one:
        load_whole_state(saved.state, model, optimizer)
    else:
        load_state(saved.path / "state", model, optimizer)


def own_state(saved: Saved, group: Group, parallel: Parallel | None) -> dict[str, Any]:
    """What this process goes on with, besides the model and the optimizer.

    Returns:
        What this rank saved. Where there were others, a state of all of theirs: at the same
        position of the data, without generators, and without a selector where that held shards.

    Raises:
        RunError: the pools of these processes cannot be split anew, or a scorer would be lost,
            whose weights are in the state of the selector.

    Warns:
        UserWarning: there were other processes; says what does not go on.
    """
    if saved.num_processes == group.size:
        own = saved.part(group.rank)
        if own.get("parallel") == parallel:
            return own
    parts = [saved.part(rank) for rank in range(saved.num_processes)]
    before = parts[0].get("parallel")
    is_whole = "fsdp2" not in (before, parallel)
    if not is_whole and (parts[0]["selector"] or {}).get("scorer") is not None:
        raise RunError(
            f"a run with a scorer and shards must be resumed as it was saved, in {len(parts)} "
            f"processes ({before or 'alone'}), got {group.size} ({parallel or 'alone'}), in which "
            "the scorer would begin anew; resume it so, or set parallel=ddp from the start"
        )
    if group.rank == 0:
        what = "random generators" if is_whole else "random generators and the selector (its "
        what += "" if is_whole else "look-ahead, and what it has found out under auto)"
        warnings.warn(
            f"resumed in {group.size} processes ({parallel or 'alone'}) what {len(parts)} "
            f"({before or 'alone'}) have saved: model, optimizer and position in the data go on, "
            f"{what} begin anew",
            stacklevel=4,
        )
    first = parts[0]
    return first | {
        "pools": _joined_pools([part["pools"] for part in parts]),
        "log": log_state_of([part["log"] for part in parts], group.rank),
        "selector": first["selector"] if is_whole else None,
        "generators": None,
    }


def _joined_pools(states: Sequence[Any]) -> Any:
    """The position in a stream that several processes have shared, and the errors of all."""
    if not all(isinstance(state, Mapping) and "drawn" in state for state in states):
        raise RunError(
            "pools must be of PoolStream to be split between another number of processes, got "
            "others; resume in as many processes as before"
        )
    errors = {row: shard for state in states for row, shard in state["errors"].items()}
    return states[0] | {"errors": errors}
