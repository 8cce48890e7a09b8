"""The configuration of an audit: its fields, its ranges, and errors that name all that is wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from selectflow.options import ConfigError, describe
from selectflow.run.yaml_io import read_yaml, set_key

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class MLPModel(_Section):
    """A multilayer perceptron on the digits."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(
        default=(16, 16), strict=False, description="units of each hidden layer"
    )
    activation: Literal["relu", "gelu"] = Field(default="relu", description="nonlinearity")

    @property
    def large(self) -> bool:
        """Whether double precision would be a burden."""
        return False


class CNNModel(_Section):
    """Two convolutions and a linear layer on the digits."""

    kind: Literal["cnn"] = "cnn"
    width: Count = Field(default=4, description="channels of the first convolution")
    activation: Literal["relu", "gelu"] = Field(default="gelu", description="nonlinearity")

    @property
    def large(self) -> bool:
        """Whether double precision would be a burden."""
        return False


class _TextModel(_Section):
    block: Annotated[int, Field(ge=2)] = Field(default=32, description="tokens of one example")
    shape: str = "small"
    pretrained: str | None = Field(
        default=None,
        min_length=1,
        description="folder or Hugging Face name of weights and tokenizer; null: random weights "
        "of `shape`, and bytes as tokens",
    )

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and "shape" in self.model_fields_set:
            raise ValueError(
                f"model.shape must be left out with model.pretrained, got {self.shape!r}; "
                "pretrained weights have a shape of their own"
            )
        return self

    @property
    def large(self) -> bool:
        """Whether double precision would be a burden."""
        return self.shape != "small" or self.pretrained is not None


class GPT2Model(_TextModel):
    """GPT-2 of Hugging Face transformers, all parameters trained, on Python source."""

    kind: Literal["gpt2"] = "gpt2"
    shape: Literal["small", "124m"] = Field(default="small", description="size of random weights")


class LlamaModel(_TextModel):
    """Llama of Hugging Face transformers, LoRA adapters trained, on Python source."""

    kind: Literal["llama"] = "llama"
    shape: Literal["small", "1b"] = Field(
        default="small", description="size of random weights; 1b is that of Llama-3.2-1B"
    )
    lora_rank: Count = Field(default=4, description="rank of the adapters of all projections")


Model = MLPModel | CNNModel | GPT2Model | LlamaModel


class _Study(_Section):
    """What all studies choose: a model, its optimizer and where results go."""

    name: str = Field(min_length=1, description="name of the audit, and of its directory")
    root: Annotated[Path, Field(strict=False)] = Field(
        default=Path("audits"), description="directory that holds the audits' directories"
    )
    overwrite: bool = Field(
        default=False, description="measure again what the directory already holds"
    )
    model: Annotated[Model, Field(discriminator="kind")] = MLPModel()
    seeds: Count = Field(default=3, description="runs for each learning rate, seeds 0, 1, ...")
    batch: Annotated[int, Field(ge=2)] = Field(default=32, description="B: examples of one step")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), strict=False, description="decay of exp_avg and of exp_avg_sq"
    )
    eps: Rate = Field(default=1e-8, description="added to the root of exp_avg_sq")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled decay")
    dtype: Literal["float64", "float32"] | None = Field(
        default=None,
        description="precision of truth and scores; null: float64, or float32 for a large model",
    )
    num_threads: Count | None = Field(default=None, description="torch CPU threads")

    @property
    def precision(self) -> Literal["float64", "float32"]:
        """The precision of truth and scores."""
        return self.dtype or ("float32" if self.model.large else "float64")


