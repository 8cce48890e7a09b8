"""The loss of each example as a Trainer trains it, from its class and that of its model.

What is returned for a batch of N examples has the Trainer's own batch loss as its mean:

    token tasks:  loss_z = (sum of the token losses of z) / (mean number of tokens of an example)

so that an example weighs by its tokens that count, as in training, where the mean is over tokens.
Pairs and classes weigh alike. (Of an example alone it is the mean over its tokens: so baselines see
it that take gradients one by one.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selectflow.core.batches import Batch
from selectflow.core.wrappers import unadapted, uncompiled, unwrap
from selectflow.integrations.example_rows import Grouped, collated
from selectflow.models.language import IGNORED, causal_lm_losses, shifted_labels, token_losses

if TYPE_CHECKING:
    from transformers import Trainer

_DPO, _REWARD = "DPO pairs", "reward pairs"
_CLASSES = ("Sequence", "Image", "Video", "Audio")
_CHOSEN, _REJECTED = "ref_chosen_logps", "ref_rejected_logps"  # TRL's names in a batch


class TaskLosses:
    """`loss_fn(model, batch)` -> losses (N,) of a Trainer's task.

    Known are causal and masked language models, sequence to sequence, classes of tokens and of
    whole examples (text, images), and of TRL the `DPOTrainer` (sigmoid, hinge, ipo) and the
    `RewardTrainer`. Anything else is treated as a causal language model.

    Args:
        trainer: its model is there.

    Attributes:
        task: its name, for messages.
        mean_tokens: of an example; None: that of the batch at hand. Where a batch is scored in
            chunks it must be one number for all of them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.mean_tokens: float | None = None
        self._trainer = trainer
        self.task, self._losses = self._find(trainer.model)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if (self.task in (_DPO, _REWARD)) != isinstance(batch, Grouped):
            found = "several rows" if isinstance(batch, Grouped) else "one row"
            raise ValueError(f"an example of {self.task} does not have {found}")
        return self._losses(model, collated(batch, with_constants=True))

    def with_constants(self, batch: Batch) -> Batch:
        """The batch with what the reference model of DPO says of it, which does not change."""
        trainer: Any = self._trainer
        if self.task != _DPO or not isinstance(batch, Grouped) or _CHOSEN in batch.rest:
            return batch
        model = trainer.model if trainer.ref_model is None else trainer.ref_model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            chosen, rejected = trainer.compute_ref_log_probs(model, collated(batch))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return replace(batch, constants={_CHOSEN: chosen, _REJECTED: rejected})

    def num_tokens(self, batch: Batch) -> float | None:
        """Mean number of tokens that count per example; None: not a task of tokens."""
        if self._losses == self._causal:
            return float((shifted_labels(batch) != IGNORED).sum(1).double().mean())
        if self._losses == self._of_tokens:
            return float((batch["labels"] != IGNORED).sum(1).double().mean())
        return None

    def check_scorer(self, scorer: nn.Module) -> None:
        """See that these losses are right for another model than the Trainer's.

        Raises:
            ValueError: they are of a reference model, of another task, or of other classes.
        """
        fix = "pass Scorer(loss_fn=...)"
        if self.task == _DPO:
            raise ValueError(
                f"the loss of a scorer must be given for {_DPO}, since the reference model is that "
                f"of the trained one, got None; {fix}"
            )
        found, _ = self._find(scorer)
        if found != self.task:
            raise ValueError(
                f"the scorer must be a model of the trained one's task, {self.task}, got "
                f"{type(_own(scorer)).__name__}, of {found}; {fix}"
            )
        if "classes" not in found:
            return
        configs: list[Any] = [_own(model).config for model in (self._trainer.model, scorer)]
        for name in ("num_labels", "problem_type"):
            expected, got = (getattr(config, name) for config in configs)
            if got != expected and None not in (got, expected):
                raise ValueError(
                    f"{name} of the scorer's config must be the trained model's, {expected}, got "
                    f"{got}; {fix}"
                )

    def _find(self, of: Any) -> tuple[str, Callable[[nn.Module, Any], Tensor]]:
        """The task of a model in this Trainer, and its losses."""
        trainer, model = self._trainer, _own(of)
        bases = {base.__name__ for base in type(trainer).__mro__}
        kind = str(getattr(model, "loss_type", None) or "")
        is_seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        found: tuple[str, Callable[[nn.Module, Any], Tensor]]
        if "DPOTrainer" in bases:
            found = _DPO, partial(_dpo, trainer)
        elif "RewardTrainer" in bases:
            found = _REWARD, partial(_reward, trainer)
        elif any(kind == f"For{name}Classification" for name in _CLASSES):
            found = "classes", partial(_classes, trainer)
        elif kind == "ForMaskedLM":
            found = "masked language models", self._of_tokens
        elif kind == "ForTokenClassification":
            found = "classes of tokens", self._of_tokens
        elif is_seq2seq and kind == "ForConditionalGeneration":
            found = "sequence to sequence", self._of_tokens
        else:
            found = "causal language models", self._causal
        return found

    def _causal(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        losses = causal_lm_losses(model, batch)
        return losses * self._weights((shifted_labels(batch) != IGNORED).sum(1)).to(losses)

    def _of_tokens(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Of labels in the place of their logits."""
        labels = batch["labels"]
        logits = _logits(model, batch)
        counts: Tensor = (labels != IGNORED).sum(1)
        means: Tensor = token_losses(logits, labels).sum(1) / counts.clamp(min=1)
        return means * self._weights(counts).to(means)

    def _weights(self, counts: Tensor) -> Tensor:
        """Share of each example in the training, over that of the mean one; shape (N,)."""
        mean = counts.double().mean() if self.mean_tokens is None else self.mean_tokens
        weights: Tensor = counts / (mean + (mean == 0))
        return weights


# --- tasks ----------------------------------------------------------------------------------------


def _classes(trainer: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """One class, several, or values of each example, as the models' configurations say."""
    labels, logits = batch["labels"], _logits(model, batch)
    config: Any = _own(model).config
    trained: Any = _own(trainer.model).config
    kind = config.problem_type or trained.problem_type
    if kind is None:
        is_class = labels.dtype in (torch.long, torch.int)
        kind = "single_label_classification" if is_class else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else kind
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1), reduction="none")
    apart = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return apart(logits, labels.view_as(logits).to(logits), reduction="none").mean(1)


