"""A scorer: a small model that scores candidates for the model that trains.

Two passes of every candidate cost more than training on a quarter of them; those of a model of a
tenth of the size need a tenth of the arithmetic. It learns beside the other, from what it chose
itself. How much of the gain is left depends on the task, and is measured (`control.worth`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from selectflow.core.batches import Batch, MicroBatches, to_device
from selectflow.core.passes import LossFn, Objective
from selectflow.core.plain import plain, restored
from selectflow.core.snapshot import Randomness
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weighted import weighted_mean

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scorer:
    """The model that scores, where it is another than the one that trains.

    Sensitivities, look-aheads and scores are then its own; the horizon, `params` and `score_view`
    of the selector are about it. What its choice by influence is worth to the trained model is
    measured now and then.

    Attributes:
        model: the module that scores; in several processes `DistributedDataParallel` of it.
        optimizer: its own, which `Selector` steps on what is kept; None: it is frozen, and
            candidates are scored by products of gradients, at H = 0.
        loss_fn: `loss_fn(model, batch)` -> its per-example losses, shape (N,); None: the trained
            model's.
        view: makes of a batch what this model reads, such as another tokenizer's ids or a lower
            resolution, example by example; None: the batch itself.
        lr_scheduler: of its optimizer, stepped after each of its steps.
        max_grad_norm: what its gradients are clipped to, by norm.
        autocast: low-precision type of its passes, `torch.bfloat16`.
        train: whether the selector steps it. Without, that is yours to do, after each step of the
            other model.

    Raises:
        ValueError: a schedule or clipping without an optimizer; an autocast of float16, in which
            gradients underflow.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    loss_fn: LossFn | None = None
    view: Callable[[Batch], Batch] | None = None
    lr_scheduler: LRScheduler | None = None
    max_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    train: bool = True

    def __post_init__(self) -> None:
        if self.optimizer is None and (self.lr_scheduler or self.max_grad_norm):
            raise ValueError(
                "lr_scheduler and max_grad_norm of a scorer need its optimizer, got None; give it, "
                "or leave them out for a scorer that is frozen"
            )
        if self.autocast not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast of a scorer must be torch.bfloat16 or None, got {self.autocast}"
            )

    @property
    def is_frozen(self) -> bool:
        """Whether it stays as it is."""
        return self.optimizer is None


