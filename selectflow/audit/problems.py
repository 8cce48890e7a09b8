"""What studies train: a model and its data, the same in every precision, and the runs.

Images are scikit-learn's digits, text is the standard library's source. GPT-2 is trained whole,
Llama by its LoRA adapters, with norms in the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from selectflow.audit.study import (
    AuditConfig,
    CNNModel,
    GPT2Model,
    LlamaModel,
    MLPModel,
    Model,
    ProxyConfig,
    Study,
)
from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate
from selectflow.core.optim import Adjoint, State
from selectflow.core.params import Params
from selectflow.core.passes import LossFn, Objective
from selectflow.core.sweep import SweepStep, Window, sweep
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.update import Update
from selectflow.data.documents import python_sources
from selectflow.fields import ConfigError
from selectflow.models.language import (
    causal_lm_losses,
    load_pretrained,
    norms_in_own_precision,
    pretrained_lm,
    untrained_lm,
    with_lora,
)
from selectflow.models.vision import image_losses, mlp, plain_cnn
from selectflow.offline.record import record
from selectflow.offline.trajectory import Trajectory

# --- models and examples --------------------------------------------------------------------------

_DIGIT, _NUM_CLASSES = (1, 8, 8), 10
_BYTES = 256
_CHARACTERS_PER_FILE = 4096  # so that a few long files do not make up the text


class Problem(NamedTuple):
    """What a kind of model learns.

    Attributes:
        build: section of the configuration -> model with fresh weights.
        examples: section -> all examples there are, a mapping of tensors.
        loss_fn: per-example losses.
        adapt: section, model -> what of it is recorded, made after the steps before the recording.
    """

    build: Callable[[Any], nn.Module]
    examples: Callable[[Any], Batch]
    loss_fn: LossFn
    adapt: Callable[[Any, nn.Module], nn.Module] = lambda _, model: model


def _gpt2(config: GPT2Model) -> nn.Module:
    if config.pretrained is not None:
        return pretrained_lm("gpt2", config.pretrained)
    if config.shape == "small":
        return untrained_lm("gpt2", _BYTES, config.block, width=32, layers=2, heads=2)
    return untrained_lm("gpt2", 50257, 1024, width=768, layers=12, heads=12, end=50256)


def _llama(config: LlamaModel) -> nn.Module:
    if config.pretrained is not None:
        model = pretrained_lm("llama", config.pretrained)
    elif config.shape == "small":
        sizes: dict[str, Any] = {"width": 32, "layers": 2, "heads": 4, "num_key_value_heads": 2}
        model = untrained_lm("llama", _BYTES, 2048, **sizes)
    else:  # Llama-3.2-1B
        sizes = {"width": 2048, "layers": 16, "heads": 32, "num_key_value_heads": 8}
        sizes |= {"intermediate_size": 8192, "head_dim": 64, "rms_norm_eps": 1e-5}
        sizes |= {"tie_word_embeddings": True, "bos_token_id": 128000, "end": 128001}
        model = untrained_lm("llama", 128256, 2048, **sizes)
    norms_in_own_precision(model)
    return model


def _digits(_: MLPModel | CNNModel) -> Batch:
    """All 1797 digits: images in [0, 1], shape (N, 1, 8, 8), float32, and labels, shape (N,)."""
    # imported here because it takes a second, which only an audit need spend
    from sklearn.datasets import load_digits  # noqa: PLC0415

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    return {"image": images, "label": torch.tensor(bunch.target)}


def _source_blocks(config: GPT2Model | LlamaModel) -> Batch:
    """The heads of all source files of the standard library, as blocks of tokens.

    Returns:
        `{"input_ids": (N, block)}`, int64: bytes, or tokens of the pretrained model's tokenizer.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    encode: Callable[[str], Any] = lambda text: list(text.encode())  # noqa: E731
    if config.pretrained is not None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        encode = load_pretrained(AutoTokenizer.from_pretrained, config.pretrained).encode
    tokens = [encode(text[:_CHARACTERS_PER_FILE]) for text in python_sources()]
    blocks = [
        torch.tensor(file)[: len(file) // config.block * config.block].view(-1, config.block)
        for file in tokens
    ]
    return {"input_ids": torch.cat(blocks).long()}


PROBLEMS = {
    "mlp": Problem(
        lambda config: mlp(64, _NUM_CLASSES, config.hidden, config.activation),
        _digits,
        image_losses,
    ),
    "cnn": Problem(
        lambda config: plain_cnn(_DIGIT, _NUM_CLASSES, config.width, config.activation),
        _digits,
        image_losses,
    ),
    "gpt2": Problem(_gpt2, _source_blocks, causal_lm_losses),
    "llama": Problem(
        _llama,
        _source_blocks,
        causal_lm_losses,
        lambda config, model: with_lora(model, "llama", config.lora_rank),
    ),
}
"""Kind of a model -> what it learns."""


@lru_cache(maxsize=1)
def _examples(config: Model) -> Batch:
    return PROBLEMS[config.kind].examples(config)


def build_adamw(config: Study, model: nn.Module, lr: float) -> AdamW:
    """The audited optimizer, of the parameters that are trained."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return AdamW(trained, lr, config.betas, config.eps, config.weight_decay)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in another precision."""
    return {
        name: values.to(dtype) if values.is_floating_point() else values
        for name, values in batch.items()
    }


def spoiled(examples: Batch, share: float, generator: torch.Generator) -> Batch:
    """A share of the examples with a wrong label, or with their tokens in random order."""
    num = num_examples(examples)
    chosen = torch.randperm(num, generator=generator)[: round(share * num)]
    name = "label" if "label" in examples else "input_ids"
    values = examples[name].clone()
    if name == "label":
        classes = int(values.max()) + 1
        shift = torch.randint(1, classes, chosen.shape, generator=generator)
        values[chosen] = (values[chosen] + shift) % classes
    else:
        for row in chosen.tolist():
            values[row] = values[row, torch.randperm(values.shape[1], generator=generator)]
    return {**examples, name: values}


# --- recorded runs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class AuditedRun:
    """A run that can be recorded: its model at the start, its batches, and the queries.

    Examples are shuffled by the seed: first come the queries, then the recorded batches, then
    those of the steps before the recording.

    Attributes:
        config: of the audit.
        seed: of the weights and of the order of the data.
        dtype: of parameters and images; the values are those of float32 in every precision. None:
            that of the configuration.
    """

    config: AuditConfig
    seed: int
    dtype: torch.dtype | None = None

    def record(self, lr: float, spacing: int = 1) -> Trajectory:
        """A run at one learning rate, with a snapshot every `spacing` updates.

        Raises:
            ConfigError: there are too few examples, or pretrained weights cannot be loaded.
            ValueError: the memory limit is below two states.
        """
        config = self.config
        model = self.model().to(self._dtype)
        optimizer = build_adamw(config, model, lr)
        scheduler: LRScheduler | None = None
        if config.schedule == "cosine":
            scheduler = CosineAnnealingLR(optimizer, config.steps)
        trajectory = record(
            model,
            optimizer,
            PROBLEMS[config.model.kind].loss_fn,
            [self.batch(step) for step in range(config.steps)],
            scheduler,
            spacing=spacing,
            limit_gib=config.memory_gib,
        )
        optimizer.state.clear()  # a scheduler and its optimizer hold each other: two large moments
        return trajectory

    def model(self) -> nn.Module:
        """The model in float32 where the recording begins."""
        config = self.config
        model = _fresh(config.model, self.seed)
        if config.warm_steps:
            model.load_state_dict(_warmed(config, self.seed))
        torch.manual_seed(self.seed)
        return PROBLEMS[config.model.kind].adapt(config.model, model)

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        start = self.config.num_queries + step * self.config.batch
        return self._take(slice(start, start + self.config.batch))

    def queries(self) -> Batch:
        """The examples whose losses are measured; never trained on."""
        return self._take(slice(0, self.config.num_queries))

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype or self.config.precision

    def _take(self, part: slice) -> Batch:
        return cast(take(_examples(self.config.model), self._order()[part]), self._dtype)

    def _order(self) -> Tensor:
        config, known = self.config, num_examples(_examples(self.config.model))
        used = config.num_queries + (config.steps + config.warm_steps) * config.batch
        if used > known:
            raise ConfigError(
                f"num_queries + (steps + warm_steps) * batch must be <= {known}, the examples "
                f"there are, got {used}; lower one of them"
            )
        return torch.randperm(known, generator=torch.Generator().manual_seed(self.seed))


def _fresh(config: Model, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return PROBLEMS[config.kind].build(config)


@lru_cache(maxsize=1)
def _warmed(config: AuditConfig, seed: int) -> dict[str, Tensor]:
    """State dict after the steps before the recording, in float32."""
    run, model = AuditedRun(config, seed, torch.float32), _fresh(config.model, seed)
    loss_fn = PROBLEMS[config.model.kind].loss_fn
    optimizer = build_adamw(config, model, config.warm_lr)
    model.train()
    for step in range(config.steps, config.steps + config.warm_steps):
        loss = loss_fn(model, run.batch(step)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


# --- runs that stop in their middle ---------------------------------------------------------------


class ProxyRun:
    """A run trained in stretches; deterministic, as scores are: dropout is off.

    Args:
        config: of the study.
        lr: learning rate.
        seed: of the weights and of the data.

    Raises:
        ConfigError: there are too few examples.
    """

    def __init__(self, config: ProxyConfig, lr: float, seed: int) -> None:
        problem = PROBLEMS[config.model.kind]
        self.config, self.lr, self.seed = config, lr, seed
        self.generator = torch.Generator().manual_seed(seed)
        examples = problem.examples(config.model)
        known = num_examples(examples)
        used = config.num_target + max(round(config.batch / keep) for keep in (*config.keeps, 1))
        if used > known:
            raise ConfigError(
                f"num_target + batch / keeps must be <= {known}, the examples there are, got "
                f"{used}; lower one of them"
            )
        order = torch.randperm(known, generator=self.generator)
        examples = cast(take(examples, order), config.precision)
        self.target = take(examples, slice(config.num_target))
        rest = take(examples, slice(config.num_target, None))
        self.rest = spoiled(rest, config.noise, self.generator)
        torch.manual_seed(seed)
        model = problem.adapt(config.model, problem.build(config.model))
        self.model = model.to(config.precision).eval()
        self.optimizer = build_adamw(config, self.model, lr)
        self.reader = OptimizerReader(self.model, self.optimizer)
        self.derivatives = Derivatives(Objective(self.model, problem.loss_fn), "exact")

    def batch(self, size: int) -> Batch:
        """The next examples, none twice in a batch."""
        order = torch.randperm(num_examples(self.rest), generator=self.generator)
        return take(self.rest, order[:size])

    def updates(self) -> list[Update]:
        """The next updates, as many as the longest horizon reads."""
        return self.reader.updates(max(*self.config.horizons, 1))

    def train(self, steps: int) -> None:
        """Take plain training steps."""
        loss_fn = PROBLEMS[self.config.model.kind].loss_fn
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss_fn(self.model, self.batch(self.config.batch)).mean().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.optimizer.zero_grad()

    def best_scored(
        self,
        state: State,
        updates: Sequence[Update],
        pools: Sequence[Batch],
        nominal: Sequence[Tensor],
        horizon: int,
    ) -> list[Tensor]:
        """The B examples of each pool with the highest scores, by one look-ahead of this horizon.

        `nominal` are the positions of the examples of each pool that the look-ahead trains on.
        """
        derivatives = self.derivatives
        found = dict[int, Tensor]()

        def choose(index: int, params: Params, gamma: Params) -> None:
            _, slopes = derivatives.directional(params, gamma, pools[index])
            found[index] = slopes.argsort(stable=True)[: self.config.batch]

        def keep(visit: SweepStep) -> None:
            gamma = updates[visit.index].masked(visit.gamma, visit.after)
            choose(visit.index, visit.state.params, gamma)

        def read_target(end: State) -> Adjoint:
            _, grad = derivatives.gradient(end.params, self.target)
            return Adjoint(grad, end.exp_avg.zeros_like(), end.exp_avg_sq.zeros_like())

        if horizon == 0:
            choose(0, state.params, immediate(derivatives, updates[0], state, self.target).gamma(0))
        else:
            window = Window(derivatives, updates[:horizon], lambda i, _: take(pools[i], nominal[i]))
            sweep(window, state, read_target, keep, capacity=horizon)
        return [found[index] for index in sorted(found)]
