"""Causal language models of transformers: their weights from elsewhere, and adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from selectflow.options import ConfigError

# layers that get adapters, by the name of the architecture: all its projections
_PROJECTIONS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}

_Loaded = TypeVar("_Loaded")


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


def with_lora(model: nn.Module, architecture: str, rank: int) -> nn.Module:
    """The model with new adapters on all its projections; only they are trained.

    Args:
        model: "gpt2" or "llama" of transformers; changed in place.
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
