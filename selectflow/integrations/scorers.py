"""A scorer beside the model of somebody else's Trainer: on its device, and in its processes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from selectflow.core.batches import Batch, take
from selectflow.core.passes import Objective
from selectflow.core.wrappers import unadapted
from selectflow.distributed import Layout
from selectflow.integrations.task_losses import TaskLosses
from selectflow.strategies.scorer import Scorer


def placed(scorer: Scorer, device: torch.device, num_processes: int) -> Scorer:
    """The scorer with its model on a device; of several processes, joined by DDP.

    A model that is wrapped already stays as it is. Its parameters remain the same objects, which
    its optimizer holds.

    Args:
        scorer: as the user gave it.
        device: of the training.
        num_processes: that train together, in torch's default group.

    Raises:
        TypeError: it is no `Scorer`.
    """
    if not isinstance(scorer, Scorer):
        raise TypeError(
            f"scorer must be a selectflow.Scorer, got {type(scorer).__name__}; give "
            "Scorer(model, optimizer)"
        )
    model, layout = scorer.model.to(device), Layout.of(scorer.model)
    if num_processes > 1 and layout.group.size == 1 and not layout.is_sharded:
        model = nn.parallel.DistributedDataParallel(model)
    return replace(scorer, model=model)


def check_takes(scorer: Scorer, task: TaskLosses, pool: Batch) -> None:
    """See that a task's losses take the scorer's model, on one example of a pool.

    Raises:
        ValueError: they do not.
    """
    batch = take(pool, torch.tensor([0]))
    objective = Objective(scorer.model, task, scorer.autocast)
    with objective.scoring(), torch.no_grad():
        try:
            task(objective.module, batch if scorer.view is None else scorer.view(batch))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"the default loss, that of {task.task}, must take the scorer and the batches of "
                f"training, got {type(unadapted(objective.model)).__name__}, and "
                f"{type(error).__name__}: {error}; pass Scorer(loss_fn=...), or a view= that "
                "makes what it reads"
            ) from error
