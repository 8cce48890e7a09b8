"""Plain training, selection at every step, and the controller's choice, for equal seconds.

    python tests/benchmarks/equal_time.py [--tasks noised clean turning] [--seeds 5] [--figure F]

Six streams: digits with 40% wrong labels, imbalanced and clean; text for adapters, for fine-tuning
and for random weights. `turning` has wrong labels in the middle third of its time alone. Each
method trains for the same seconds of the processor, at one constant rate after the warm-up of the
configuration; with --rates, at multiples of it, and then the controller has the rate as well. Plain
training takes all of every pool in batches as large as what the others keep. The controller is told
how many steps plain training took, or selection where it begins with that: so methods are named in
this order. The test set is read once, at the end. Finished runs are kept in --out and not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from adaptive_study import BASE_LR, KEEP, loss_fn, pools, shown, splits
from finished import Finished
from results_tasks import CONFIGS, from_base, mixture, trainer_module
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import Batch, chunks, in_parts, num_examples
from selectflow.report.compare import paired
from selectflow.run.build import build_optimizer
from selectflow.run.config import load

SECONDS = {
    "noised": 6, "imbalanced": 6, "clean": 6, "turning": 9, "lora": 60, "finetune": 60,
    "random": 40,
}  # fmt: skip
TEXT = {
    "lora": ("text_lora_online", from_base("text_lora_base")),
    "finetune": ("text_finetune_online", from_base("text_finetune_base")),
    "random": ("text_online", mixture),
}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "H = 0": {"horizon": 0},
    "auto": {"horizon": AutoHorizon()},
    "auto, from 0": {"horizon": AutoHorizon(first=0)},
    "auto, rate too": {"horizon": AutoHorizon(), "lr": "auto"},
    "H = 0, every 4": {"horizon": 0, "interval": 4},
    "H = 0, interval auto": {"horizon": 0, "interval": "auto"},
}
# whose steps in that time the controller is told as those of the run
LENGTH = {"auto": "plain", "auto, from 0": "H = 0", "auto, rate too": "plain"}
Result = dict[str, Any]


class Setting(NamedTuple):
    """What is trained, and on what."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Callable[[nn.Module, Batch], Tensor]
    target: list[Batch]
    pools: Callable[[Callable[[], float]], Iterator[Batch]]  # of the share of the time that is over
    test: list[Batch]
    keep: int
    clip: float | None
    warmup: int


def digits(task: str, seed: int, rate: float) -> Setting:
    data, target, test = splits("clean" if task == "turning" else task, seed)
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)

    def stream(elapsed: Callable[[], float]) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for pool in pools(data, seed):
            labels = pool["label"]
            if task == "turning" and 1 / 3 <= elapsed() < 2 / 3:
                wrong = torch.rand(len(labels), generator=generator) < 0.6
                other = (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10
                labels = torch.where(wrong, other, labels)
            yield pool | {"label": labels}

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * BASE_LR)
    halves = list(chunks(target, 100))
    return Setting(model, optimizer, loss_fn, halves, stream, [test], KEEP, None, 0)


