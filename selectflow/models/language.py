"""Losses of causal language models by example, for batches as transformers has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selectflow.core.batches import describe

IGNORED = -100  # label of a position that does not count, as everywhere in torch and transformers

_PER_TOKEN = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")
_MODEL_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def causal_lm_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Loss of each example: the mean, over its tokens that count, of -log p(token | those before).

    A token counts unless `shifted_labels` leaves it out. The loss is taken from the logits, since
    the loss that a model computes from labels is the mean of a whole batch. Logits in half
    precision are read in float32.

    Args:
        model: a causal language model of transformers, peft or alike: called with keywords, it
            returns an object with `logits` of shape (N, L, vocabulary).
        batch: `input_ids`, (N, L), and where there are `labels`, `attention_mask`, `position_ids`.
            Other entries, such as keys, are not given to the model.

    Returns:
        Losses of shape (N,), in nats.

    Raises:
        ValueError: an example has no token that counts; names it.
        TypeError: the model returns no logits.
    """
    targets = shifted_labels(batch)
    logits = _logits(model, batch)
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"the model must return one row of logits for each token, shape "
            f"{tuple(targets.shape)} + (vocabulary,), got {tuple(logits.shape)}; prefixes that a "
            "model adds (prompt tuning) need a loss_fn of their own"
        )
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED
    ).view(targets.shape)
    return losses.sum(1) / (targets != IGNORED).sum(1)


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
    given = {name: batch[name] for name in _MODEL_INPUTS if batch.get(name) is not None}
    logits = getattr(model(**given, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return logits when it is called without labels, got "
            f"{type(logits).__name__}; switch its fused cross-entropy off, or pass a loss_fn that "
            "returns one loss per example"
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
