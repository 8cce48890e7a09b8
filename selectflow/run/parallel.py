"""What each of several processes of a run has of its data, and evaluation over all of them."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from selectflow.core.batches import Batch, num_examples, take
from selectflow.distributed import Group
from selectflow.run.config import RunConfig
from selectflow.run.spread import Parallel
from selectflow.run.task import RunError, Task

_log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module, Sequence[Batch]], dict[str, float]]


def parallel_of(config: RunConfig, group: Group) -> Parallel | None:
    """How the model is laid out over the processes; None: there is one."""
    if group.size == 1:
        return None
    return "ddp" if config.parallel == "auto" else config.parallel


def check_same(what: str, values: Mapping[str, Any], group: Group) -> None:
    """Refuse, in all processes, what differs between them.

    Raises:
        RunError: names a value that differs, and where.
    """
    try:
        group.check_same(what, values)
    except ValueError as error:
        raise RunError(f"{error}; start all with the same") from error


def check_parallel(config: RunConfig, task: Task, group: Group) -> None:
    """Refuse what several processes cannot do; all of them call it.

    Raises:
        RunError: their tasks differ; an epoch has no pool for each of them; compiled shards;
            early stopping of shards.
    """
    if group.size == 1:
        return
    shapes = {name: tuple(param.shape) for name, param in task.model.named_parameters()}
    check_same("parameters of the model", shapes, group)
    for split, batches in (("target", task.target), ("test", task.test)):
        check_same(f"{split} batches", {"sizes": [num_examples(each) for each in batches]}, group)
    samples, pool = getattr(task.pools, "num_samples", None), config.data.pool
    if samples is not None and samples < pool * group.size:
        raise RunError(
            f"the training split must have at least a pool for each of {group.size} processes, "
            f"{group.size} x {pool} samples, got {samples}; lower data.pool, or start fewer "
            "processes"
        )
    if config.patience and parallel_of(config, group) == "fsdp2":
        raise RunError(
            "patience must be null with parallel fsdp2, whose weights are sharded, got "
            f"{config.patience}; use parallel=ddp, or stop at max_wall_s or steps"
        )
    if config.train.compile and parallel_of(config, group) == "fsdp2":
        raise RunError(
            "train.compile must be false with parallel fsdp2, got true; use parallel=ddp, or do "
            "without"
        )


def evaluation_share(batches: Sequence[Batch], group: Group) -> list[tuple[Batch, int]]:
    """The part of each batch that this process has, and how many examples it stands for.

    Each process has a part of each batch, since those of a sharded model take their passes
    together: where it has none, one example that counts nothing.
    """
    if group.size == 1:
        return [(batch, 1) for batch in batches]
    found = []
    for batch in batches:
        size = num_examples(batch)
        start, end = (size * rank // group.size for rank in (group.rank, group.rank + 1))
        rows = slice(start, end) if start < end else slice(1)
        found.append((take(batch, rows), end - start))
    return found


def target_share(
    parts: Sequence[tuple[Batch, int]], batches: Sequence[Batch], group: Group
) -> list[Batch]:
    """The part of each target batch that this process scores by, equally large in all processes.

    So each example has the same weight in the mean over processes. If a batch cannot be split
    evenly, fewer examples than there are processes are left out, with a warning.

    Args:
        parts: of `evaluation_share`.
        batches: the whole of which they are parts.

    Raises:
        RunError: all batches have fewer examples than there are processes.
    """
    if group.size == 1:
        return [batch for batch, _ in parts]
    sizes = [num_examples(batch) for batch in batches]
    if max(sizes, default=0) < group.size:
        raise RunError(
            f"a target batch must have an example for each of {group.size} processes, got at most "
            f"{max(sizes, default=0)}; add examples, raise data.target_batch, or start fewer "
            "processes"
        )
    if (rest := sum(size % group.size for size in sizes)) and group.rank == 0:
        _log.warning(
            "%d of %d target examples are not scored by, so that each of %d processes has as many",
            rest, sum(sizes), group.size,
        )  # fmt: skip
    pairs = zip(parts, sizes, strict=True)
    return [
        take(part, slice(size // group.size)) for (part, _), size in pairs if size >= group.size
    ]


def evaluate(
    evaluate_part: Evaluate, model: nn.Module, parts: Sequence[tuple[Batch, int]], group: Group
) -> dict[str, float]:
    """Means over all examples of all processes: sums over each one's, divided by all of them.

    Args:
        parts: of `evaluation_share`.
    """
    if group.size == 1:
        return evaluate_part(model, [batch for batch, _ in parts])
    sums: dict[str, float] = {}
    for batch, num in parts:
        for name, mean in evaluate_part(model, [batch]).items():
            sums[name] = sums.get(name, 0.0) + (num * mean if num else 0.0)
    names = sorted(sums)
    rows = group.numbers([*(sums[name] for name in names), sum(num for _, num in parts)])
    *totals, num_all = rows.sum(0).tolist()
    return {name: total / num_all for name, total in zip(names, totals, strict=True)}


def mean_over(group: Group, value: float) -> float:
    """Mean of a number of each process."""
    return value if group.size == 1 else float(group.numbers([value]).mean())


def agreed(group: Group, stopped_by: str | None, wall_s: float) -> tuple[str | None, float]:
    """By which signal a process was asked to stop, if one was, and the clock of rank 0.

    They are the same in all processes, which then stop after the same step.
    """
    if group.size == 1:
        return stopped_by, wall_s
    number = signal.Signals[stopped_by].value if stopped_by else 0
    rows = group.numbers([number, wall_s])
    number = int(rows[:, 0].max())
    return signal.Signals(number).name if number else None, float(rows[0, 1])
