"""What `scorer.py` compares on: texts, digits and photographs, with the models that score."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from equal_time import CONFIGS, Setting, digits
from results_tasks import mixture, oracle, trainer, trainer_module
from study_data import draw
from torch import Tensor, nn

from selectflow.core.batches import Batch
from selectflow.run.build import build_optimizer
from selectflow.run.config import load


class Text(NamedTuple):
    """A task of text.

    Attributes:
        config: in configs/.
        base: the configuration that the model's weights come from; None: random ones.
        sizes: layers and width of the model, of its tenth and of its thirtieth.
        block: tokens of an example, where they are not the configuration's.
    """

    config: str
    base: str | None
    sizes: dict[str, tuple[int, int]]
    block: int | None = None


BIG, TENTH, THIRTIETH = "model", "tenth", "thirtieth"
SMALL = {BIG: (2, 128), TENTH: (1, 48), THIRTIETH: (1, 24)}
TEXT = {
    "finetune": Text(
        "text_finetune_online", "text_finetune_base",
        {BIG: (4, 256), TENTH: (2, 96), THIRTIETH: (1, 64)}, 128,
    ),
    "lora": Text("text_lora_online", "text_lora_base", SMALL),
    "random": Text("text_online", None, SMALL),
}  # fmt: skip
HIDDEN = {TENTH: 24, THIRTIETH: 8}  # units of the MLP's layers; the trained one has 128
CHANNELS = {TENTH: 14, THIRTIETH: 7}  # of the CNN's layers; the trained one has 48
Made = tuple[Setting, nn.Module | None]


def base(task: str, size: str, folder: Path) -> Path:
    """A model that has read the mixture's other domains; trained where it is not there yet."""
    layers, width = TEXT[task].sizes[size]
    options = [f"root={folder}", "resume=auto", f"model.layers={layers}", f"model.width={width}"]
    options += ["name=base_{model.name}_{model.layers}x{model.width}"]
    config = CONFIGS / f"{TEXT[task].base}.yaml"
    run_dir = load(config, options).run_dir
    if not (run_dir / "model").exists() and trainer("language")([str(config), *options]) != 0:
        raise SystemExit(f"{run_dir}: the base was not trained")
    return run_dir / "model"


def text(task: str, method: str, seed: int, folder: Path) -> Made:
    """What is trained, and the scorer of a method."""
    of = TEXT[task]
    options = mixture(folder, seed) | {"root": folder, "seed": seed, "track.kinds": "false"}
    options |= {"data.text.block": of.block} if of.block else {}
    if task != "finetune" and seed > 2:  # of some seeds there is not as much prose as for 18,000
        options["data.text.num_train"] = 17000
    options |= oracle(of.config) if method == "oracle" else {}
    if of.base:
        options["model.pretrained"] = base(task, BIG, folder)
    size = method.partition(",")[0]
    if size in HIDDEN:
        layers, width = of.sizes[size]
        name = load(CONFIGS / f"{of.config}.yaml").model.name
        scorer = {"name": name, "layers": layers, "width": width, "heads": 4}
        if of.base and "random" not in method:
            scorer = {"name": name, "pretrained": str(base(task, size, folder))}
        options["scorer"] = json.dumps({"model": scorer})
    given = [f"{key}={value}" for key, value in options.items()]
    config = load(CONFIGS / f"{of.config}.yaml", given)
    made = trainer_module("language")["build_task"](config)
    setting = Setting(
        made.model, build_optimizer(made.model, config.optimizer), made.loss_fn, list(made.target),
        lambda _: iter(made.pools), list(made.test), int(config.select.keep),
        config.optimizer.max_grad_norm, config.schedule.warmup_steps,
    )  # fmt: skip
    return setting, made.scorer


def beginning(parts: int) -> Callable[[Batch], Batch]:
    """The first half, or another part, of the tokens of each block."""
    return lambda batch: batch | {"tokens": batch["tokens"][:, : batch["tokens"].shape[1] // parts]}


def digit_images(method: str, seed: int) -> Made:
    setting, width = digits("noised", seed, 1.0), HIDDEN.get(method.partition(",")[0])
    if width is None:
        return setting, None
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return setting, nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(width: int) -> nn.Module:
    """Three layers for images of any size, and eleven classes."""
    sizes, layers = (3, width, width, width), []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 11))


def halved(batch: Batch) -> Batch:
    """The same images at half the resolution."""
    return batch | {"x": F.avg_pool2d(batch["x"], 2)}


def image_losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def photographs(method: str, seed: int) -> Made:
    data = [
        each | {"x": each["x"].unflatten(1, (3, 8, 8))} for each in draw("photographs", seed, 200)
    ]
    torch.manual_seed(seed)
    model = cnn(48)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    halves = [{key: value[part::2] for key, value in data[1].items()} for part in range(2)]
    setting = Setting(
        model,
        optimizer,
        image_losses,
        halves,
        lambda _: pools_of(data[0], seed),
        [data[2]],
        16,
        None,
        0,
    )
    width = 48 if method == "half resolution" else CHANNELS.get(method)
    return setting, cnn(width) if width else None


def pools_of(data: Batch, seed: int) -> Iterator[Batch]:
    """Pools of 64, again and again, in a random order each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data["y"]), generator=generator).split(64)[:-1]:
            yield {key: value[rows] for key, value in data.items()}


IMAGES: dict[str, Callable[[str, int], Made]] = {"digits": digit_images, "photographs": photographs}
