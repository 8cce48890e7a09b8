"""Training a model and keeping what a replay needs; opening such a recording again.

`record` really trains, with the user's optimizer and scheduler. Recording and replay both run in
scoring mode: dropout off, batch norm on running statistics that do not move. The recorded run is
therefore the deterministic twin of the user's training.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from selectflow.core.batches import Batch
from selectflow.core.chunks import ChunkSize
from selectflow.core.derivatives import Derivatives
from selectflow.core.passes import LossFn, Objective, check_finite
from selectflow.core.storage import plain_update, restored_update, write_whole
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.update import Update
from selectflow.offline.trajectory import Snapshots, Trajectory

FORMAT = 1  # raise it when replaying would give other states than the version that recorded


def record(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    batches: Iterable[Batch],
    lr_scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    *,
    spacing: int = 1,
    limit_gib: float | None = None,
    folder: str | Path | None = None,
    chunk_size: ChunkSize = None,
) -> Trajectory:
    """Train on `batches`, one optimizer step each, and keep what a replay needs.

    Model and optimizer are trained as in the user's own loop, but in scoring mode: dropout off,
    batch norm on running statistics. An optimizer that has already taken steps goes on from them.

    Args:
        model: the module to train.
        optimizer: its `torch.optim.AdamW`, `Adam` or `SGD`.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        batches: the training batches, in order; all are kept, by reference.
        lr_scheduler: stepped once after every optimizer step.
        max_grad_norm: gradients are clipped to this norm; None: not at all.
        spacing: updates between two snapshots; doubles when `limit_gib` is reached.
        limit_gib: size that all snapshots together may reach, in GiB; None: 1, or two states of
            the model.
        folder: where snapshots are written, so that `reopen` finds the recording again; None:
            they are kept in memory.
        chunk_size: examples per pass of later replays and derivatives; None: all at once.

    Returns:
        The trajectory; `snapshots.gib` is the size it has.

    Raises:
        TypeError: the optimizer or scheduler cannot be modelled.
        ValueError: no batches; losses of a wrong shape; a model of several processes; a
            folder that holds a recording; a limit below two states.
        FloatingPointError: a loss is not finite; names the step and the examples.
        OSError: a snapshot could not be written; names the file.
        RuntimeError: a replay of the first stretch does not arrive at its snapshot.
    """
    objective = Objective(model, loss_fn)
    if objective.layout.group.size > 1:
        raise ValueError(
            f"a run is recorded in one process, got a model spread over "
            f"{objective.layout.group.size}; record in one, and train in several on what it chose"
        )
    reader = OptimizerReader(objective.model, optimizer, lr_scheduler, max_grad_norm)
    snapshots = Snapshots(limit_gib, spacing, _empty(folder), objective.model)
    first_step, began = reader.num_steps(), time.perf_counter()
    kept: list[Batch] = []
    updates: list[Update] = []
    losses: list[float] = []
    with objective.scoring():
        for index, batch in enumerate(batches):
            snapshots.offer(index, reader.state())
            updates += reader.updates(1)
            losses.append(_backward(objective, optimizer, reader, batch, first_step + index))
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(reader.params().values(), max_grad_norm)
            optimizer.step()
            if lr_scheduler is not None:
                lr_scheduler.step()
            kept.append(batch)
        optimizer.zero_grad()
        if not kept:
            raise ValueError("batches must yield at least one batch, got none")
        snapshots.keep(len(kept), reader.state())
        trajectory = Trajectory(
            Derivatives(objective, "exact", chunk_size),
            kept,
            updates,
            snapshots,
            first_step,
            losses,
            time.perf_counter() - began,
        )
        start, end = snapshots.indices[:2]
        state = snapshots.state(start)
        trajectory.check_replay(end, trajectory.replay(start, end, state), state)
    if snapshots.folder is not None:
        _write_manifest(trajectory, snapshots.folder)
    return trajectory


def _backward(
    objective: Objective,
    optimizer: Optimizer,
    reader: OptimizerReader,
    batch: Batch,
    step: int,
) -> float:
    """Mean loss of the batch; leaves its gradient where the optimizer reads it."""
    optimizer.zero_grad()
    losses = objective.pure({}, batch)
    try:
        check_finite("losses", losses, batch)
    except FloatingPointError as error:
        raise FloatingPointError(f"at optimizer step {step}: {error}") from error
    loss = losses.mean()
    torch.autograd.backward(loss)
    return loss.item()


# --- recordings on disk ---------------------------------------------------------------------


def reopen(
    folder: str | Path,
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Batch],
    chunk_size: ChunkSize = None,
) -> Trajectory:
    """A recording that was written to `folder`, with the model and batches it was made from.

    Args:
        folder: as given to `record`.
        model: the same architecture; its trained parameters may have any values, frozen ones and
            buffers must be those of the recording.
        loss_fn: the same loss.
        batches: the same batches, in order.
        chunk_size: as for `record`.

    Returns:
        The trajectory; batches that are not the recorded ones show when it is replayed.

    Raises:
        ValueError: the recording is not complete, of another model, or made by other code.
        OSError: a snapshot is missing or not whole.
    """
    folder = Path(folder)
    path = folder / "recording.json"
    if not path.exists():
        raise ValueError(
            f"{folder} must hold a finished recording, got no {path.name}; record again"
        )
    manifest = json.loads(path.read_text())
    objective = Objective(model, loss_fn)
    expected = {"format": FORMAT, "fingerprint": fingerprint(objective.model)}
    for name, value in expected.items():
        if manifest[name] != value:
            whose = "another model" if name == "fingerprint" else "another version of selectflow"
            raise ValueError(
                f"{path} must be a recording of this model by this code, got {name} "
                f"{manifest[name]}, here {value}: it is of {whose}; record again"
            )
    if len(batches) != len(manifest["updates"]):
        raise ValueError(
            f"batches must be the {len(manifest['updates'])} recorded ones, got {len(batches)}"
        )
    snapshots = Snapshots(manifest["limit_gib"], manifest["spacing"], folder, objective.model)
    snapshots.reopen(manifest["snapshots"])
    return Trajectory(
        Derivatives(objective, "exact", chunk_size),
        batches,
        [restored_update(update) for update in manifest["updates"]],
        snapshots,
        manifest["first_step"],
        manifest["losses"],
        manifest["seconds"],
    )


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes, dtypes and frozenness of a model's parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lines = [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _empty(folder: str | Path | None) -> Path | None:
    if folder is None:
        return None
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder must be new or empty, got {folder}; remove it or name another")
    return folder


def _write_manifest(trajectory: Trajectory, folder: Path) -> None:
    """Written last: a folder without it is not a recording."""
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint(trajectory.derivatives.objective.model),
        "first_step": trajectory.first_step,
        "limit_gib": trajectory.snapshots.limit_gib,
        "spacing": trajectory.snapshots.spacing,
        "snapshots": trajectory.snapshots.indices,
        "updates": [plain_update(update) for update in trajectory.updates],
        "losses": list(trajectory.losses),
        "seconds": trajectory.seconds,
    }
    write_whole(folder / "recording.json", json.dumps(manifest).encode())
