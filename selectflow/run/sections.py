"""The sections of a run's configuration: data, model, optimizer, schedules and selection."""

import math
import re
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from selectflow.control.ladder import AutoHorizon
from selectflow.control.shares import AutoShares
from selectflow.core.counts import is_count
from selectflow.fields import Count, Directory, Section, expanded, must_be
from selectflow.options import SelectOptions
from selectflow.strategies import STRATEGIES

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


def _expanded_source(value: object) -> object:
    """A source of text with its path expanded: `files:~/texts`."""
    if not isinstance(value, str) or not value.startswith(("files:", "jsonl:")):
        return value
    kind, _, path = value.partition(":")
    return f"{kind}:{expanded(path)}"


def _path_or_url(value: object) -> object:
    return Path(value) if isinstance(value, str) and "://" not in value else value


def _holds_splits(value: object) -> bool:
    """Whether a location may have a target set and a test set besides what is trained on."""
    return not re.search(r"[{]|\.tar($|\?)|^pipe:", str(value))


# a path would lose one of the slashes of "s3://"
Expanded = Annotated[str, BeforeValidator(expanded)]  # a path or a name
Location = Directory | Annotated[str, Field(pattern="^[a-z0-9+]+://")]
Place = Annotated[Location, BeforeValidator(_path_or_url), BeforeValidator(expanded)]


class _Section(Section, use_attribute_docstrings=True):
    """A section whose fields are each described by the string below it."""


class TextConfig(_Section):
    """What blocks of text are made of, as `selectflow shards make text` makes them."""

    source: Annotated[str, BeforeValidator(_expanded_source)] = "python"
    """python: Python's own source and prose; files:FOLDER; jsonl:FILE; hf:NAME"""
    tokenizer: Expanded = "bytes"
    """bytes; bpe:SIZE, trained on the text; or an existing one"""
    block: Annotated[int, Field(ge=2)] = 128
    """tokens of an example"""
    rest: Literal["drop", "pad", "pack"] = "drop"
    """what happens to tokens that do not fill a block"""
    target_domain: str | None = "code"
    """domain of the target and test sets; null: all"""
    mixture: dict[str, Annotated[float, Field(ge=0, le=1)]] | None = None
    """shares of domains and of dirt (shuffled, duplicate, boilerplate) in the stream; null: all
    clean text"""
    num_train: Count | None = None
    """examples of the stream; null: all; needed for a mixture"""
    num_target: Count = 200
    """examples of the target set"""
    num_test: Count = 400
    """examples of the test set"""


class LiveSharesConfig(_Section):
    """How live shares of sources move: p in proportion to q a^strength."""

    strength: Positive | None = AutoShares.strength
    """exponent of a, the kept rate of a source over that of all; null: 16 (1 for losses)"""
    memory: float = Field(default=AutoShares.memory, ge=1)
    """pools after which a count has lost about two thirds"""
    prior: Positive = AutoShares.prior
    """candidates of the mean rate that are added to each source, against noise"""
    floor: float = Field(default=AutoShares.floor, gt=0, le=1)
    """share of its starting share q that a source always keeps"""
    drift: Positive = AutoShares.drift
    """most nats between starting and live shares"""
    delay: int = Field(default=AutoShares.delay, ge=0)
    """pools between a selection and the first that follows it: more than workers and look-aheads
    draw ahead"""