def _reward(trainer: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """-log sigmoid(reward of chosen - of rejected - margin), and what keeps rewards near 0."""
    inputs = {name: value for name, value in batch.items() if name != "margin"}
    chosen, rejected = model(**inputs, use_cache=False).logits.squeeze(-1).chunk(2)
    losses = -F.logsigmoid(chosen - rejected - batch.get("margin", 0.0))
    centering = trainer.args.center_rewards_coefficient
    return losses if centering is None else losses + centering * (chosen + rejected) ** 2


def _dpo(trainer: Any, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Of log-ratios to the reference model, whose log-probabilities are constants."""
    _check_dpo(trainer)
    mask = batch["completion_mask"]
    inputs = {k: v for k, v in batch.items() if k not in (_CHOSEN, _REJECTED, "completion_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    tokens = batch["input_ids"][:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    chosen, rejected = (-part for part in token_losses(logits.float(), tokens).sum(1).chunk(2))
    chosen, rejected = chosen - batch[_CHOSEN], rejected - batch[_REJECTED]
    lengths = mask.sum(1).clamp(min=1).chunk(2)
    by_type: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: -F.logsigmoid(trainer.beta * (chosen - rejected)),
        "hinge": lambda: torch.relu(1 - trainer.beta * (chosen - rejected)),
        "ipo": lambda: (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * trainer.beta)) ** 2,
    }
    weights = trainer.loss_weights or [1.0] * len(trainer.loss_types)
    parts = [
        weight * by_type[kind]() for kind, weight in zip(trainer.loss_types, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _check_dpo(trainer: Any) -> None:
    """Refuse what `_dpo` does not know; near the first weights all losses look alike."""
    known = {"sigmoid", "hinge", "ipo"}
    if not known.issuperset(trainer.loss_types):
        raise ValueError(f"loss_type must be one of {sorted(known)}, got {trainer.loss_types}")
    usual = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    for name, expected in usual.items():
        value = getattr(trainer, name, expected)
        if getattr(value, "value", value) != expected:
            raise ValueError(f"{name} must be {expected!r}, got {value!r}")


def _own(model: Any) -> nn.Module:
    return unadapted(uncompiled(unwrap(model)))


def _logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the model makes of the entries that its `forward` names."""
    own: Any = _own(model)
    named = set(signature(type(own).forward).parameters)
    if not getattr(own.config, "is_encoder_decoder", False):  # whose decoder reads the labels
        named.discard("labels")
    given = {k: v for k, v in batch.items() if k in named and v is not None}
    logits: Tensor = model(**given).logits
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
