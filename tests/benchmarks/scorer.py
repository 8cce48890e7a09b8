"""A small model that scores for the trained one: test loss and cost, beside other choices.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer.py [finetune random digits] [--seeds 3]

For as many steps: any examples, the model scoring itself, a scorer of about a tenth and of about a
thirtieth of its size, the same frozen, one with random weights, and (text) the target's domain
alone. Then plain training of whole pools in parts, for the processor seconds that the tenth took.
Scorers of the fine-tuning task have read what the model's base has. The test set is read once, at
the end of a run. Finished runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from equal_time import CONFIGS, Setting, digits, mean_loss, take_step
from results_tasks import mixture, oracle, trainer, trainer_module
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from selectflow import Scorer, Selector
from selectflow.core.batches import Batch, in_parts, num_examples
from selectflow.report.compare import paired
from selectflow.run.build import build_optimizer
from selectflow.run.config import load

STEPS = {"finetune": 100, "random": 200, "digits": 400}
CONFIG = {"finetune": "text_finetune_online", "random": "text_online"}
BLOCK = 128  # tokens of an example of text
SIZES = {"": (4, 256), "tenth": (2, 96), "thirtieth": (1, 64)}  # layers and width of GPT-2
HIDDEN = {"tenth": 24, "thirtieth": 8}  # units of the MLP's layers; the trained one has 128
RATE = {"finetune": 2, "random": 2, "digits": 3}  # of a scorer, times the trained model's
METHODS = ("uniform", "itself", "tenth", "thirtieth", "tenth, frozen", "tenth, random weights",
           "oracle", "plain, same seconds")  # fmt: skip
Result = dict[str, float]


def base(size: str, folder: Path) -> Path:
    """A GPT-2 that has read the mixture's other domains; trained where it is not there yet."""
    layers, width = SIZES[size]
    options = [f"root={folder}", "resume=auto", f"model.layers={layers}", f"model.width={width}"]
    options += ["name=base_{model.layers}x{model.width}"]
    config = CONFIGS / "text_finetune_base.yaml"
    run_dir = load(config, options).run_dir
    if not (run_dir / "model").exists() and trainer("language")([str(config), *options]) != 0:
        raise SystemExit(f"{run_dir}: the base was not trained")
    return run_dir / "model"


def text(task: str, method: str, seed: int, folder: Path) -> tuple[Setting, nn.Module | None]:
    """What is trained, and the scorer of a method."""
    options = mixture(folder, seed) | {"root": folder, "seed": seed, "track.kinds": "false"}
    options |= {"data.text.block": BLOCK}
    if method == "oracle":
        options |= oracle(CONFIG[task])
    size = method.partition(",")[0]
    pretrained = task == "finetune" and "random" not in method
    if task == "finetune":
        options["model.pretrained"] = base("", folder)
    if size in HIDDEN:
        layers, width = SIZES[size]
        scorer = {"name": "gpt2", "layers": layers, "width": width, "heads": 4}
        if pretrained:
            scorer = {"name": "gpt2", "pretrained": str(base(size, folder))}
        options["scorer"] = json.dumps({"model": scorer})
    given = [f"{key}={value}" for key, value in options.items()]
    config = load(CONFIGS / f"{CONFIG[task]}.yaml", given)
    made = trainer_module("language")["build_task"](config)
    setting = Setting(
        made.model, build_optimizer(made.model, config.optimizer), made.loss_fn, list(made.target),
        lambda _: iter(made.pools), list(made.test), int(config.select.keep),
        config.optimizer.max_grad_norm, config.schedule.warmup_steps,
    )  # fmt: skip
    return setting, made.scorer


def images(method: str, seed: int) -> tuple[Setting, nn.Module | None]:
    setting, width = digits("noised", seed, 1.0), HIDDEN.get(method.partition(",")[0])
    if width is None:
        return setting, None
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return setting, nn.Sequential(*layers, nn.Linear(width, 10))


