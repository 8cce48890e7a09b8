"""The sections of a run's configuration on what changes over the run: learning rate, horizon."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from selectflow.options import Count, Section, must_be

Milestone = Annotated[
    tuple[Count, Annotated[int, Field(ge=0)]],
    Field(strict=False),
    must_be(
        "a pair [step, horizon]", lambda value: isinstance(value, Sequence) and len(value) == 2
    ),
]


def _check_milestones(steps: Sequence[int], shape: object) -> None:
    rule = None
    if shape == "step" and not steps:
        rule = "given when name is step"
    elif any(earlier >= later for earlier, later in pairwise(steps)):
        rule = "in rising order of step"
    if rule:
        raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})


class ScheduleConfig(Section):
    """The learning rate over the run, as a multiple of optimizer.lr."""

    name: Literal["constant", "cosine", "linear", "step"] = Field(
        default="constant", description="shape after the warm-up"
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="steps of linear rise from 0 to optimizer.lr"
    )
    final: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of optimizer.lr left at the last step (cosine, linear)",
    )
    milestones: tuple[Count, ...] = Field(
        default=(),
        strict=False,
        validate_default=True,
        description="rising steps, at each of which the rate is multiplied by `factor` (step)",
    )
    factor: float = Field(
        default=0.1, gt=0, le=1, description="of the rate at each milestone (step)"
    )

    @field_validator("milestones")
    @classmethod
    def _rise(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        _check_milestones(value, info.data.get("name"))
        return value


class HorizonScheduleConfig(Section):
    """The horizon over the run; it begins at select.horizon."""

    name: Literal["constant", "linear", "step"] = Field(
        default="constant",
        description="constant: select.horizon; linear: in equal parts to `final`; step: by list",
    )
    final: int = Field(default=0, ge=0, description="horizon of the last step (linear)")
    milestones: tuple[Milestone, ...] = Field(
        default=(),
        strict=False,
        validate_default=True,
        description="pairs [step, horizon], steps rising: the horizon from that step on (step)",
    )

    @field_validator("milestones")
    @classmethod
    def _rise(cls, value: tuple[Milestone, ...], info: ValidationInfo) -> tuple[Milestone, ...]:
        _check_milestones([step for step, _ in value], info.data.get("name"))
        return value
