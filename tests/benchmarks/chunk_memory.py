"""Resident memory that passes take in chunks of `chunk_size="auto"`, against their limit.

    python tests/benchmarks/chunk_memory.py [--limit 0.15] [--examples 400]

Each pass has a process of its own; its growth is that of the highest resident memory over a first
pass on two examples. GPT-2 and Llama with 1000 tokens of vocabulary, 2 layers of width 64 and 64
tokens to a sequence; 9 convolutions of 8 channels on 32 x 32 pixels. Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch
import transformers
from torch import nn

from selectflow.core.derivatives import Derivatives
from selectflow.core.params import Params
from selectflow.core.passes import Objective
from selectflow.models.language import causal_lm_losses


def tokens(num):
    return {"input_ids": torch.randint(1, 1000, (num, 64))}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=1000, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval(), causal_lm_losses, tokens


def llama():
    config = transformers.LlamaConfig(
        vocab_size=1000, max_position_embeddings=64, hidden_size=64, intermediate_size=192,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), causal_lm_losses, tokens


def conv():
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers)
    return model, conv_loss, lambda num: {"x": torch.randn(num, 1, 32, 32)}


def conv_loss(model, batch):
    return model(batch["x"]).square().mean((1, 2, 3))


MODELS = {"gpt2": gpt2, "llama": llama, "conv": conv}
PASSES = ("gradient", "directional", "hessian_product")


def peak_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name, use, limit, num):
    torch.set_num_threads(1)
    model, loss_fn, make = MODELS[name]()
    params = Params(model.named_parameters()).detach()
    direction = params.map(torch.randn_like)
    derivatives = Derivatives(Objective(model, loss_fn), "exact", "auto", limit)
    arguments = (params,) if use == "gradient" else (params, direction)
    call = getattr(derivatives, use)
    call(*arguments, make(2))
    before = peak_mib()
    call(*arguments, make(num))
    print(f"{name:<6} {use:<16} {peak_mib() - before:5.0f} of {limit * 1024:.0f} MiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=0.15)
    parser.add_argument("--examples", type=int, default=400)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for name in MODELS:
        for use in PASSES:
            process = context.Process(
                target=measure, args=(name, use, options.limit, options.examples)
            )
            process.start()
            process.join()


if __name__ == "__main__":
    main()
