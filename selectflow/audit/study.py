"""A study: its configuration, the loop over its runs, and the files that they leave.

A run is one learning rate and seed. The files are written whole after each, and a later start with
the same configuration continues after the runs that they hold.
"""

import csv
import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

import torch
from pydantic import BeforeValidator, Field, model_validator

from selectflow.core.files import atomic_file
from selectflow.fields import ConfigError, Count, Directory, Section
from selectflow.run.sections import Beta, Positive
from selectflow.run.yaml import Configuration, load_as, read_yaml

# What may differ between two starts of an audit: its place, and which runs it measures.
_NOT_MEASURED = {"name", "root", "overwrite", "seeds", "lrs", "num_threads"}


class MLPModel(Section):
    """A multilayer perceptron on the digits."""

    is_large: ClassVar[bool] = False  # whether double precision costs too much
    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Count, ...] = Field(
        default=(16, 16), strict=False, description="units of each hidden layer"
    )
    activation: Literal["relu", "gelu"] = Field(default="relu", description="nonlinearity")


class CNNModel(Section):
    """Two convolutions and a linear layer on the digits."""

    is_large: ClassVar[bool] = False
    kind: Literal["cnn"] = "cnn"
    width: Count = Field(default=4, description="channels of the first convolution")
    activation: Literal["relu", "gelu"] = Field(default="gelu", description="nonlinearity")


class _TextModel(Section):
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
    def is_large(self) -> bool:
        """Whether double precision costs too much."""
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


def _with_kind(model: object) -> object:
    return {"kind": "mlp"} | model if isinstance(model, dict) else model


Model = MLPModel | CNNModel | GPT2Model | LlamaModel


class Study(Configuration):
    """What all studies choose: a model, its optimizer and where results go."""

    example: ClassVar[str] = "seeds=1"

    name: str = Field(min_length=1, description="name of the audit, and of its directory")
    root: Directory = Field(
        default=Path("audits"), description="directory that holds the audits' directories"
    )
    overwrite: bool = Field(
        default=False, description="measure again what the directory already holds"
    )
    model: Annotated[Model, Field(discriminator="kind"), BeforeValidator(_with_kind)] = MLPModel()
    seeds: Count = Field(default=3, description="runs for each learning rate, seeds 0, 1, ...")
    batch: Annotated[int, Field(ge=2)] = Field(default=32, description="B: examples of one step")
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.95), strict=False, description="decay of exp_avg and of exp_avg_sq"
    )
    eps: Positive = Field(default=1e-8, description="added to the root of exp_avg_sq")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled decay")
    dtype: Literal["float64", "float32"] | None = Field(
        default=None,
        description="precision of truth and scores; null: float64, or float32 for a large model",
    )
    num_threads: Count | None = Field(default=None, description="torch CPU threads")
    lrs: tuple[Positive, ...] = Field(
        default=(1e-3, 1e-4, 1e-5), strict=False, min_length=1, description="learning rates"
    )

    @property
    def precision(self) -> torch.dtype:
        """The precision of truth and scores."""
        is_single = self.dtype == "float32" or (self.dtype is None and self.model.is_large)
        return torch.float32 if is_single else torch.float64

    @property
    def folder(self) -> Path:
        """The directory of the results, root/name."""
        return self.root / self.name