def text(task: str, seed: int, rate: float, folder: Path) -> Setting:
    name, data = TEXT[task]
    options = data(folder, seed) | {"root": folder, "seed": seed, "track.kinds": "false"}
    config = load(CONFIGS / f"{name}.yaml", [f"{key}={value}" for key, value in options.items()])
    made = trainer_module("language")["build_task"](config)
    optimizer = build_optimizer(made.model, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= rate
    return Setting(
        made.model, optimizer, made.loss_fn, list(made.target), lambda _: iter(made.pools),
        list(made.test), int(config.select.keep), config.optimizer.max_grad_norm,
        config.schedule.warmup_steps,
    )  # fmt: skip


def mean_loss(losses: Callable[[nn.Module, Batch], Tensor], model: nn.Module, on: Any) -> float:
    with torch.no_grad():
        total = sum(float(losses(model, batch).sum()) for batch in on)
    return total / sum(map(num_examples, on))


def take_step(setting: Setting, schedule: LambdaLR, batch: Batch) -> None:
    """One step of training on a batch."""
    setting.optimizer.zero_grad()
    setting.losses(setting.model, batch).mean().backward()
    if setting.clip is not None:
        nn.utils.clip_grad_norm_(setting.model.parameters(), setting.clip)
    setting.optimizer.step()
    schedule.step()


def run(setting: Setting, options: dict[str, Any] | None, seconds: float, seed: int) -> Result:
    """Train for so many seconds of the processor."""
    model, optimizer, losses, target, stream, test, keep, clip, warmup = setting
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    began, modes, after_two_thirds = time.process_time(), [], None

    def elapsed() -> float:
        return (time.process_time() - began) / seconds

    selector = None
    if options is None:
        generator = torch.Generator().manual_seed(seed)
        batches = (
            part
            for pool in stream(elapsed)
            for part in in_parts(pool, num_examples(pool) // keep, generator)
        )
    else:
        selector = Selector(
            model, optimizer, losses, target, keep, lr_scheduler=schedule, max_grad_norm=clip,
            seed=seed, **options,
        )  # fmt: skip
        batches = selector.stream(stream(elapsed))
    for batch in batches:
        take_step(setting, schedule, batch)
        horizon = selector.last.horizon if selector and selector.last else None
        modes.append((elapsed(), -1 if horizon is None else horizon))
        if after_two_thirds is None and modes[-1][0] >= 2 / 3:
            paused = time.process_time()
            after_two_thirds = mean_loss(losses, model, test)
            began += time.process_time() - paused
        if modes[-1][0] >= 1:
            break
    control = selector.state.horizon if selector else None
    return {
        "test_loss": mean_loss(losses, model, test),
        "test_loss_after_two_thirds": after_two_thirds,
        "target_loss": mean_loss(losses, model, target),
        "steps": len(modes),
        "selected": sum(horizon >= 0 for _, horizon in modes) / len(modes),
        "contests": control.spent / control.training if control else 0.0,
        "cost": control.costs.get(0) if control else None,
        "modes": modes[:: max(1, len(modes) // 200)],
    }


def report(task: str, rate: float, found: dict[str, list[Result]]) -> None:
    print(f"\n{task}, {SECONDS[task]} s, rate x {rate:g}: test loss, mean ± sd over seeds")
    losses = {name: [result["test_loss"] for result in each] for name, each in found.items()}
    for name, each in found.items():
        steps, selected, contests = (
            statistics.mean(result[key] for result in each)
            for key in ("steps", "selected", "contests")
        )
        line = f"  {name:<20} {shown(losses[name])}  {steps:6.0f} steps, {selected:4.0%} selected"
        if task == "turning":
            line += f"; after 2/3 {shown([r['test_loss_after_two_thirds'] for r in each])}"
        if name != "plain":
            differences = [a - b for a, b in zip(losses[name], losses["plain"], strict=True)]
            test = paired(differences)
            line += f"; minus plain {shown(differences)}" + (f", p {test.p:.3f}" if test else "")
        print(line + (f"; contests {contests:.1%}" if contests else ""))


def draw(path: Path, known: Finished, tasks: list[str], seeds: int) -> None:
    """The chosen modes over the time of a run, one line a seed."""
    _, axes = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks), 2.2), sharey=True)
    for axis, task in zip(axes if len(tasks) > 1 else [axes], tasks, strict=True):
        for seed in range(seeds):
            modes = known[key(task, "auto", 1.0, seed)]["modes"]
            axis.step(*zip(*modes, strict=True), where="post", alpha=0.6, linewidth=1)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("share of the time")
        axis.set_yticks([-1, 0, 1, 2], ["off", "0", "1", "2"])
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def key(task: str, method: str, rate: float, seed: int) -> str:
    return f"{task}/{method}/{rate:g}/{seed}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS)[:3])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/equal_time"))
    parser.add_argument("--figure", type=Path, help="where to draw the modes over time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = Finished(args.out / "results.jsonl")
    for task in args.tasks:
        for rate in args.rates:
            for seed in range(args.seeds):
                for name in args.methods:
                    place = key(task, name, rate, seed)
                    if place in known:
                        continue
                    make = text if task in TEXT else digits
                    setting = make(task, seed, rate, *([args.out] if task in TEXT else []))
                    options = METHODS[name]
                    if name in LENGTH:
                        num = known[key(task, LENGTH[name], rate, seed)]["steps"]
                        options = (options or {}) | {"num_steps": num}
                    known[place] = run(setting, options, SECONDS[task], seed)
            found = {
                name: [known[key(task, name, rate, seed)] for seed in range(args.seeds)]
                for name in args.methods
            }
            report(task, rate, found)
    if args.figure:
        draw(args.figure, known, args.tasks, args.seeds)


if __name__ == "__main__":
    main()
