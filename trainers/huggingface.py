r"""Train a causal language model in the Hugging Face Trainer, with data selection.

    python trainers/huggingface.py --output_dir runs/hf --max_steps 200
    python trainers/huggingface.py --output_dir runs/hf --model gpt2 \
        --train stream.jsonl --target clean.jsonl --keep 0.25 --gradient_accumulation_steps 4

Takes the options of `transformers.TrainingArguments` and those of `Options`. Files have one JSON
object a line with a field "text". Without files it trains a small GPT-2 on bytes of the standard
library's source, of which three quarters are shuffled: selection has to find the rest.
"""

from __future__ import annotations

import json
import random
import sysconfig
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from selectflow.integrations.huggingface import SelectTrainerMixin


@dataclass
class Options:
    """What is trained on what, and how much of it is kept."""

    model: str = field(default="", metadata={"help": "name or folder; empty: a small GPT-2"})
    train: str = field(default="", metadata={"help": "JSONL of the stream; empty: built in"})
    target: str = field(default="", metadata={"help": "JSONL of the target set"})
    block: int = field(default=128, metadata={"help": "tokens of an example"})
    keep: float = field(default=0.25, metadata={"help": "share kept of each micro-batch"})
    horizon: int = field(default=0, metadata={"help": "optimizer updates to look ahead"})
    interval: int = field(default=1, metadata={"help": "optimizer steps between look-aheads"})


class SelectTrainer(SelectTrainerMixin, Trainer):
    """The Trainer with data selection."""


def blocks(tokens: list[int], size: int) -> list[dict[str, Any]]:
    """Consecutive examples of `size` tokens; a rest is left out."""
    starts = range(0, len(tokens) - size + 1, size)
    return [
        {"input_ids": part, "labels": part} for at in starts for part in [tokens[at : at + size]]
    ]


def built_in(size: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Stream, target and test set from the standard library's source, by file."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(paths)
    parts = paths[20:], paths[:10], paths[10:20]
    stream, target, test = (
        [block for path in part for block in blocks(list(path.read_bytes()), size)]
        for part in parts
    )
    dice = random.Random(1)
    for block in stream:
        if dice.random() < 0.75:
            block["input_ids"] = block["labels"] = dice.sample(block["labels"], size)
    dice.shuffle(stream)
    return stream, target[:400], test[:400]


def from_file(path: str, tokenizer: Any, size: int) -> list[dict[str, Any]]:
    """Texts of a JSONL file, joined by the end-of-text token and cut into blocks."""
    with Path(path).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines if line.strip()]
    end = [tokenizer.eos_token_id]
    return blocks(list(chain(*(tokenizer(text)["input_ids"] + end for text in texts))), size)


def main() -> None:
    """Parse the options, train, and print the loss on the test set."""
    parser = HfArgumentParser((TrainingArguments, Options))  # type: ignore[arg-type]
    parser.set_defaults(per_device_train_batch_size=64, learning_rate=2e-3, logging_steps=20)
    args, options = parser.parse_args_into_dataclasses()
    if options.train and not (options.target and options.model):
        parser.error("--train must go with --target and --model")
    torch.manual_seed(args.seed)
    model: Any
    if options.train:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        stream = from_file(options.train, tokenizer, options.block)
        target, test = from_file(options.target, tokenizer, options.block), None
    else:
        config = GPT2Config(
            vocab_size=256, n_positions=options.block, n_embd=96, n_layer=3, n_head=4
        )
        config.bos_token_id = config.eos_token_id = 0
        model = GPT2LMHeadModel(config)
        stream, target, test = built_in(options.block)
    trainer = SelectTrainer(
        model,
        args,
        train_dataset=stream,
        eval_dataset=test,
        target=target,
        keep=options.keep,
        select_options={"horizon": options.horizon, "interval": options.interval},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if test is not None:
        print(f"loss on the test set: {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