def run(
    task: str,
    setting: Setting,
    scoring: nn.Module | None,
    method: str,
    seed: int,
    seconds: float | None,
) -> Result:
    """Train for the task's steps, or for so many seconds of the processor."""
    model, optimizer, losses, target, stream, test, keep, clip, warmup = setting
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    batches: Iterator[Batch]
    if seconds is not None:
        generator = torch.Generator().manual_seed(seed)
        pools = itertools.chain.from_iterable(itertools.repeat(stream(lambda: 0.0)))
        batches = (
            part for pool in pools for part in in_parts(pool, num_examples(pool) // keep, generator)
        )
    else:
        scorer = None
        if scoring is not None and "frozen" in method:
            scorer = Scorer(scoring)
        elif scoring is not None:
            rate = RATE[task] * optimizer.defaults["lr"]
            own = torch.optim.AdamW(scoring.parameters(), rate)
            after = LambdaLR(own, lambda step: min(1.0, (step + 1) / max(1, warmup)))
            scorer = Scorer(scoring, own, lr_scheduler=after, max_grad_norm=clip)
        selector = Selector(
            model, optimizer, losses, target, keep, 0, lr_scheduler=schedule, max_grad_norm=clip,
            seed=seed, derivative="central", scorer=scorer,
            strategy="uniform" if method in ("uniform", "oracle") else "influence",
        )  # fmt: skip
        batches = selector.stream(stream(lambda: 0.0))
    began, done = time.process_time(), 0
    for batch in batches:
        take_step(setting, schedule, batch)
        done += 1
        spent = time.process_time() - began
        if done == STEPS[task] if seconds is None else spent >= seconds:
            break
    return {"test_loss": mean_loss(losses, model, test), "steps": done, "seconds": spent}


def whole_pool_step_s(setting: Setting) -> float:
    """Processor seconds of a plain step on a whole pool, the least of some."""
    model, optimizer, losses, _, stream, *_ = setting
    times = []
    for pool in itertools.islice(stream(lambda: 0.0), 5):
        began = time.process_time()
        optimizer.zero_grad()
        losses(model, pool).mean().backward()
        optimizer.step()
        times.append(time.process_time() - began)
    return min(times)


def report(task: str, found: dict[str, list[Result]], whole_s: float) -> None:
    plain = found.get("plain, same seconds", found["uniform"])
    step_s = statistics.mean(each["seconds"] / each["steps"] for each in plain)
    print(f"\n{task}, {STEPS[task]} steps; a step on the whole pool costs {whole_s / step_s:.2f}")
    for method, results in found.items():
        losses = [each["test_loss"] for each in results]
        cost = statistics.mean(each["seconds"] / each["steps"] for each in results)
        line = f"  {method:<22} {statistics.mean(losses):.3f} ± {statistics.pstdev(losses):.3f}"
        line += f"  {cost / step_s:4.2f} plain-k {cost / whole_s:4.2f} plain-n"
        for other in ("uniform", "plain, same seconds"):
            if other in found and other != method:
                differences = [
                    a - each["test_loss"] for a, each in zip(losses, found[other], strict=True)
                ]
                test = paired(differences)
                line += f"; minus {other} {statistics.mean(differences):+.3f}"
                line += f" (p {test.p:.3f})" if test else ""
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=list(STEPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/scorer"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.jsonl"
    known: dict[str, Any] = {}
    if path.exists():
        known = dict(map(json.loads, path.read_text().splitlines()))

    def made(task: str, method: str, seed: int) -> tuple[Setting, nn.Module | None]:
        return images(method, seed) if task == "digits" else text(task, method, seed, args.out)

    for task in args.tasks:
        methods = [m for m in args.methods if not (task == "digits" and m == "oracle")]
        if task != "finetune":  # scorers have no other weights
            methods = [m for m in methods if m not in ("tenth, frozen", "tenth, random weights")]
        for seed in range(args.seeds):
            for method in methods:
                if (place := f"{task}/{method}/{seed}") in known:
                    continue
                is_timed = method.startswith("plain")
                seconds = known[f"{task}/tenth/{seed}"]["seconds"] if is_timed else None
                setting, scoring = made(task, method, seed)
                known[place] = run(task, setting, scoring, method, seed, seconds)
                with path.open("a") as file:
                    file.write(json.dumps([place, known[place]]) + "\n")
        found = {m: [known[f"{task}/{m}/{seed}"] for seed in range(args.seeds)] for m in methods}
        report(task, found, whole_pool_step_s(made(task, "uniform", 0)[0]))


if __name__ == "__main__":
    main()
