"""The configuration of an audit: its fields, its ranges, and errors that name all that is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selectflow.config_errors import ConfigError, describe, nearest_key
from selectflow.yaml_io import parse_yaml, read_yaml

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
_NUM_DIGITS = 1797


class AuditConfig(BaseModel):
    """One setting in which influence is compared with leave-one-out retraining."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="name of the audit, and of its directory")
    root: Annotated[Path, Field(strict=False)] = Field(
        default=Path("audits"), description="directory that holds the audits' directories"
    )
    model: Literal["mlp", "cnn"] = Field(default="mlp", description="architecture, on the digits")
    hidden: tuple[Count, ...] = Field(
        default=(16, 16), strict=False, description="units of each hidden layer (mlp)"
    )
    width: Count = Field(default=4, description="channels of the first convolution (cnn)")
    activation: Literal["relu", "gelu"] = Field(default="relu", description="nonlinearity")
    seeds: Count = Field(default=3, description="runs for each learning rate, seeds 0, 1, ...")
    lrs: tuple[Rate, ...] = Field(
        default=(1e-3, 1e-4, 1e-5), strict=False, min_length=1, description="learning rates"
    )
    horizons: tuple[Count, ...] = Field(
        default=(1, 4, 16), strict=False, description="finite horizons beside the whole run"
    )
    batch: Annotated[int, Field(ge=2)] = Field(default=32, description="B: examples of one step")
    steps: Count = Field(default=45, description="T: recorded steps, at most one epoch")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="learning rate over the run; cosine falls to 0"
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), strict=False, description="decay of exp_avg and of exp_avg_sq"
    )
    eps: Rate = Field(default=1e-8, description="added to the root of exp_avg_sq")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled decay")
    num_queries: Count = Field(default=30, description="test examples whose losses are measured")
    num_pairs: Annotated[int, Field(ge=3)] = Field(
        default=100, description="removals over the whole run"
    )
    spacing: Annotated[int, Field(ge=2)] = Field(
        default=4, description="updates between two snapshots, for the system-level rows"
    )
    num_threads: Count | None = Field(default=None, description="torch CPU threads")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        used = self.num_queries + self.steps * self.batch
        if used > _NUM_DIGITS:
            raise ValueError(
                f"num_queries + steps * batch must be <= {_NUM_DIGITS}, the digits there are, "
                f"got {used}; lower one of them"
            )
        if self.horizons and max(self.horizons) > self.steps:
            raise ValueError(
                f"horizons must be <= steps ({self.steps}), got {max(self.horizons)}; "
                "lower it or record more steps"
            )
        return self


def load_audit(path: str | Path, overrides: Sequence[str] = ()) -> AuditConfig:
    """The configuration of a YAML file with `key=value` overrides.

    Args:
        path: YAML file, a mapping of the fields of AuditConfig.
        overrides: field names and YAML values, as `seeds=1`; later ones win.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, has the wrong type or is out of
            range; the message has one line for each of them.
    """
    values, known = read_yaml(path), list(AuditConfig.model_fields)
    problems = [line for item in overrides if (line := _override(values, item, known))]
    try:
        config = AuditConfig.model_validate(values)
    except ValidationError as error:
        problems += [
            describe(dict(item), known)
            if item["loc"]
            else item["msg"].removeprefix("Value error, ")
            for item in error.errors()
        ]
    if problems:
        raise ConfigError("\n  ".join([f"{path}: errors in the configuration", *problems]))
    return config


def _override(values: dict[str, Any], override: str, known: Sequence[str]) -> str | None:
    """Set one key=value in `values`; what is wrong with it, or None."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return f"{override!r} must be key=value, as in seeds=1"
    if key not in known:
        return f"{key} must be a known key, got {text!r}{nearest_key(key, known)}"
    values[key] = parse_yaml(text)
    return None
