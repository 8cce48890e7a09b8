"""What an audit of text trains: GPT-2, or Llama with LoRA, on the standard library's source.

The models are those of Hugging Face transformers, with random weights or pretrained ones. Their
layer norms are computed in the precision of the weights: Llama's own go through float32, whose
rounding would be as large as the effect of one example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selectflow.audit.config import GPT2Model, LlamaModel
from selectflow.core.batches import Batch
from selectflow.data.builtin.documents import python_sources
from selectflow.models.adapters import load_pretrained, with_lora

# Shapes by name, as arguments of GPT2Config and LlamaConfig. GPT2Config's defaults are the 124M.
_BYTES = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None}
_GPT2: dict[str, dict[str, Any]] = {
    "small": {"n_embd": 32, "n_layer": 2, "n_head": 2, **_BYTES},
    "124m": {"n_positions": 1024},
}
_LLAMA: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, **_BYTES,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
}  # fmt: skip
_CHARACTERS_PER_FILE = 4096  # so that a few long files do not make up the text


def source_blocks(config: GPT2Model | LlamaModel) -> Batch:
    """The heads of all source files of the standard library, as blocks of tokens.

    Returns:
        `{"input_ids": (N, block)}`, int64: bytes, or tokens of the pretrained model's tokenizer.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """
    encode = _bytes
    if config.pretrained is not None:
        from transformers import AutoTokenizer  # noqa: PLC0415

        encode = load_pretrained(AutoTokenizer.from_pretrained, config.pretrained).encode
    tokens = [encode(text[:_CHARACTERS_PER_FILE]) for text in python_sources()]
    blocks = [
        torch.tensor(file)[: len(file) // config.block * config.block].view(-1, config.block)
        for file in tokens
    ]
    return {"input_ids": torch.cat(blocks).long()}


def gpt2(config: GPT2Model) -> nn.Module:
    """GPT-2, every parameter trained, its output layer tied to the embedding.

    Raises:
        ConfigError: the pretrained weights cannot be loaded.
    """
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    if config.pretrained is not None:
        return load_pretrained(GPT2LMHeadModel.from_pretrained, config.pretrained)
    shape = {"n_positions": config.block} | _GPT2[config.shape]
    return GPT2LMHeadModel(GPT2Config(**shape))


def llama(config: LlamaModel) -> nn.Module:
    """Llama without adapters.

    Raises:
        ConfigError: the pretrained weights cannot be loaded.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    if config.pretrained is not None:
        model = load_pretrained(LlamaForCausalLM.from_pretrained, config.pretrained)
    else:
        model = LlamaForCausalLM(LlamaConfig(**_LLAMA[config.shape]))
    _norms_in_own_precision(model)
    return model


def with_adapters(config: LlamaModel, model: nn.Module) -> nn.Module:
    """The model with new adapters on all its projections; only they are trained."""
    return with_lora(model, "llama", config.lora_rank)


class RMSNorm(nn.Module):
    """Root-mean-square norm in the precision of its input."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.weight * scaled


def _norms_in_own_precision(model: nn.Module) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # noqa: PLC0415

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon))


def _bytes(text: str) -> list[int]:
    return list(text.encode())
