"""The sections of a run's configuration on the selection, and on what is shown of a run."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from selectflow.run.config_fields import Count, Directory, Section, must_be
from selectflow.run.config_schedules import HorizonScheduleConfig


def _is_keep(value: object) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return is_count or (isinstance(value, float) and 0 < value <= 1)


def _is_horizon(value: object) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return is_count or value in (math.inf, "auto")


Keep = Annotated[
    Count | Annotated[float, Field(gt=0, le=1)],
    must_be("a count (integer >= 1) or a fraction in (0, 1]", _is_keep),
]
Horizon = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(allow_inf_nan=True)] | Literal["auto"],
    must_be("an integer >= 0, auto or .inf", _is_horizon),
]


class SelectConfig(Section):
    """Which examples of a pool are trained on."""

    strategy: Literal["uniform", "loss", "influence"] = Field(
        default="influence",
        description="uniform: at random; loss: largest first; influence: by score",
    )
    keep: Keep = Field(
        default=16, description="B: examples kept of a pool, or the fraction of it kept"
    )
    horizon: Horizon = Field(
        default=1,
        description="H: optimizer updates from scoring to reading the target loss; auto: the "
        "controller's choice; .inf: offline, a run on everything is recorded first, and only its "
        "best samples are trained on",
    )
    largest_horizon: int = Field(
        default=8, ge=0, description="the largest horizon that the controller may choose (auto)"
    )
    lr: Literal["schedule", "auto"] = Field(
        default="schedule",
        description="learning rate: as scheduled, or multiplied by what the controller chooses",
    )
    lr_lowest: float = Field(
        default=1 / 64, gt=0, le=1, description="the smallest multiplier of the schedule (lr: auto)"
    )
    lr_highest: float = Field(
        default=64.0, ge=1, description="the largest multiplier of the schedule (lr: auto)"
    )
    horizon_schedule: HorizonScheduleConfig = Field(
        default=HorizonScheduleConfig(), description="how the horizon changes over the run"
    )
    interval: Count = Field(default=1, description="K: optimizer steps between two look-aheads")
    derivative: Literal["auto", "exact", "central"] = Field(
        default="auto",
        description="directional derivatives: forward-mode, differences, or the cheaper; over a "
        "whole run (offline) auto is exact, since errors of differences compound",
    )
    curvature: Literal["exact", "fisher", "none"] = Field(
        default="exact", description="Hessian of the adjoint sweep"
    )
    nominal: Literal["random", "policy"] = Field(
        default="random", description="which part of the peeked pools the look-ahead simulates"
    )
    params: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="patterns of the parameters that scores are taken over, '!' leaves out, as "
        "['!*wte*']; null: all",
    )
    score_view: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="tokens of each example of the pools and of the target that are scored, the "
        "first ones that count; training is on all of them. null: all (gpt2, llama)",
    )
    pools_per_update: Count = Field(
        default=1,
        description="pools whose kept examples make one optimizer step together",
    )
    chunk_size: Count | Literal["auto"] | None = Field(
        default=None,
        description="examples scored at once; null: the whole pool; auto: as many as one pass "
        "takes within memory_gib",
    )
    memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="memory for the look-ahead's states, in GiB; offline, as much again for the "
        "snapshots of the recorded run; null: 1, or the least that is needed",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="where the look-ahead's states are kept; disk: the system's temporary files",
    )
    record_steps: Count | None = Field(
        default=None,
        description="optimizer steps of the recorded run (offline), whose batches are held in "
        "memory; null: steps",
    )
    record_lr: float | None = Field(
        default=None,
        gt=0,
        description="learning rate of the recorded run (offline): scores are the more faithful "
        "the smaller it is; null: optimizer.lr",
    )
    keep_samples: float = Field(
        default=0.5, gt=0, le=1, description="share of the recorded samples kept (offline)"
    )
    replay: Directory | None = Field(
        default=None,
        description="run directory: train on exactly what it kept, without scoring; needs its "
        "dataset, pool size and seed, and leaves the fields above unused",
    )

    @property
    def is_offline(self) -> bool:
        """Whether samples are selected once, before the training run."""
        return self.horizon == math.inf

    def selector_options(self) -> dict[str, Any]:
        """Arguments of `Selector` but horizon and lr; offline, it only passes pools on."""
        apart = {
            "horizon",
            "horizon_schedule",
            "largest_horizon",
            "lr",
            "lr_lowest",
            "lr_highest",
            "record_steps",
            "record_lr",
            "keep_samples",
            "replay",
            "score_view",  # a function, which the task makes
        }
        options = self.model_dump(exclude=apart)
        if self.is_offline:
            options |= {"strategy": "uniform", "keep": 1.0}
        return options


class TrackConfig(Section):
    """Where the metrics go besides metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="Weights & Biases; offline needs no login"
    )
    project: str = Field(default="selectflow", min_length=1, description="W&B project")
    group: str | None = Field(default=None, description="W&B group: runs that are compared")
    job_type: str | None = Field(
        default=None, description="W&B job type; null: the strategy, or replay"
    )
    tags: tuple[str, ...] = Field(default=(), strict=False, description="W&B tags")
    kinds: bool = Field(
        default=True,
        description="shares among the kept of what the data say of their samples (altered, where "
        "from), for which all that they say is read before the first step",
    )
    samples: int = Field(
        default=0,
        ge=0,
        description="examples of the highest and as many of the lowest scores that are shown with "
        "each evaluation, and at the end for the whole run: on stdout, and at W&B where it is used",
    )