class AuditConfig(Study):
    """One setting in which influence is compared with leave-one-out retraining."""

    horizons: tuple[Count, ...] = Field(
        default=(1, 4, 16), strict=False, description="finite horizons beside the whole run"
    )
    steps: Count = Field(default=45, description="T: recorded steps, at most one epoch")
    warm_steps: int = Field(
        default=0, ge=0, description="plain training steps on other examples before the recording"
    )
    warm_lr: Positive = Field(default=1e-3, description="learning rate of those")
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
    memory_gib: Positive | None = Field(
        default=None,
        description="limit for snapshots, and for what a sweep or rerun keeps, in GiB; null: 1, or "
        "the least that is needed",
    )

    @classmethod
    def disagreements(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """Of the horizons with the steps."""
        filled = cls.model_construct(**values)
        if filled.horizons and max(filled.horizons) > filled.steps:
            yield (
                f"horizons must be <= steps ({filled.steps}), got {max(filled.horizons)}; "
                "lower it or record more steps"
            )


class ProxyConfig(Study):
    """One setting in which the error proxy is compared with the true error of first order."""

    study: Literal["proxy"]
    lrs: tuple[Positive, ...] = Field(
        default=(1e-2, 3e-3, 1e-3, 3e-4, 1e-4),
        strict=False,
        min_length=1,
        description="learning rates; each is that of a whole run",
    )
    horizons: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0, 1, 2, 4, 8, 16, 32),
        strict=False,
        min_length=1,
        description="updates until the target is read",
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

    @classmethod
    def disagreements(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """Of the removals with the batch that they are from."""
        filled = cls.model_construct(**values)
        if filled.num_removals > filled.batch:
            yield (
                f"num_removals must be <= batch ({filled.batch}), got {filled.num_removals}; "
                "lower it"
            )


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
    if "study" in read_yaml(path):
        return load_as(ProxyConfig, path, overrides)
    return load_as(AuditConfig, path, overrides)


# --- runs and their files -------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "0.6")


class Measured(Protocol):
    """A dataclass of what was measured in one run."""

    @property
    def lr(self) -> float: ...
    @property
    def seed(self) -> int: ...


Row = TypeVar("Row", bound=Measured)


def run_study(
    config: Study,
    read: Callable[[], list[Row]],
    measure: Callable[[float, int], Iterable[Row]],
    write: Callable[[list[Row]], None],
    progress: Callable[[str], None],
) -> list[Row]:
    """Measure each learning rate and seed of a study that is not measured yet.

    Args:
        read: the rows that the directory holds.
        measure: learning rate, seed -> the rows of that run.
        write: writes the rows of all runs so far; called after each run.
        progress: told what was found or finished, in words.

    Returns:
        The rows of all runs.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    rows = [] if config.overwrite else read()
    known = {(row.lr, row.seed) for row in rows}
    for lr in config.lrs:
        for seed in range(config.seeds):
            if (lr, seed) in known:
                progress(f"found lr {lr:g}, seed {seed}")
                continue
            rows += measure(lr, seed)
            write(rows)
            progress(f"measured lr {lr:g}, seed {seed}")
    return rows


def read_study(
    config: Study, name: str, kind: str, rows: Callable[[dict[str, Any]], list[Row]]
) -> list[Row]:
    """Rows that the directory holds of this configuration, whatever seeds and learning rates.

    Args:
        name: of the JSON file with the configuration.
        kind: what it must be of, for the message.
        rows: content of that file -> the rows.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """
    path = config.folder / name
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        held, found = content["config"], rows(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be of {kind}, got {error!r}; remove it") from error
    for key, value in config.model_dump(mode="json").items():
        if key not in _NOT_MEASURED and held.get(key) != value:
            raise ConfigError(
                f"{path} must be of this configuration, got {key} {held.get(key)}, here "
                f"{value}; give another name, or overwrite=true to measure all again"
            )
    return found


def write_study(config: Study, name: str, content: Mapping[str, Any]) -> None:
    """Write the configuration and `content` as JSON, whole or not at all.

    JSON has no infinity and no NaN: they are "inf", and null for what has no value.
    """
    plain = _plain({"config": config.model_dump(mode="json"), **content})
    with atomic_file(config.folder / name) as file:
        file.write((json.dumps(plain, indent=1, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Write dataclasses of one kind as a CSV file, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(rows[0])])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, rows))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman; NaN of fewer than two values, and where all are equal."""
    from scipy.stats import spearmanr  # noqa: PLC0415

    if len(ours) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what scipy says of NaN
        return float(spearmanr(ours, theirs).statistic)
