"""Losses of causal language models by example, for batches as transformers has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selectflow.batches import describe

IGNORED = -100  # label of a position that does not count, as everywhere in torch and transformers

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