class AuditConfig(_Study):
    """One setting in which influence is compared with leave-one-out retraining."""

    lrs: tuple[Rate, ...] = Field(
        default=(1e-3, 1e-4, 1e-5), strict=False, min_length=1, description="learning rates"
    )
    horizons: tuple[Count, ...] = Field(
        default=(1, 4, 16), strict=False, description="finite horizons beside the whole run"
    )
    steps: Count = Field(default=45, description="T: recorded steps, at most one epoch")
    warm_steps: int = Field(
        default=0, ge=0, description="plain training steps on other examples before the recording"
    )
    warm_lr: Rate = Field(default=1e-3, description="learning rate of those")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="learning rate over the run; cosine falls to 0"
    )
    num_queries: Count = Field(default=30, description="test examples whose losses are measured")
    num_pairs: Annotated[int, Field(ge=3)] = Field(
        default=100, description="removals over the whole run"
    )
    spacing: Annotated[int, Field(ge=2)] = Field(
        default=4, description="updates between two snapshots, for the system-level rows"
    )
    memory_gib: Rate | None = Field(
        default=None,
        description="limit for snapshots, and for what a sweep or rerun keeps, in GiB; null: 1, or "
        "the least that is needed",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.horizons and max(self.horizons) > self.steps:
            raise ValueError(
                f"horizons must be <= steps ({self.steps}), got {max(self.horizons)}; "
                "lower it or record more steps"
            )
        return self


class ProxyConfig(_Study):
    """One setting in which the error proxy is compared with the true error of first order."""

    study: Literal["proxy"]
    lrs: tuple[Rate, ...] = Field(
        default=(1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
        strict=False,
        min_length=1,
        description="learning rates; each is that of a whole run",
    )
    horizons: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2, 4, 8, 16, 32), strict=False, min_length=1, description="where one reads"
    )
    warm_steps: Count = Field(default=100, description="steps before the first window of a run")
    num_windows: Count = Field(default=2, description="windows of a run")
    between: Count = Field(default=20, description="steps between two windows")
    num_target: Count = Field(default=200, description="clean examples that define the goal")
    num_removals: Count = Field(
        default=24, description="single examples removed from a window's first batch, at most B"
    )
    keeps: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.25, 0.5), strict=False, description="B over the size of a pool, for selections"
    )
    noise: float = Field(
        default=0.4, ge=0, le=1, description="share of spoiled training examples: wrong labels, "
        "or tokens in random order"
    )  # fmt: skip

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.num_removals > self.batch:
            raise ValueError(
                f"num_removals must be <= batch ({self.batch}), got {self.num_removals}; lower it"
            )
        return self


def load_audit(path: str | Path, overrides: Sequence[str] = ()) -> AuditConfig | ProxyConfig:
    """The configuration of a YAML file with `key=value` overrides.

    Args:
        path: YAML file, a mapping of the fields of AuditConfig, or with `study: proxy` of those of
            ProxyConfig.
        overrides: dotted paths and YAML values, as `seeds=1` or `model.activation=gelu`; later
            ones win.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, has the wrong type or is out of
            range; the message has one line for each of them.
    """
    values = read_yaml(path)
    kind = ProxyConfig if "study" in values else AuditConfig
    known = _known_keys(kind)
    found = [set_key(values, item, known, "seeds=1") for item in overrides]
    problems = [problem for problem in found if problem]
    if isinstance(model := values.get("model"), dict):
        model.setdefault("kind", "mlp")
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        problems += [_describe(dict(item), known) for item in error.errors()]
    if problems:
        raise ConfigError("\n  ".join([f"{path}: errors in the configuration", *problems]))
    return config


def _known_keys(kind: type[_Study]) -> list[str]:
    of_models = {f"model.{key}": None for model in get_args(Model) for key in model.model_fields}
    return [*kind.model_fields, *of_models]


def _describe(error: dict[str, Any], known: list[str]) -> str:
    """One error in a line; pydantic puts the kind of the model into the path of its fields."""
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    section, *rest = error["loc"]
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        error |= {"type": "literal_error", "loc": ("model", "kind"), "input": context["tag"]}
        error["ctx"] = {"expected": context["expected_tags"]}
    elif section == "model" and len(rest) > 1:
        error["loc"] = ("model", *rest[1:])
    return describe(error, known)
