"""Train a causal language model with data selection.

    python trainers/language.py configs/text_online.yaml [key=value ...]
    torchrun --nproc-per-node 2 trainers/language.py configs/text_online.yaml [parallel=fsdp2 ...]

The configuration says everything; `selectflow schema` lists what it can say.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectflow.data import (
    PoolStream,
    TextOptions,
    Tokenizer,
    make_text,
    open_tokenizer,
    read_batches,
    read_metadata,
)
from selectflow.data.manifest import TOKENIZER_NAME
from selectflow.data.tokenizers import (
    ByteTokenizer,
    SubwordTokenizer,
    load_tokenizer,
    same_vocabulary,
)
from selectflow.distributed import here
from selectflow.models.language import (
    IGNORED,
    NO_DROPOUT,
    causal_lm_losses,
    document_positions,
    pretrained_lm,
    token_window,
    untrained_lm,
    with_lora,
)
from selectflow.run.config import ConfigError, RunConfig, check_choice
from selectflow.run.loop import trainer_main
from selectflow.run.sections import DataConfig, ModelConfig
from selectflow.run.task import Task

Batch = dict[str, Any]
EVAL_BATCH = 64
MODELS = ("gpt2", "llama")


def build_model(
    config: ModelConfig, length: int, tokenizer: Tokenizer, key: str = "model"
) -> nn.Module:
    """The configured model, which fits sequences of `length` tokens and the tokenizer.

    Args:
        config: of the model.
        length: tokens of the longest sequence.
        tokenizer: of the data.
        key: where it is configured, for errors.
    """
    assert config.name in ("gpt2", "llama")
    options = NO_DROPOUT if config.name == "gpt2" else {}
    if config.pretrained is not None:
        model = pretrained_lm(config.name, config.pretrained, **options)
    elif config.width % config.heads:
        raise ConfigError(
            f"{key}.width must be a multiple of {key}.heads ({config.heads}), got {config.width}"
        )
    else:
        sizes = (config.positions or length, config.width, config.layers, config.heads)
        model = untrained_lm(
            config.name, tokenizer.num_tokens, *sizes, end=tokenizer.end, **options
        )
    positions = int(model.config.max_position_embeddings)
    if length > positions:
        raise ConfigError(
            f"data.text.block must be at most the model's {positions} positions, got sequences of "
            f"{length} tokens; shorten it, or raise {key}.positions"
        )
    check_tokenizer(config, tokenizer, model, key)
    return with_lora(model, config.name, config.lora_rank) if config.lora_rank else model


def check_tokenizer(config: ModelConfig, tokenizer: Any, model: nn.Module, key: str) -> None:
    """Refuse weights that were trained on other tokens than those of the shards."""
    if config.pretrained is None:
        return
    if has_bytes(config.pretrained, model):
        theirs: Any = ByteTokenizer()
    else:
        theirs = load_tokenizer(config.pretrained)
    if not same_vocabulary(tokenizer, theirs):
        raise ConfigError(
            f"data.text.tokenizer must be that of {key}.pretrained, {config.pretrained!r}, got "
            "another vocabulary in the shards' manifest; write the shards again with it"
        )


def check_sources(sources: Mapping[str, Any] | None, tokenizer: Tokenizer) -> None:
    """Refuse sources of other tokens than those of the target."""
    for name, source in (sources or {}).items():
        if not same_vocabulary(open_tokenizer(source), tokenizer):
            raise ConfigError(
                f"data.sources must have the tokenizer of the target, got another one in {name!r}; "
                "write its shards again with it"
            )


def has_bytes(pretrained: str, model: Any) -> bool:
    """Whether a model of a folder reads bytes: there is no tokenizer, and its ids are theirs."""
    folder, ids = Path(pretrained), (model.config.vocab_size, model.config.eos_token_id)
    is_alone = folder.is_dir() and not (folder / TOKENIZER_NAME).exists()
    return is_alone and ids == (ByteTokenizer.num_tokens, ByteTokenizer.end)


def save(model: Any, tokenizer: Tokenizer, folder: Path, weights: Mapping[str, Any]) -> None:
    """Write the weights as `model.pretrained` reads them, or adapters alone, and the tokenizer."""
    # peft would else look for the base model on Hugging Face, to see whether tokens were added
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=weights, **options)
    if isinstance(tokenizer, SubwordTokenizer):
        (folder / TOKENIZER_NAME).write_text(tokenizer.to_json(), encoding="utf-8")


def model_inputs(batch: Batch, end: int, separate: bool) -> Batch:
    """What the model takes of a batch of blocks; padding does not count.

    Args:
        batch: `tokens`, (N, L), and `key`.
        end: id that ends a document, and fills a block that it leaves empty.
        separate: whether documents in one block are kept apart.
    """
    tokens = batch["tokens"]
    padding = tokens == end
    padding[:, 1:] &= padding[:, :-1].clone()  # the first `end` ends the document
    padding[:, 0] = False
    labels = tokens.masked_fill(padding, IGNORED)
    inputs = {"input_ids": tokens, "labels": labels, "key": batch["key"]}
    return inputs | ({"position_ids": document_positions(tokens, end)} if separate else {})


def loss_fn(end: int, separate: bool = False) -> Callable[[nn.Module, Batch], Tensor]:
    """Mean cross-entropy over the tokens of each example, shape (N,); padding does not count."""

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        is_view = "input_ids" in batch  # as `score_view` makes it
        return causal_lm_losses(model, batch if is_view else model_inputs(batch, end, separate))

    return losses


def score_view(end: int, separate: bool, num_tokens: int) -> Callable[[Batch], Batch]:
    """A view of blocks that is cheaper to score: `num_tokens` tokens of each."""
    window = token_window(num_tokens)
    return lambda batch: window(model_inputs(batch, end, separate))


def mean_loss(
    losses: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batches: Sequence[Batch]
) -> dict[str, float]:
    """Mean loss over all examples of `batches`."""
    found = torch.cat([losses(model, batch) for batch in batches])
    return {"loss": float(found.mean())}


def kinds_of(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """Ids of the samples by recorded origin, and of all that were altered."""
    kinds: dict[str, set[str]] = defaultdict(set, altered=set())
    for key, made in metadata.items():
        kinds[made.get("origin", "unknown")].add(key)
        if made.get("altered"):
            kinds["altered"].add(key)
    return {kind: frozenset(keys) for kind, keys in kinds.items()}


def make_data(data: DataConfig) -> None:
    """Write the shards, where they are ours to write and are not there yet."""
    if data.name == "text":
        make_text(data.directory, TextOptions(**data.text.model_dump()), seed=data.seed)


def build_task(config: RunConfig) -> Task:
    """The model, its data and how it is judged; the same for the same configuration."""
    data = config.data
    check_choice("model.name", config.model.name, MODELS)
    if config.scorer is not None:
        check_choice("scorer.model.name", config.scorer.model.name, MODELS)
    check_choice("data.name", data.name, ("text", "shards"))
    processes = here()
    processes.on_first(lambda: make_data(data))
    tokenizer = open_tokenizer(data.directory)
    check_sources(data.sources, tokenizer)
    share = {"rank": processes.rank, "world_size": processes.size}
    reading = {"pool": data.pool, "seed": config.seed} | data.reading | data.mixing | share
    pools = PoolStream(data.trained_on, **reading)
    target = read_batches(data.directory, "target", data.target_batch)
    metadata = {}
    if config.track.kinds:
        metadata = read_metadata(data.trained_on, "train", max_errors=data.max_errors)
    torch.manual_seed(config.seed)
    length = target[0]["tokens"].shape[1]
    model, scorer = build_model(config.model, length, tokenizer), None
    if config.scorer is not None:
        if config.scorer.downscale > 1:
            raise ConfigError(
                f"scorer.downscale must be 1 for text, got {config.scorer.downscale}; "
                "select.score_view scores fewer tokens"
            )
        scorer = build_model(config.scorer.model, length, tokenizer, "scorer.model")
    losses = loss_fn(tokenizer.end, data.separate_documents)
    return Task(
        model=model,
        loss_fn=losses,
        evaluate=partial(mean_loss, losses),
        pools=pools,
        target=target,
        test=read_batches(data.directory, "test", EVAL_BATCH),
        kinds=kinds_of(metadata),
        source=data.trained_on,
        show=lambda batch, index: tokenizer.decode(batch["tokens"][index].tolist()),
        score_view=partial(score_view, tokenizer.end, data.separate_documents),
        scorer=scorer,
        save=partial(save, model, tokenizer),
    )


def main(arguments: Sequence[str]) -> int:
    """Run a configuration; the exit status."""
    return trainer_main(arguments, build_task, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
