"""Causal language models of transformers: their losses by example, GPT-2, Llama and adapters.

Batches are those of transformers: `input_ids`, and where there are, `labels`, `attention_mask` and
`position_ids`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selectflow.core.batches import describe
from selectflow.core.wrappers import unadapted, uncompiled, unwrap
from selectflow.fields import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Architecture = Literal["gpt2", "llama"]

IGNORED = -100  # label of a position that does not count, as everywhere in torch and transformers

_PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
_MODEL_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_NOT_GIVEN = ("labels", "use_cache")  # the loss is taken from the logits

# --- losses of each example -----------------------------------------------------------------------


def causal_lm_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Loss of each example: the mean, over its tokens that count, of -log p(token | those before).

    A token counts unless `shifted_labels` leaves it out. The loss is taken from the logits, since
    the loss that a model computes from labels is the mean of a whole batch. Logits in half
    precision are read in float32.

    Args:
        model: a causal language model of transformers, peft or alike: called with keywords, it
            returns an object with `logits` of shape (N, L, vocabulary).
        batch: `input_ids`, (N, L), and where there are `labels`, `attention_mask`, `position_ids`.
            Other entries are given to the model if its `forward` names them, as `pixel_values`;
            keys and alike are not.

    Returns:
        Losses of shape (N,), in nats.

    Raises:
        ValueError: an example has no token that counts, which it names; labels or logits are not
            one for each token.
        TypeError: the model returns no logits, or has an encoder and a decoder.
    """
    own = uncompiled(unwrap(model))
    if getattr(getattr(own, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            "the loss of a causal language model must be taken of one without an encoder, got "
            f"{type(own).__name__}; pass a loss_fn that gives the decoder its inputs"
        )
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if labels is not None and ids is not None and labels.shape != ids.shape:
        raise ValueError(
            f"labels of a causal language model must be one for each token, shape "
            f"{tuple(ids.shape)}, got {tuple(labels.shape)}; for classes or values of whole "
            "examples pass a loss_fn of their own"
        )
    targets = shifted_labels(batch)
    logits = _logits(model, batch)
    if logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise ValueError(
            f"the model must return one row of logits for each token, shape "
            f"{tuple(targets.shape)} + (vocabulary,), got {tuple(logits.shape)}; prefixes that a "
            "model adds (prompt tuning) need a loss_fn of their own"
        )
    return token_losses(logits, targets).sum(1) / (targets != IGNORED).sum(1)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, shape (N, L), in nats; 0 where the target is `IGNORED`."""
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(targets.shape)


def shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """The token that each position is to predict, shape (N, L), `IGNORED` where none counts.

    Left out are tokens whose label is `IGNORED`, padding, tokens that only padding comes before,
    and the first token of each document: of the row, and where `position_ids` begin again at 0.

    Args:
        batch: as for `causal_lm_losses`; without `labels` they are the `input_ids`.

    Raises:
        ValueError: an example has no token that counts.
    """
    labels = batch.get("labels")
    labels = batch["input_ids"] if labels is None else labels
    counts = labels[:, 1:] != IGNORED
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and mask.ndim == 2:  # masks of 4 dimensions say who sees whom
        counts = counts & mask[:, 1:].bool() & mask[:, :-1].bool()
    if positions is not None:
        counts = counts & (positions[:, 1:] != 0)
    empty = ~counts.any(1)
    if empty.any():
        raise ValueError(
            "each example must have at least one token that counts (a label other than "
            f"{IGNORED}, not the first of its document, not padding), got none for "
            f"{describe(batch, empty.nonzero().flatten())}; drop such examples from the data"
        )
    return F.pad(torch.where(counts, labels[:, 1:], IGNORED), (0, 1), value=IGNORED)


def document_positions(tokens: Tensor, end: int) -> Tensor:
    """Position of each token in its document, shape (N, L), from 0 after each `end` token.

    As `position_ids` they keep documents that were packed into one row apart: transformers lets no
    token see another document (with eager, sdpa and flex attention), and `shifted_labels` leaves
    the first token of each out. Each document then has the losses that it has in a row of its own,
    and what is said of the row is the mean over documents, weighted by their tokens that count:

        loss(row) = sum_d num_d loss(d) / sum_d num_d,   and so for its gradient and score.

    Args:
        tokens: ids, (N, L). What a row begins with is taken for the start of a document.
        end: id that ends a document; it is the last token of its document.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = F.pad(tokens[:, :-1] == end, (1, 0), value=True)
    return index - torch.where(begins, index, 0).cummax(1).values


def token_window(num_tokens: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A view of token batches that is cheaper to score: `num_tokens` tokens of each sequence.

    They are the first ones. Where the tokens that count begin further on, after a prompt or after
    padding, the window is moved so that they begin in its middle. It is read as a text of its own.

    Args:
        num_tokens: length of the window, >= 2.

    Returns:
        `score_view` for `Selector`: cuts `input_ids`, `labels`, `attention_mask`, `position_ids`
        and `token_type_ids`, and leaves batches alone that are no longer than the window.
    """
    if num_tokens < 2:
        raise ValueError(
            f"num_tokens must be at least 2, one to predict the other, got {num_tokens}"
        )

    def view(batch: Mapping[str, Any]) -> dict[str, Any]:
        length = batch["input_ids"].shape[1]
        if length <= num_tokens:
            return dict(batch)
        cut = {name: batch[name] for name in _PER_TOKEN if batch.get(name) is not None}
        for name, tensor in cut.items():
            if tensor.shape != batch["input_ids"].shape:
                raise ValueError(
                    f"{name} must be of shape {tuple(batch['input_ids'].shape)} for a token "
                    f"window, got {tuple(tensor.shape)}; pass a score_view of your own"
                )
        starts = _window_starts(batch, num_tokens)
        index = starts[:, None] + torch.arange(num_tokens, device=starts.device)
        return {**batch, **{name: tensor.gather(1, index) for name, tensor in cut.items()}}

    return view


def _window_starts(batch: Mapping[str, Any], num_tokens: int) -> Tensor:
    """Where the window of each example begins, shape (N,)."""
    targets = shifted_labels(batch)
    first = (targets != IGNORED).int().argmax(1)  # its successor is the first token that counts
    starts = first - (num_tokens - 2) // 2
    mask = batch.get("attention_mask")
    if mask is not None:
        starts = starts.maximum(mask.int().argmax(1))  # padding on the left is no context
    return starts.clamp(0, targets.shape[1] - num_tokens)


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    own = unadapted(uncompiled(unwrap(model)))
    named = signature(type(own).forward).parameters.keys() - set(_NOT_GIVEN)
    given = {
        name: value
        for name, value in batch.items()
        if value is not None and (name in named or name in _MODEL_INPUTS)
    }
    logits = getattr(model(**given, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return logits when it is called without labels, got "
            f"{type(logits).__name__}; switch its fused cross-entropy off, or pass a loss_fn that "
            "returns one loss per example"
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


# --- models ---------------------------------------------------------------------------------------

# layers that get adapters: all projections
_PROJECTIONS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

_Loaded = TypeVar("_Loaded")


NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Options of GPT-2 with which training and scores see one model; Llama has no dropout."""


def untrained_lm(
    architecture: Architecture,
    num_tokens: int,
    positions: int,
    width: int,
    layers: int,
    heads: int,
    *,
    end: int | None = None,
    **options: Any,
) -> PreTrainedModel:
    """GPT-2, its output layer tied to the embedding, or Llama, with random weights.

    Args:
        architecture: which of them.
        num_tokens: size of the vocabulary.
        positions: longest sequence, in tokens.
        width: size of a token's embedding, a multiple of `heads`; Llama's feed-forward layers are
            three times as wide.
        layers: transformer blocks.
        heads: attention heads of a block.
        end: id of the token that ends a document.
        options: of `transformers.GPT2Config` or `LlamaConfig`, in place of the above where given.
    """
    from transformers import (  # noqa: PLC0415
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": num_tokens,
        "bos_token_id": end,
        "eos_token_id": end,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if architecture == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**shape | options))
    return LlamaForCausalLM(LlamaConfig(**shape | {"intermediate_size": 3 * width} | options))


def pretrained_lm(architecture: Architecture, name: str, **options: Any) -> PreTrainedModel:
    """GPT-2 or Llama with weights from elsewhere, in float32.

    Args:
        architecture: which of them.
        name: a folder of `save_pretrained` or a Hugging Face name.
        options: of the model's configuration, in place of its own.

    Raises:
        ConfigError: the weights cannot be loaded; says what to do without a network.
    """
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: PLC0415

    kind = GPT2LMHeadModel if architecture == "gpt2" else LlamaForCausalLM
    load: Callable[..., PreTrainedModel] = kind.from_pretrained
    return load_pretrained(lambda name: load(name, dtype=torch.float32, **options), name)


def load_pretrained(load: Callable[[str], _Loaded], name: str) -> _Loaded:
    """What `load` makes of `model.pretrained`: weights or a tokenizer.

    Raises:
        ConfigError: it cannot be loaded; says what to do without a network.
    """
    try:
        return load(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            "model.pretrained must be a folder that save_pretrained wrote, or a Hugging Face name "
            f"that is cached or can be downloaded, got {name!r} ({reason}); fetch it where there "
            "is a network, with `hf download`, or leave it out for random weights"
        ) from error


def with_lora(model: nn.Module, architecture: Architecture, rank: int) -> nn.Module:
    """The model with new adapters on all its projections; only they are trained.

    Args:
        model: GPT-2 or Llama of transformers; changed in place.
        architecture: which of them.
        rank: of the adapters, >= 1; their scale is 2.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=_PROJECTIONS[architecture],
        fan_in_fan_out=architecture == "gpt2",  # its layers hold their weights transposed
    )
    with warnings.catch_warnings():  # peft asks transformers in words that it has deprecated
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        adapted: nn.Module = get_peft_model(model, adapters)
    return adapted


class RMSNorm(nn.Module):
    """Root-mean-square norm in the precision of its input."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.weight * scaled


def norms_in_own_precision(model: nn.Module) -> None:
    """Replace Llama's norms, which go through float32, by those in the precision of the weights.

    In float64 the rounding to float32 would be as large as the effect of one example.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: PLC0415

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon))
