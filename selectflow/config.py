"""The configuration of a run: its fields, its ranges, and errors that name all that is wrong."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from selectflow.config_errors import ConfigError, describe, nearest_key
from selectflow.yaml_io import dump_yaml, parse_yaml, read_yaml

__all__ = ["ConfigError", "RunConfig", "json_schema", "load", "to_yaml"]


def _must_be(rule: str, holds: Callable[[object], object]) -> BeforeValidator:
    # Pydantic reports a union once per type and a pattern as a regex; this once, and in words.
    def check(value: object) -> object:
        if not holds(value):
            raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})
        return value

    return BeforeValidator(check)


def _is_keep(value: object) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return is_count or (isinstance(value, float) and 0 < value <= 1)


def _is_horizon(value: object) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return is_count or value == math.inf


def _matches(pattern: str) -> Callable[[object], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists and strings where Python has tuples and paths; only the container is lax.
Directory = Annotated[Path, Field(strict=False)]
Keep = Annotated[
    Count | Annotated[float, Field(gt=0, le=1)],
    _must_be("a count (integer >= 1) or a fraction in (0, 1]", _is_keep),
]
Horizon = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[float, Field(allow_inf_nan=True)],
    _must_be("an integer >= 0 or .inf", _is_horizon),
]
RunName = Annotated[
    str,
    _must_be(
        "a directory name of letters, digits, '.', '_' and '-'; {seed} stands for the seed",
        _matches(r"[A-Za-z0-9](\{seed\}|[A-Za-z0-9._-])*"),
    ),
]
Device = Annotated[
    str,
    _must_be("auto, cpu, cuda, cuda:N, mps or xpu", _matches(r"auto|(cpu|cuda|mps|xpu)(:\d+)?")),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where the examples come from."""

    name: Literal["digits", "shards"] = Field(
        default="digits", description="digits: written on first use; shards: an existing directory"
    )
    root: Directory | None = Field(
        default=None,
        description="directory of the shards; null: data/<name and options> for digits",
    )
    label_noise: float = Field(
        default=0.0, ge=0, lt=1, description="share of training labels made wrong (digits)"
    )
    seed: int = Field(
        default=0, ge=0, description="seed of the written shards: which labels are altered"
    )
    pool: Count = Field(default=64, description="P: candidate examples of one optimizer step")
    num_workers: int = Field(
        default=0, ge=0, description="processes that read and decode; 0: the training process"
    )
    buffer: Count = Field(default=4096, description="samples that are shuffled together")
    memory_gib: float = Field(
        default=1.0, ge=0, description="decoded data up to this size, in GiB, are held in memory"
    )
    max_errors: int = Field(
        default=0, ge=0, description="unreadable samples before the run stops; 0: the first does"
    )
    target_batch: Count = Field(default=200, description="examples of one batch of the target set")

    @property
    def directory(self) -> Path:
        """The directory of the shards, `root` or the one derived from the options."""
        return self.root or Path("data", f"digits-noise{self.label_noise:g}-seed{self.seed}")


class ModelConfig(_Section):
    """The network that is trained."""

    name: Literal["mlp", "cnn", "resnet18"] = Field(default="mlp", description="architecture")
    hidden: tuple[Count, ...] = Field(
        default=(128, 128), strict=False, description="units of each hidden layer (mlp)"
    )
    width: Count = Field(default=16, description="channels of the first convolution (cnn)")


class OptimizerConfig(_Section):
    """The optimizer, with the names and meanings of torch.optim."""

    name: Literal["adamw", "sgd"] = Field(default="adamw", description="torch.optim.AdamW or SGD")
    lr: float = Field(default=3e-3, gt=0, description="learning rate")
    weight_decay: float = Field(
        default=0.01,
        ge=0,
        description="decay per update; decoupled in adamw, added to the gradient in sgd",
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), strict=False, description="decay of exp_avg and of exp_avg_sq (adamw)"
    )
    eps: float = Field(default=1e-8, gt=0, description="added to the root of exp_avg_sq (adamw)")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum (sgd)")
    max_grad_norm: float | None = Field(
        default=None, gt=0, description="clip the gradient to this norm; null: no clipping"
    )


