"""Selection on models of the size that people fine-tune: seconds a step, and peak memory.

    python tests/benchmarks/large_shapes.py [gpt2] [llama] [--tokens 64] [--rounds 1] [--only H=0]

GPT-2 with 124M parameters, all trained; the Llama-3.2-1B shape (1.24B parameters) with LoRA of
rank 16 on its attention. Random weights, float32, random tokens: this measures cost alone. A plain
step trains on 2 sequences; selection keeps 2 of 4. Each variant has a process of its own, whose
first step is a plain one and not timed. Derivatives are set to be central, which the check of
"auto" finds right in float32: what the check takes, once in 100 look-aheads, in time and memory is
no part of the figures. "Every 8 steps" is a step with a look-ahead and one without, weighted 1 to
7; the Llama shape leaves out H = 2. Seconds are processor time, which other work on the machine
changes little; their split into look-ahead and scoring is by the clock. Peak memory is the growth
of the resident set over the whole process since before the model was built.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path

import peft
import torch
import transformers
from transformers.initialization import no_init_weights

from selectflow import Selector
from selectflow.models.language import causal_lm_losses, token_window

KEEP, POOL, TARGET = 2, 4, 2


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def llama():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with no_init_weights():  # a minute on one core
        model = transformers.LlamaForCausalLM(config)
    model.tie_weights()
    noise = torch.randn(2**20) * 0.02
    for param in model.parameters():
        flat = param.data.view(-1)
        for start in range(0, len(flat) if param.ndim > 1 else 0, len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])
        if param.ndim == 1:
            flat.fill_(1.0)
    return peft.get_peft_model(model, adapters)


MODELS = {"gpt2": gpt2, "llama": llama}
# name -> options of the selector; None: a plain step
VARIANTS = {
    "plain step on 2": None,
    "keep 2 of 4, H=0, every step": {"horizon": 0},
    "    embeddings not scored": {"horizon": 0, "params": ["!*wte*", "!*wpe*"]},
    "    a quarter of the tokens scored": {"horizon": 0, "score_view": 4},
    "keep 2 of 4, H=0, every 8 steps": {"horizon": 0, "interval": 8},
    "keep 2 of 4, H=1, every step": {"horizon": 1},
    "keep 2 of 4, H=2, every step": {"horizon": 2},
}

# the Llama shape has frozen embeddings, and takes H = 2 minutes
ONLY_GPT2 = ("    embeddings not scored", "keep 2 of 4, H=2, every step")


def peak_kib() -> int:
    """Peak resident memory of this process (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def measure(name: str, options: dict | None, tokens: int, rounds: int, threads: int) -> dict:
    """Seconds a step by part, peak memory in GiB, and sizes, of one variant."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    gc.collect()
    before = peak_kib()
    model = MODELS[name]()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = model.config.vocab_size

    def batch(num):
        return {"input_ids": torch.randint(vocabulary, (num, tokens))}

    selector = None
    if options is not None:
        options = dict(options)
        if "score_view" in options:
            options["score_view"] = token_window(tokens // options["score_view"])
        target = [batch(TARGET) for _ in range(2)]
        selector = Selector(model, optimizer, causal_lm_losses, target, KEEP, **options)
        selector.state.forms.decided = {"losses": "central", "gradients": "central"}
        selector.state.num_lookaheads = 1  # the first would check
    spent, upcoming = defaultdict(list), [batch(POOL) for _ in range(2)]

    def train(kept):
        causal_lm_losses(model, kept).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train(batch(KEEP))
    interval = (options or {}).get("interval", 1)
    weights = [1] * rounds if interval == 1 else [1, interval - 1] * rounds
    for step in range(len(weights)):
        if interval > 1 and step % 2 == 0:
            selector.state.ahead = None  # so that this step looks ahead
        began, began_s = time.perf_counter(), time.process_time()
        train(batch(KEEP) if selector is None else selector.select(batch(POOL), upcoming))
        seconds = time.process_time() - began_s
        spent["step"].append(seconds)
        if selector is not None:
            share = seconds / (time.perf_counter() - began)
            ahead_s, all_s = selector.last.lookahead_s, selector.last.seconds
            spent["look-ahead"].append(share * ahead_s)
            spent["scoring"].append(share * (all_s - ahead_s))
    found = {part: statistics.fmean(seconds, weights) for part, seconds in spent.items()}
    num = [sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)]
    return found | {"peak": (peak_kib() - before) / 2**20, "num": num}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="variants that have this in their name")
    args = parser.parse_args()
    for name in args.models:
        print(f"\n{name}, {args.tokens} tokens, {args.threads} thread(s)")
        print(f"{'':36}{'s/step':>8}{'ratio':>7}{'look-ahead':>12}{'scoring':>9}{'peak GiB':>10}")
        plain = None
        for variant, options in VARIANTS.items():
            has_no_use = name != "gpt2" and variant in ONLY_GPT2
            if has_no_use or (options and args.only not in variant):
                continue
            with multiprocessing.get_context("spawn").Pool(1) as process:
                found = process.apply(
                    measure, (name, options, args.tokens, args.rounds, args.threads)
                )
            if plain is None:
                plain = found["step"]
                print("parameters: {:,}, trained {:,}".format(*found["num"]))
            parts = "".join(f"{found.get(part, 0):{width}.2f}" for part, width in
                            (("look-ahead", 12), ("scoring", 9), ("peak", 10)))  # fmt: skip
            print(
                f"{variant:36}{found['step']:8.2f}{found['step'] / plain:7.2f}{parts}", flush=True
            )


if __name__ == "__main__":
    main()