class DataConfig(_Section):
    """Where the examples come from."""

    name: Literal["digits", "text", "shards"] = "digits"
    """digits, text: written on first use; shards: an existing directory"""
    text: TextConfig = TextConfig()
    """how text is made (text)"""
    root: Annotated[
        Location | None,
        BeforeValidator(_path_or_url),
        must_be("a directory with the splits train, target and test, or its URL", _holds_splits),
        BeforeValidator(expanded),  # the last is the first to run
    ] = None
    """directory of the shards, or its URL (s3, gs, hf, https: extra `remote`); null: data/<name and
    options> for digits and text"""
    sources: Annotated[dict[str, Place], Field(min_length=1)] | None = None
    """what is trained on, by name, instead of the split train of root: directories with that split,
    brace patterns of shards, or URLs; target and test set stay those of root"""
    by: str | None = None
    """what names the source of each sample instead: shard, key (what is before its first slash) or
    json.FIELD; null: nothing"""
    shares: Literal["size", "auto", "loss"] | dict[str, Positive] | None = None
    """share of each source in the pools: numbers by name; size: in proportion to its samples; auto:
    so at first, then following what is kept; loss: following the losses, a baseline; null: an epoch
    has every sample of all once"""
    live_shares: LiveSharesConfig = LiveSharesConfig()
    """how shares move (shares: auto, loss)"""
    max_epochs: Count | None = None
    """times that a sample may be drawn; a source that is used up is left out, and the run ends
    with the last source; null: any number"""
    label_noise: float = Field(default=0.0, ge=0, lt=1)
    """share of training labels made wrong (digits)"""
    seed: int = Field(default=0, ge=0)
    """seed of the written shards: which labels are altered"""
    separate_documents: bool = False
    """documents that share a block (text.rest: pack) do not see each other: positions begin again
    after each end token. A block's loss and score are then the means of its documents', weighted by
    their predicted tokens (language)"""
    pool: Count = 64
    """P: candidate examples of one optimizer step"""
    num_workers: int = Field(default=0, ge=0)
    """processes that read and decode; 0: the training process"""
    buffer: Count = 4096
    """samples that are shuffled together"""
    memory_gib: float = Field(default=1.0, ge=0)
    """decoded data up to this size, in GiB, are held in memory"""
    max_errors: int = Field(default=0, ge=0)
    """unreadable samples before the run stops; 0: the first does"""
    target_batch: Count = 200
    """examples of one batch of the target set"""
    target_share: float = Field(default=0.0, ge=0, le=1)
    """share of each batch that is of the target set, beside what is kept of the stream: 4 are added
    to 12 that are kept at 0.25, in a pass of their own. 1: the pools are of the target set alone.
    Look-aheads simulate steps without them. 0: it is never trained on"""
    target_held_out: float = Field(default=0.2, gt=0, lt=1)
    """share of the target set that is not trained on, when target_share is above 0: target/loss is
    of this part alone. Selection is by what is mixed in, and at a share of 1 by this part"""

    @property
    def directory(self) -> Path | str:
        """The directory or URL of the shards, `root` or the one derived from the options."""
        if self.root is not None:
            return self.root
        if self.name == "text":
            options = zlib.crc32(self.text.model_dump_json().encode())
            return Path("data", f"text-{options:08x}-seed{self.seed}")
        return Path("data", f"digits-noise{self.label_noise:g}-seed{self.seed}")

    @property
    def trained_on(self) -> Path | str | dict[str, Path | str]:
        """What the pools come from, as `PoolStream` takes it: the sources, or the directory."""
        return self.sources or self.directory

    @property
    def mixing(self) -> dict[str, Any]:
        """Arguments of `PoolStream` that say what is drawn from which source."""
        shares: Any = self.shares
        if shares in ("auto", "loss"):
            follow: Any = {"auto": "kept", "loss": "loss"}[shares]
            shares = AutoShares(follow=follow, **self.live_shares.model_dump())
        return {"by": self.by, "shares": shares, "max_epochs": self.max_epochs}

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of `PoolStream` that say how shards are read."""
        return self.model_dump(include={"buffer", "num_workers", "memory_gib", "max_errors"})


# --- model and training ---------------------------------------------------------------------------


class ModelConfig(_Section):
    """The network that is trained."""

    name: Literal["mlp", "cnn", "resnet18", "gpt2", "llama"] = "mlp"
    """architecture: mlp, cnn, resnet18 (trainers/vision.py), gpt2, llama (trainers/language.py)"""
    hidden: tuple[Count, ...] = Field(default=(128, 128), strict=False)
    """units of each hidden layer (mlp)"""
    width: Count = 16
    """channels of the first convolution (cnn); size of a token's embedding, a multiple of `heads`
    (gpt2, llama)"""
    num_classes: Count | None = None
    """classes; null: as many as the labels have, all of which are then read before the first step
    (mlp, cnn, resnet18)"""
    layers: Count = 4
    """transformer blocks (gpt2, llama)"""
    heads: Count = 4
    """attention heads of a block (gpt2, llama)"""
    positions: Count | None = None
    """longest sequence, in tokens; null: that of the data (gpt2, llama)"""
    pretrained: Expanded | None = None
    """weights to begin with: a folder of save_pretrained or a Hugging Face name, whose sizes then
    hold (gpt2, llama)"""
    lora_rank: int = Field(default=0, ge=0)
    """rank of LoRA adapters; 0: every weight is trained"""


class OptimizerConfig(_Section):
    """The optimizer, with the names and meanings of torch.optim."""

    name: Literal["adamw", "sgd"] = "adamw"
    """torch.optim.AdamW or SGD"""
    lr: float = Field(default=3e-3, gt=0)
    """learning rate"""
    weight_decay: float = Field(default=0.01, ge=0)
    """decay per update; decoupled in adamw, added to the gradient in sgd"""
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)
    """decay of exp_avg and of exp_avg_sq (adamw)"""
    eps: float = Field(default=1e-8, gt=0)
    """added to the root of exp_avg_sq (adamw)"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """momentum (sgd)"""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """clip the gradient to this norm; null: no clipping"""


class ScorerConfig(_Section):
    """A small model that scores the candidates, trained beside the one that is trained."""

    model: ModelConfig = ModelConfig()
    """its network, of the same trainer"""
    optimizer: OptimizerConfig | None = OptimizerConfig()
    """its own, stepped on what is kept; null: it stays as it is"""
    downscale: Count = 1
    """it sees images of so many times fewer rows and columns, each pixel the mean of a square
    (mlp, cnn, resnet18)"""


class TrainConfig(_Section):
    """How the gradient of an update is computed."""

    accumulate: Count = 1
    """micro-batches that the kept samples of an update are passed in, one after the other: less
    memory, the same gradient (but for batch norm)"""
    autocast: Annotated[
        Literal["bf16"] | None,
        must_be(
            "bf16 or null (not fp16: its gradients underflow unless the loss is scaled, and a "
            "scaler skips steps that the look-ahead counts on; bf16 has the range of float32)",
            lambda value: value in ("bf16", None),
        ),
    ] = None
    """bf16: matrix products of training and scoring in bfloat16; parameters, their gradients and
    simulated updates stay in float32. null: everything in float32"""
    checkpointing: bool = False
    """recompute the activations of each transformer block in the backward pass of the training
    step: less memory, the same gradient, a third more time (gpt2, llama)"""
    compile: bool = False
    """torch.compile the model of the training step: its first steps take long, and it needs a C++
    compiler"""


# --- what changes over the run --------------------------------------------------------------------

Milestone = Annotated[
    tuple[Count, Annotated[int, Field(ge=0)]],
    Field(strict=False),
    must_be(
        "a pair [step, horizon]", lambda value: isinstance(value, Sequence) and len(value) == 2
    ),
]

Milestones = tuple[int, ...] | tuple[Milestone, ...]


def _check_milestones(value: Milestones, info: ValidationInfo) -> Milestones:
    steps = [each if isinstance(each, int) else each[0] for each in value]
    rule = None
    if info.data.get("name") == "step" and not steps:
        rule = "given when name is step"
    elif any(earlier >= later for earlier, later in pairwise(steps)):
        rule = "in rising order of step"
    if rule:
        raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})
    return value


class ScheduleConfig(_Section):
    """The learning rate over the run, as a multiple of optimizer.lr."""

    name: Literal["constant", "cosine", "linear", "step"] = "constant"
    """shape after the warm-up"""
    warmup_steps: int = Field(default=0, ge=0)
    """steps of linear rise from 0 to optimizer.lr"""
    final: float = Field(default=0.0, ge=0, le=1)
    """share of optimizer.lr left at the last step (cosine, linear)"""
    milestones: tuple[Count, ...] = Field(default=(), strict=False, validate_default=True)
    """rising steps, at each of which the rate is multiplied by `factor` (step)"""
    factor: float = Field(default=0.1, gt=0, le=1)
    """of the rate at each milestone (step)"""

    _rise = field_validator("milestones")(_check_milestones)


class HorizonScheduleConfig(_Section):
    """The horizon over the run; it begins at select.horizon."""

    name: Literal["constant", "linear", "step"] = "constant"
    """constant: select.horizon; linear: in equal parts to `final`; step: by list"""
    final: int = Field(default=0, ge=0)
    """horizon of the last step (linear)"""
    milestones: tuple[Milestone, ...] = Field(default=(), strict=False, validate_default=True)
    """pairs [step, horizon], steps rising: the horizon from that step on (step)"""

    _rise = field_validator("milestones")(_check_milestones)


# --- selection ------------------------------------------------------------------------------------


def _is_horizon(value: object) -> bool:
    return is_count(value, 0) or value in (math.inf, "auto")


class SelectConfig(SelectOptions, use_attribute_docstrings=True):
    """Which examples of a pool are trained on."""

    strategy: Literal[*STRATEGIES] = "influence"  # type: ignore[valid-type]
    """influence: by look-ahead; uniform: at random; loss: largest first; the others are baselines,
    each described where it is in selectflow.strategies.baselines"""
    horizon: Annotated[
        Annotated[int, Field(ge=0)] | Annotated[float, Field(allow_inf_nan=True)] | Literal["auto"],
        must_be("an integer >= 0, auto or .inf", _is_horizon),
    ] = 1
    """H: optimizer updates from scoring to reading the target loss; auto: the controller's choice,
    also not to select; .inf: offline, a run on everything is recorded first, and only its best
    samples are trained on"""
    largest_horizon: int = Field(default=8, ge=0)
    """the largest horizon that the controller may choose (auto)"""
    allow_plain: bool = True
    """whether the controller may also choose not to select, where plain training gains more in the
    same time (auto): give such a run its time by max_wall_s, and steps enough"""
    first_horizon: Annotated[int, Field(ge=0)] | None = None
    """the horizon that the controller begins with (auto), as 0 where the model already tells good
    examples from bad, in fine-tuning; null: plain training, where it may choose that, else 0"""
    control_share: float = Field(default=AutoHorizon.share, gt=0, le=1)
    """share of the run's cost that contests of horizons may take (auto)"""
    # a run's config.yaml has the horizons as text, as JSON has all keys
    costs: dict[Annotated[int, Field(strict=False)], float] | None = None
    """steps of plain training that a step selected with each horizon costs, as {0: 3.0, 1: 5.0}
    (auto): decisions then do not depend on the machine's clock; null: measured"""
    horizon_schedule: HorizonScheduleConfig = HorizonScheduleConfig()
    """how the horizon changes over the run"""
    lr: Literal["schedule", "auto"] = "schedule"
    """learning rate: as scheduled, or multiplied by what the controller chooses"""
    lr_lowest: float = Field(default=1 / 64, gt=0, le=1)
    """the smallest multiplier of the schedule (lr: auto)"""
    lr_highest: float = Field(default=64.0, ge=1)
    """the largest multiplier of the schedule (lr: auto)"""
    score_view: Annotated[int, Field(ge=2)] | None = None
    """tokens of each example of the pools and of the target that are scored, the first ones that
    count; training is on all of them. null: all (gpt2, llama)"""
    record_steps: Count | None = None
    """optimizer steps of the recorded run (offline), whose batches are held in memory; null:
    steps"""
    record_lr: float | None = Field(default=None, gt=0)
    """learning rate of the recorded run (offline): scores are the more faithful the smaller it is;
    null: optimizer.lr"""
    keep_samples: float = Field(default=0.5, gt=0, le=1)
    """share of the recorded samples kept (offline)"""
    replay: Directory | None = None
    """run directory: train on exactly what it kept, without scoring; needs its dataset, pool size
    and seed, and leaves the fields above unused"""

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