class ScheduleConfig(_Section):
    """The learning rate over the run, as a multiple of optimizer.lr."""

    name: Literal["constant", "cosine", "linear"] = Field(default="constant", description="shape")
    warmup_steps: int = Field(
        default=0, ge=0, description="steps of linear rise from 0 to optimizer.lr"
    )
    final: float = Field(
        default=0.0, ge=0, le=1, description="share of optimizer.lr left at the last step"
    )


class SelectConfig(_Section):
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
        description="H: optimizer updates from scoring to reading the target loss; .inf: offline, "
        "a run on everything is recorded first, and only its best samples are trained on",
    )
    interval: Count = Field(default=1, description="K: optimizer steps between two look-aheads")
    derivative: Literal["auto", "exact", "central"] = Field(
        default="auto",
        description="directional derivatives: forward-mode, differences, or the cheaper",
    )
    curvature: Literal["exact", "fisher", "none"] = Field(
        default="exact", description="Hessian of the adjoint sweep"
    )
    nominal: Literal["random", "policy"] = Field(
        default="random", description="which part of the peeked pools the look-ahead simulates"
    )
    chunk_size: Count | None = Field(
        default=None, description="examples scored at once; null: the whole pool"
    )
    memory_gib: float = Field(
        default=1.0,
        gt=0,
        description="memory for the look-ahead's states, in GiB; offline, as much again for the "
        "snapshots of the recorded run",
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

    @property
    def is_offline(self) -> bool:
        """Whether samples are selected once, before the training run."""
        return self.horizon == math.inf

    def selector_options(self) -> dict[str, Any]:
        """Arguments of `Selector`; after offline selection it only passes pools on."""
        options = self.model_dump(exclude={"record_steps", "record_lr", "keep_samples"})
        if self.is_offline:
            options |= {"strategy": "uniform", "horizon": 0, "keep": 1.0}
        return options


class TrackConfig(_Section):
    """Where the metrics go besides metrics.jsonl."""

    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="Weights & Biases; offline needs no login"
    )
    project: str = Field(default="selectflow", min_length=1, description="W&B project")
    group: str | None = Field(default=None, description="W&B group: runs that are compared")
    job_type: str | None = Field(default=None, description="W&B job type; null: the strategy")
    tags: tuple[str, ...] = Field(default=(), strict=False, description="W&B tags")


class RunConfig(_Section):
    """One training run with data selection."""

    name: RunName = Field(
        description="name of the run, and of its directory under root; {seed} is filled in"
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
    schedule: ScheduleConfig = ScheduleConfig()
    select: SelectConfig = SelectConfig()
    track: TrackConfig = TrackConfig()

    @property
    def run_name(self) -> str:
        """The name with the seed filled in."""
        return self.name.replace("{seed}", str(self.seed))

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
    if _get(values, "data", "name") == "shards" and _get(values, "data", "root") is None:
        yield "data.root must be a directory when data.name is 'shards', got None; set data.root"


def _get(values: Mapping[str, Any], section: str, key: str) -> object:
    default = RunConfig.model_fields[section].default
    given = values.get(section)
    return given[key] if isinstance(given, dict) and key in given else getattr(default, key)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _lines(error: ValidationError, values: Mapping[str, Any]) -> list[str]:
    known = list(_keys(RunConfig))
    single = [describe(item, known) for item in error.errors() if item["loc"]]
    return single + list(_disagreements(values))


def _override(values: dict[str, Any], override: str) -> str | None:
    """Set one key=value in `values`; what is wrong with it, or None."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        return f"{override!r} must be key=value, as in select.horizon=2"
    if path not in (known := list(_keys(RunConfig))):
        return f"{path} must be a known key, got {text!r}{nearest_key(path, known)}"
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        return f"{path} {error}, got {text!r}"
    *sections, leaf = path.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            return None  # the section itself is wrong, which validation reports
        values = values[section]
    values[leaf] = value
    return None


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
    problems = [problem for item in overrides if (problem := _override(values, item))]
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
