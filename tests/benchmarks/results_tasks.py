"""What `results.py` compares: the tasks, the methods of each, and their data."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from selectflow.data import make_digits, read_metadata, write_subset
from selectflow.report.runs import KEPT, KEPT_ALTERED
from selectflow.run.config import load
from selectflow.run.directory import is_finished
from selectflow.run.metrics import TEST_ACCURACY, TEST_LOSS

ROOT = Path(__file__).parents[2]
UNIFORM = "uniform"
CONFIGS = ROOT / "configs"
RAREST = 0.05  # of the imbalanced task: share of the last class's samples that are there

Options = dict[str, object]
Methods = dict[str, tuple[str, Options]]


@cache
def trainer_module(name: str) -> dict[str, Any]:
    """What a program in trainers/ defines, executed once for all runs."""
    return runpy.run_path(str(ROOT / f"trainers/{name}.py"))


def trainer(name: str) -> Callable[[Sequence[str]], int]:
    """`main` of a program in trainers/."""
    main: Callable[[Sequence[str]], int] = trainer_module(name)["main"]
    return main


@dataclass(frozen=True)
class Task:
    """What is compared.

    Attributes:
        title: what a reader calls it.
        trainer: program in trainers/.
        methods: name -> its file in configs/ and what differs from it.
        data: (folder of the task, seed) -> the options that say which data.
        judged: metrics of the tables.
        kept: metrics of the figure that say what was kept.
        seeds: seeds unless told otherwise.
    """

    title: str
    trainer: str
    methods: Methods
    data: Callable[[Path, int], Options]
    judged: tuple[str, ...]
    kept: tuple[str, ...]
    seeds: int


def imbalanced(folder: Path, seed: int) -> Options:
    """Clean digits; a sample of class c is there with probability 0.05^(c / 9), drawn by seed.

    Target and test have all classes alike.
    """
    whole, root = folder / "whole", folder / f"data-s{seed}"
    make_digits(whole)
    rng, share = np.random.default_rng(seed), RAREST ** (np.arange(10) / 9)
    labels = {key: made["true_label"] for key, made in read_metadata(whole, "train").items()}
    keys = [key for key, label in sorted(labels.items()) if rng.random() < share[label]]
    made_from = {"imbalance": RAREST}
    write_subset(root, whole, "train", keys, made_from, seed=seed, copied=("target", "test"))
    return {"data.name": "shards", "data.root": root}


def noised(share: float) -> Callable[[Path, int], Options]:
    """Digits with a share of wrong labels."""
    return lambda _folder, seed: {"data.label_noise": share, "data.seed": seed}


DIGITS: Methods = {
    UNIFORM: ("digits_uniform", {}),
    "largest loss": ("digits_online", {"select.strategy": "loss"}),
    "influence, H = 0": ("digits_online", {"select.horizon": 0}),
    "influence, H = 1": ("digits_online", {"select.horizon": 1}),
    "influence, H = 4": ("digits_online", {"select.horizon": 4}),
    "adaptive H and lr": ("digits_adaptive", {"select.allow_plain": "false"}),
    "offline": ("digits_offline", {}),
}


def oracle(config: str, overrides: Sequence[str] = ()) -> Options:
    """As many blocks of the target's domain as the mixture has, and no others: a perfect choice."""
    path = CONFIGS / f"{config}.yaml"
    text = load(path, overrides).data.text
    domain, mixture = str(text.target_domain), text.mixture or {}
    if not mixture.get(domain) or text.num_train is None:
        raise ValueError(f"data.text.mixture of {path} must have {domain}, got {mixture}")
    there = round(mixture[domain] * text.num_train)
    return {"data.text.mixture": f"{{{domain}: 1.0}}", "data.text.num_train": there}


def mixture(_folder: Path, seed: int) -> Options:
    """The text mixture, drawn by seed."""
    return {"data.seed": seed}


def from_base(config: str) -> Callable[[Path, int], Options]:
    """The text mixture, and one base for all seeds, which is trained if it is not there."""

    def data(folder: Path, seed: int) -> Options:
        path, options = CONFIGS / f"{config}.yaml", [f"root={folder}", "resume=auto"]
        run_dir = load(path, options).run_dir
        if not is_finished(run_dir) and trainer("language")([str(path), *options]) != 0:
            raise SystemExit(f"{run_dir}: the base was not trained")
        return mixture(folder, seed) | {"model.pretrained": run_dir / "model"}

    return data


TEXT: Methods = {
    UNIFORM: ("text_uniform", {}),
    "largest loss": ("text_online", {"select.strategy": "loss"}),
    "influence, H = 0": ("text_online", {"select.horizon": 0, "select.interval": 1}),
    "influence, H = 2": ("text_online", {}),
    "oracle": ("text_uniform", oracle("text_uniform")),
}


def fine_tuning(name: str, **more: tuple[str, Options]) -> Methods:
    """The methods on a model that knows all of the mixture but the target's domain."""
    online, uniform = f"{name}_online", f"{name}_uniform"
    return {
        UNIFORM: (uniform, {}),
        "largest loss": (online, {"select.strategy": "loss"}),
        "influence, H = 0": (online, {}),
        **more,
        "oracle": (uniform, oracle(uniform)),
    }


LORA: Methods = {
    "influence, H = 1": ("text_lora_online", {"select.horizon": 1}),
    "influence, H = 4": ("text_lora_online", {"select.horizon": 4, "select.interval": 4}),
    "adaptive H and lr": (
        "text_lora_online",
        {"select.horizon": "auto", "select.lr": "auto", "select.allow_plain": "false"},
    ),
    "offline": ("text_lora_offline", {}),
}


BOTH = (TEST_LOSS, TEST_ACCURACY)
LABELS = (KEPT_ALTERED,)
ORIGINS = (f"{KEPT}code", f"{KEPT}shuffled")
TASKS = {
    "noised": Task("Digits, 40% wrong labels", "vision", DIGITS, noised(0.4), BOTH, LABELS, 5),
    "clean": Task("Digits, all labels right", "vision", DIGITS, noised(0), BOTH, (), 5),
    "imbalanced": Task("Digits, imbalanced classes", "vision", DIGITS, imbalanced, BOTH, (), 5),
    "text": Task("Text mixture", "language", TEXT, mixture, (TEST_LOSS,), ORIGINS, 3),
    "lora": Task(
        "Text mixture, LoRA on a Llama", "language", fine_tuning("text_lora", **LORA),
        from_base("text_lora_base"), (TEST_LOSS,), ORIGINS, 3,
    ),
    "finetune": Task(
        "Text mixture, fine-tuning of a GPT-2 of 3.3M", "language", fine_tuning("text_finetune"),
        from_base("text_finetune_base"), (TEST_LOSS,), ORIGINS, 5,
    ),
}  # fmt: skip
