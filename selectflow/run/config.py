"""The configuration of a run: its sections, and errors that name all that is wrong."""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticKnownError

from selectflow.control.ladder import AutoHorizon
from selectflow.core.counts import is_count
from selectflow.fields import ConfigError, Count, Directory, Section, must_be, nearest_key
from selectflow.options import problems
from selectflow.run.sections import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    ScorerConfig,
    SelectConfig,
    TrainConfig,
)
from selectflow.run.yaml import Configuration, dump_yaml, keys_of, load_as

__all__ = ["ConfigError", "RunConfig", "json_schema", "known_keys", "load", "to_yaml"]


def _matches(pattern: str) -> Callable[[object], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return value


RunName = Annotated[
    str,
    must_be(
        "a directory name of letters, digits, '.', '_' and '-'; {seed} stands for the seed",
        _matches(r"[A-Za-z0-9](\{[a-z_.]+\}|[A-Za-z0-9._-])*"),
    ),
    BeforeValidator(_text),  # the last is the first to run
]
_LONGEST = 180  # of a run's name: files of it have a little more


def plain_name(text: str) -> str:
    """A text as a directory name: '-' for what it may not hold, and then a digest of the text.

    So two texts have two names, and one that is such a name keeps it.
    """
    return text if _cleaned(text) == text else f"{_cleaned(text)}-{_digest(text)}".lstrip("-")


def name_of(value: object) -> str:
    """A value of a configuration as a part of a name; different values have different names.

    A number, a flat list of numbers and a word are told from its text; anything else has a digest.
    """
    text = str(value)
    if isinstance(value, int | float) or value is None:
        return text
    if isinstance(value, tuple) and all(isinstance(each, int | float) for each in value):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    if isinstance(value, str) and not _is_like_another(value):
        return plain_name(value)
    return f"{_cleaned(text)}-{_digest(repr(value))}"


def _cleaned(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-").lstrip("._-")[:_LONGEST]


def _is_like_another(text: str) -> bool:
    """Whether a string reads as a number, or as what is no string."""
    try:
        float(text)
    except ValueError:
        return text in ("None", "True", "False")
    return True


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"


Device = Annotated[
    str, must_be("auto, cpu, cuda, cuda:N, mps or xpu", _matches(r"auto|(cpu|cuda|mps|xpu)(:\d+)?"))
]


class TrackConfig(Section, use_attribute_docstrings=True):
    """Where the metrics go besides metrics.jsonl.

    These settings override W&B's environment variables, which override what null means. But
    WANDB_MODE=disabled always switches W&B off, and offline always keeps it offline. W&B's own
    files go into WANDB_DIR if it is set, else into the run directory.
    """

    wandb: Literal["disabled", "offline", "online"] | None = None
    """Weights & Biases; offline needs no login; null: WANDB_MODE, or disabled"""
    tensorboard: bool = False
    """write the same metrics and samples for TensorBoard, into `tensorboard/` of the run directory
    (extra `tensorboard`)"""
    project: str | None = Field(default=None, min_length=1)
    """W&B project; null: WANDB_PROJECT, or selectflow"""
    group: str | None = None
    """W&B group: runs that are compared; null: WANDB_RUN_GROUP, or none"""
    job_type: str | None = None
    """W&B job type; null: WANDB_JOB_TYPE, or the strategy, or replay"""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    """W&B tags; none: those of WANDB_TAGS"""
    kinds: bool = True
    """log the shares of kinds of samples (altered, by origin) among the kept; the data's records of
    them are read before the first step"""
    samples: int = Field(default=0, ge=0)
    """examples of the highest and as many of the lowest scores that are shown with each evaluation,
    and at the end for the whole run: on stdout, and at W&B and TensorBoard where they are used"""


class RunConfig(Configuration, use_attribute_docstrings=True):
    """One training run with data selection."""

    example: ClassVar[str] = "select.horizon=2"

    name: RunName
    """name of the run, and of its directory under root; {seed}, {optimizer.lr} and any other {key}
    is filled in"""
    root: Directory = Path("runs")
    """directory that holds the run directories"""
    seed: int = Field(default=0, ge=0)
    """seed of initial weights, stream order and selection"""
    steps: Count = 800
    """optimizer steps"""
    max_wall_s: float | None = Field(default=None, gt=0)
    """stop after these seconds of training, evaluation not counted"""
    eval_every: Count = 50
    """steps between two evaluations"""
    patience: Count | None = None
    """evaluations in a row without a lower target loss after which the run ends; the model that it
    saves at its end is then the one with the lowest. null: no early stopping"""
    device: Device = "auto"
    """torch device; auto: an accelerator if there is one, else cpu"""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """how torchrun's processes train together: ddp: each has the whole model; fsdp2: parameters,
    moments and sensitivities are sharded; auto: ddp. Without torchrun there is one process"""
    timeout_s: float = Field(default=600.0, gt=0)
    """seconds that one of several processes waits for another before the run ends"""
    num_threads: Count | None = None
    """torch CPU threads; null: torch's choice"""
    overwrite: bool = False
    """replace an earlier run of the same name"""
    resume: Literal["never", "auto"] = "never"
    """auto: go on from the newest checkpoint where there is one"""
    checkpoint_every: Count = 200
    """steps between two checkpoints"""
    keep_checkpoints: Count = 2
    """checkpoints that are kept"""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    select: SelectConfig = SelectConfig()
    scorer: ScorerConfig | None = None
    """the small model that scores in the place of the trained one, as {model: {name: gpt2, layers:
    1}}; null: the model scores itself"""
    track: TrackConfig = TrackConfig()

    @property
    def run_name(self) -> str:
        """The name with its {keys} filled in, each value as `name_of` has it."""
        filled = re.sub(r"\{([a-z_.]+)\}", lambda key: name_of(attrgetter(key[1])(self)), self.name)
        return filled if len(filled) <= _LONGEST else f"{filled[:_LONGEST]}-{_digest(filled)}"

    @property
    def run_dir(self) -> Path:
        """The directory of this run, root/run_name."""
        return self.root / self.run_name

    @classmethod
    def disagreements(cls, values: Mapping[str, Any]) -> Iterator[str]:
        """Of the selection with the pools and the horizon, of the name with the keys."""
        data, select = (
            _filled(DataConfig(), values, "data"),
            _filled(SelectConfig(), values, "select"),
        )
        keep, pool, horizon = select["keep"], data["pool"], select["horizon"]
        if isinstance(keep, int) and isinstance(pool, int) and keep > pool:
            yield f"select.keep must be <= data.pool ({pool}), got {keep}; keep fewer or enlarge it"
        if data["name"] == "shards" and data["root"] is None:
            yield (
                "data.root must be a directory when data.name is 'shards', got None; set data.root"
            )
        known = known_keys()
        for key in re.findall(r"\{([a-z_.]+)\}", str(values.get("name"))):
            if key not in known:
                yield f"name must have known keys in braces, got {{{key}}}{nearest_key(key, known)}"
        is_offline = horizon == math.inf
        if select["replay"] is None:  # which has the weights of the run that it repeats
            yield from (f"select.{problem}" for problem in problems(select))
        yield from _of_control(select)
        yield from _of_scorer(values.get("scorer"), select)
        yield from _of_mixing(data["target_share"], select)
        if is_offline:
            yield from _of_offline(select)
            if data["shares"] in ("auto", "loss"):
                yield (
                    "data.shares must be fixed when select.horizon is .inf, which keeps nothing "
                    f"that they could follow while it records, got {data['shares']}; give numbers, "
                    "or size"
                )
        schedule = select["horizon_schedule"]
        shape = schedule.get("name") if isinstance(schedule, dict) else None
        if shape in ("linear", "step") and (isinstance(horizon, str) or is_offline):
            yield (
                "select.horizon must be an integer, the first horizon, when "
                f"select.horizon_schedule.name is {shape}, got {horizon!r}"
            )


def _of_control(select: Mapping[str, Any]) -> Iterator[str]:
    """Horizons that the controller does not know."""
    largest, first, costs = (select[key] for key in ("largest_horizon", "first_horizon", "costs"))
    if select["horizon"] != "auto" or not is_count(largest, 0):
        return
    known = AutoHorizon(largest=largest).horizons
    if first is not None and first not in known:
        yield f"select.first_horizon must be one of {known}, or null, got {first!r}"
    if isinstance(costs, dict) and sorted(map(str, costs)) != sorted(map(str, known)):
        yield (
            f"select.costs must have a number >= 1 for each of the horizons {known}, got {costs}; "
            "name them all, or set select.largest_horizon"
        )


def _of_offline(select: Mapping[str, Any]) -> Iterator[str]:
    """Fields that offline selection does not take."""
    for key, only, fix in (
        ("strategy", "influence", "; give a finite horizon"),
        ("replay", None, "; give a finite horizon"),
        ("score_view", None, ""),
        ("pools_per_update", 1, ""),
        ("score_every", 1, ""),
        ("weighting", "none", "; what is kept is trained on with equal weights"),
    ):
        value = str(select[key]) if isinstance(select[key], Path) else select[key]
        if value != only:
            rule = "null" if only is None else only
            yield f"select.{key} must be {rule} when select.horizon is .inf, got {value!r}{fix}"


def _of_scorer(scorer: object, select: Mapping[str, Any]) -> Iterator[str]:
    """Where a scorer has nothing to do, or looks ahead without steps of its own."""
    if scorer is None:
        return
    horizon, key = select["horizon"], "horizon"
    if horizon == math.inf or select["replay"] is not None:
        other = "select.horizon is .inf" if horizon == math.inf else "select.replay is given"
        yield f"scorer must be null when {other}, got {scorer!r}; nothing is scored by it then"
        return
    if horizon == "auto":
        horizon, key = select["largest_horizon"], "largest_horizon"
    if isinstance(scorer, dict) and scorer.get("optimizer", scorer) is None and horizon != 0:
        yield (
            f"select.{key} must be 0 when scorer.optimizer is null, got {horizon}: a look-ahead "
            "follows its steps; change it, or give the scorer an optimizer"
        )


def _of_mixing(share: object, select: Mapping[str, Any]) -> Iterator[str]:
    """Fields that do not go with target examples that are trained on."""
    if not isinstance(share, int | float) or not share:
        return
    rules: dict[str, tuple[str, set[Any]]] = {"horizon": ("finite", {math.inf})}
    if share < 1:  # look-aheads may leave out what is mixed in; what decides by them may not
        rules = {
            "horizon": ("an integer", {math.inf, "auto"}),
            "lr": ("schedule", {"auto"}),
            "scope": ("local", {"global"}),
        }
    for key, (rule, others) in rules.items():
        if select[key] in others:
            yield (
                f"select.{key} must be {rule} when data.target_share is {share:g}, got "
                f"{select[key]}, which does not see the target examples that are trained on; "
                "change it, or set data.target_share to 0"
            )


def _filled(section: Section, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section's plain values, the defaults where none are given."""
    given = values.get(name)
    return dict(section) | (given if isinstance(given, dict) else {})


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that the configuration knows, but this trainer does not.

    Raises:
        ConfigError: `value` is not among `choices`.
    """
    if value not in choices:
        raise ConfigError(
            f"{key} must be one of {', '.join(choices)} for this trainer, got {value!r}; the "
            "others belong to another program in trainers/"
        )


def known_keys() -> list[str]:
    """Dotted paths of all keys of a run's configuration, sections included."""
    return keys_of(RunConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run, as `load_as` reads it."""
    return load_as(RunConfig, path, overrides)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON schema of RunConfig, with types, ranges, defaults and descriptions."""
    text = json.dumps(RunConfig.model_json_schema(), indent=2)
    return text.replace(r"\n", " ")  # of descriptions, which are wrapped in the source