class LiveScorer:
    """A scorer at work: its passes, its optimizer, and its own training.

    Args:
        scorer: as the user gave it.
        loss_fn: of the trained model.
        trained: the trained model's losses.
        pools_per_update: kept batches that make one step.
        seed: of what is random in its forward pass, such as dropout.

    Attributes:
        objective: its losses.
        optimizer: read by look-aheads.
        loss: mean loss of its last step, over what was kept; None before.

    Raises:
        TypeError, ValueError: as `Selector` does for a model and its optimizer; the scorer is
            sharded, or joined in other processes than the trained model.
    """

    def __init__(
        self,
        scorer: Scorer,
        loss_fn: LossFn,
        trained: Objective,
        pools_per_update: int,
        seed: int,
    ) -> None:
        own = scorer.loss_fn or loss_fn
        view = scorer.view
        self._loss_fn = own if view is None else lambda model, batch: own(model, view(batch))
        self.objective = Objective(scorer.model, self._loss_fn, scorer.autocast)
        joined, layout = self.objective.layout, trained.layout
        if joined.is_sharded or joined.group.size != layout.group.size:
            got = "a sharded one" if joined.is_sharded else f"{joined.group.size}"
            raise ValueError(
                f"the scorer must be whole and joined in as many processes as the model, "
                f"{layout.group.size}, got {got}; give it as DistributedDataParallel makes it"
            )
        self.scorer, self._num_pools, self._seed = scorer, pools_per_update, seed
        model = self.objective.model
        if not {id(p) for p in model.parameters()}.isdisjoint(map(id, trained.model.parameters())):
            raise ValueError(
                "the scorer must have parameters of its own, got some of the trained model; to let "
                "the model score a part of each example, give the selector a score_view instead"
            )
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError(
                "parameters of the scorer must have requires_grad=True, got none: scores are "
                "products of their gradients, also where it is frozen"
            )
        # the order of products of gradients is that of any step of SGD
        optimizer = scorer.optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
        self.optimizer = OptimizerReader(
            model, optimizer, scorer.lr_scheduler, scorer.max_grad_norm
        )
        self._kept: list[Batch] = []  # for its next step
        self._num_steps, self._num_skipped = 0, 0
        self.loss: float | None = None

    def train_on(self, kept: Batch) -> None:
        """Step it, once what was kept makes a step.

        A step whose gradient is not finite is left out, with a warning. The global random
        generators are as before.

        Args:
            kept: batch that the other model trains on, weighted as there.
        """
        if self.scorer.is_frozen or not self.scorer.train:
            return
        self._kept.append(kept)
        if len(self._kept) < self._num_pools:
            return
        parts, self._kept = self._kept, []
        outside = Randomness.now()
        try:
            torch.manual_seed(self._seed + self._num_steps)  # resumed without states to save
            self.loss = self._step(parts)
        finally:
            outside.put_back()

    def _step(self, parts: list[Batch]) -> float:
        scorer, optimizer = self.scorer, self.optimizer.optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        device = params[0].device
        total = torch.zeros((), device=device)
        optimizer.zero_grad()
        with torch.inference_mode(False), torch.enable_grad():
            for part in parts:
                weighs = isinstance(part, MicroBatches)  # a kept batch, and its weights
                batch, weights = (part.parts[0], part.weights) if weighs else (part, None)
                around = torch.autocast(device.type, scorer.autocast) if scorer.autocast else None
                with around or nullcontext():
                    losses = self._loss_fn(scorer.model, batch)
                    loss = weighted_mean(losses, weights) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        norm = nn.utils.clip_grad_norm_(params, scorer.max_grad_norm or math.inf)
        group = self.objective.layout.group
        both: list[float] = group.mean(torch.stack([total.float(), norm.float()])).tolist()
        mean, norm_here = both
        self._num_steps += 1
        if math.isfinite(mean) and math.isfinite(norm_here):
            optimizer.step()
        else:
            self._num_skipped += 1
            _log.warning(
                "the scorer's loss is %g and the norm of its gradient %g: its step is left out; "
                "%d left out so far",
                mean,
                norm_here,
                self._num_skipped,
            )
        if scorer.lr_scheduler is not None:
            scorer.lr_scheduler.step()
        optimizer.zero_grad()
        return mean

    # --- state ----------------------------------------------------------------------------

    def _kind(self) -> str:
        """How it is trained, in words."""
        if self.scorer.is_frozen:
            return "frozen"
        by = "the selector" if self.scorer.train else "the user"
        schedule = self.scorer.lr_scheduler
        scheduled = "without a schedule" if schedule is None else f"under {type(schedule).__name__}"
        return f"by {type(self.optimizer.optimizer).__name__} {scheduled}, stepped by {by}"

    def plain(self) -> dict[str, Any]:
        """All that its next scores depend on, as plain values: weights and optimizer, too."""
        scheduler = self.scorer.lr_scheduler
        return {
            "kind": self._kind(),
            "model": _copied(self.objective.model.state_dict()),
            "optimizer": _copied(self.optimizer.optimizer.state_dict()),
            "scheduler": None if scheduler is None else _copied(scheduler.state_dict()),
            "kept": [plain(batch) for batch in self._kept],
            "num_steps": self._num_steps,
            "num_skipped": self._num_skipped,
            "loss": self.loss,
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from `plain`.

        Raises:
            ValueError: the state is of a scorer that is trained in another way.
        """
        if saved["kind"] != self._kind():
            raise ValueError(
                f"the scorer must be trained as that of the saved state, {saved['kind']}, got "
                f"{self._kind()}"
            )
        self.objective.model.load_state_dict(saved["model"])
        self.optimizer.optimizer.load_state_dict(_copied(saved["optimizer"]))
        if self.scorer.lr_scheduler is not None:
            self.scorer.lr_scheduler.load_state_dict(_copied(saved["scheduler"]))
        device = self.optimizer.values().device
        self._kept = [to_device(restored(batch), device) for batch in saved["kept"]]
        self._num_steps, self._num_skipped = saved["num_steps"], saved["num_skipped"]
        self.loss = saved["loss"]


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that later steps do not write into."""
    return deepcopy({name: x.detach() if isinstance(x, Tensor) else x for name, x in state.items()})
