"""The configuration of a run: its sections, and errors that name all that is wrong."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from selectflow.options import (
    ConfigError,
    Count,
    Directory,
    Section,
    describe,
    must_be,
    nearest_key,
)
from selectflow.run.config_data import DataConfig
from selectflow.run.config_schedules import ScheduleConfig
from selectflow.run.config_select import SelectConfig, TrackConfig
from selectflow.run.config_training import ModelConfig, OptimizerConfig, TrainConfig
from selectflow.run.yaml_io import dump_yaml, read_yaml, set_key

__all__ = ["ConfigError", "RunConfig", "json_schema", "known_keys", "load", "to_yaml"]


def _matches(pattern: str) -> Callable[[object], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


RunName = Annotated[
    str,
    must_be(
        "a directory name of letters, digits, '.', '_' and '-'; {seed} stands for the seed",
        _matches(r"[A-Za-z0-9](\{[a-z_.]+\}|[A-Za-z0-9._-])*"),
    ),
]
Device = Annotated[
    str,
    must_be("auto, cpu, cuda, cuda:N, mps or xpu", _matches(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")),
]


class RunConfig(Section):
    """One training run with data selection."""

    name: RunName = Field(
        description="name of the run, and of its directory under root; {seed}, {optimizer.lr} "
        "and any other {key} is filled in"
    )
    root: Directory = Field(
        default=Path("runs"), description="directory that holds the run directories"
    )
    seed: int = Field(
        default=0, ge=0, description="seed of initial weights, stream order and selection"
    )
    steps: Count = Field(default=800, description="optimizer steps")
    max_wall_s: float | None = Field(
        default=None,
        gt=0,
        description="stop after these seconds of training, evaluation not counted",
    )
    eval_every: Count = Field(default=50, description="steps between two evaluations")
    device: Device = Field(
        default="auto", description="torch device; auto: an accelerator if there is one, else cpu"
    )
    num_threads: Count | None = Field(
        default=None, description="torch CPU threads; null: torch's choice"
    )
    overwrite: bool = Field(default=False, description="replace an earlier run of the same name")
    resume: Literal["never", "auto"] = Field(
        default="never", description="auto: go on from the newest checkpoint where there is one"
    )
    checkpoint_every: Count = Field(default=200, description="steps between two checkpoints")
    keep_checkpoints: Count = Field(default=2, description="checkpoints that are kept")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    select: SelectConfig = SelectConfig()
    track: TrackConfig = TrackConfig()

    @property
    def run_name(self) -> str:
        """The name with its {keys} filled in, '-' for what a directory name may not hold."""
        filled = re.sub(r"\{([a-z_.]+)\}", lambda key: str(attrgetter(key[1])(self)), self.name)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", filled)

    @property
    def run_dir(self) -> Path:
        """The directory of this run, root/run_name."""
        return self.root / self.run_name

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if problems := list(_disagreements(self.model_dump())):
            raise ValueError("; ".join(problems))
        return self


def _disagreements(values: Mapping[str, Any]) -> Iterator[str]:
    # Reads plain values, so that these are reported together with errors in single fields.
    keep, pool = _get(values, "select", "keep"), _get(values, "data", "pool")
    if isinstance(keep, int) and isinstance(pool, int) and keep > pool:
        yield f"select.keep must be <= data.pool ({pool}), got {keep}; keep fewer or enlarge it"
    horizon, strategy = _get(values, "select", "horizon"), _get(values, "select", "strategy")
    if horizon == math.inf and strategy in ("uniform", "loss"):
        yield (
            f"select.strategy must be influence when select.horizon is .inf, got {strategy!r}; "
            "give a finite horizon"
        )
    known = known_keys()
    for key in re.findall(r"\{([a-z_.]+)\}", str(values.get("name"))):
        if key not in known:
            yield f"name must have known keys in braces, got {{{key}}}{nearest_key(key, known)}"
    if horizon == math.inf and (replay := _get(values, "select", "replay")) is not None:
        yield (
            f"select.replay must be null when select.horizon is .inf, got {str(replay)!r}; give a "
            "finite horizon"
        )
    for key, default in (("score_view", None), ("pools_per_update", 1)):
        if horizon == math.inf and (value := _get(values, "select", key)) != default:
            only = "null" if default is None else default
            yield f"select.{key} must be {only} when select.horizon is .inf, got {value!r}"
    schedule = _get(values, "select", "horizon_schedule")
    shape = schedule.get("name") if isinstance(schedule, dict) else None
    if shape in ("linear", "step") and (isinstance(horizon, str) or horizon == math.inf):
        yield (
            "select.horizon must be an integer, the first horizon, when "
            f"select.horizon_schedule.name is {shape}, got {horizon!r}"
        )
    if _get(values, "data", "name") == "shards" and _get(values, "data", "root") is None:
        yield "data.root must be a directory when data.name is 'shards', got None; set data.root"


def _get(values: Mapping[str, Any], section: str, key: str) -> object:
    default = RunConfig.model_fields[section].default
    given = values.get(section)
    return given[key] if isinstance(given, dict) and key in given else getattr(default, key)


def known_keys() -> list[str]:
    """Dotted paths of all keys of a configuration, sections included."""
    return list(_keys(RunConfig))


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _lines(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    known = known_keys()
    single = [describe(item, known) for item in error.errors() if item["loc"]]
    return single + list(_disagreements(values))


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a YAML file with `key=value` overrides.

    Args:
        path: YAML file, a mapping of the fields of RunConfig.
        overrides: dotted paths and YAML values, as `select.horizon=2` or `model.hidden=[64, 64]`;
            later ones win.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, has the wrong type or is out of
            range; the message has one line for each of them.
    """
    values = read_yaml(path)
    known = known_keys()
    found = [set_key(values, item, known, "select.horizon=2") for item in overrides]
    problems = [problem for problem in found if problem]
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += _lines(error, values)
    if problems:
        head = (
            f"{path}: {len(problems)} error{'s' if len(problems) > 1 else ''} in the configuration"
        )
        raise ConfigError("\n  ".join([head, *problems]))
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON schema of RunConfig, with types, ranges, defaults and descriptions."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)
