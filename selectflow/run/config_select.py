"""The sections of a run's configuration on the selection, and on what is shown of a run."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from selectflow.options import Count, Directory, Section, SelectOptions, is_count, must_be
from selectflow.run.config_schedules import HorizonScheduleConfig


def _is_horizon(value: object) -> bool:
    return is_count(value, 0) or value in (math.inf, "auto")


class SelectConfig(SelectOptions):
    """Which examples of a pool are trained on."""

    strategy: Literal["uniform", "loss", "influence"] = Field(
        default="influence",
        description="uniform: at random; loss: largest first; influence: by score",
    )
    horizon: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(allow_inf_nan=True)] | Literal["auto"],
        must_be("an integer >= 0, auto or .inf", _is_horizon),
    ] = Field(
        default=1,
        description="H: optimizer updates from scoring to reading the target loss; auto: the "
        "controller's choice; .inf: offline, a run on everything is recorded first, and only its "
        "best samples are trained on",
    )
    largest_horizon: int = Field(
        default=8, ge=0, description="the largest horizon that the controller may choose (auto)"
    )
    horizon_schedule: HorizonScheduleConfig = Field(
        default=HorizonScheduleConfig(), description="how the horizon changes over the run"
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
    score_view: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="tokens of each example of the pools and of the target that are scored, the "
        "first ones that count; training is on all of them. null: all (gpt2, llama)",
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
        """Options of `Selector` that are taken as they are; offline, it only passes pools on.

        Horizon, rate and view are built for a run.
        """
        names = SelectOptions.model_fields.keys() - {"horizon", "lr", "score_view"}
        options = self.model_dump(include=names)
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
