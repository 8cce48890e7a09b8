"""A small model that scores for the trained one: test loss and cost, beside other choices.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer.py [finetune lora random digits photographs]

For as many steps: any examples, the model scoring itself, a scorer of about a tenth and of about a
thirtieth of its size, the same frozen, one with random weights, one that reads half of the tokens
of each example and half of each target batch, the model itself by a part of its parameters or of
the tokens (fine-tuning), and (text) the target's domain alone. Then plain training of whole pools
in parts, for the processor seconds that the tenth took, and for those that the model's own scores
took. Scorers of the fine-tuning tasks have read what the model's base has, and all their weights
are trained, also where the model has adapters. The test set is read once, at the end of a run.
Finished runs are kept in --out and not repeated.

On photographs, of `study_data.py`, a CNN of three layers of 48 channels is trained. Beside smaller
ones, half the resolution is scored with: by a CNN of the same size, and by the model itself, which
may be trained on the kept images at half the resolution, too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from equal_time import Setting, mean_loss, take_step
from finished import Finished
from scorer_tasks import IMAGES, TENTH, THIRTIETH, Made, beginning, halved, text
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from selectflow import Scorer, Selector
from selectflow.core.batches import Batch, in_parts, num_examples
from selectflow.report.compare import paired

# steps, and the rate of a scorer over the model's
STEPS = {"finetune": 100, "lora": 100, "random": 100, "digits": 400, "photographs": 400}
RATE = {"finetune": 2, "lora": 1, "random": 2, "digits": 3, "photographs": 2}
HALF = ("half resolution", "itself, half resolution", "itself, half resolution, trained on")
HALF_READ = "tenth, half of both"
# parts of what the model itself scores by, for GPT-2 of transformers
PARTS: dict[str, dict[str, Any]] = {
    "itself, MLP outputs": {"params": ["*.mlp.c_proj.*"]},
    "itself, a quarter of the tokens": {"score_view": beginning(4)},
}
METHODS = (
    "uniform", "itself", TENTH, THIRTIETH, "tenth, frozen", "tenth, random weights", HALF_READ,
    *PARTS, "oracle", "plain, same seconds", "plain, itself's seconds", *HALF,
)  # fmt: skip
Result = dict[str, float]


def scorer_of(model: nn.Module, rate: float | None, setting: Setting, view: Any) -> Scorer:
    """A scorer that is trained at a rate, after the warm-up of the other; None: frozen."""
    if rate is None:
        return Scorer(model, view=view)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, setting.warmup)))
    return Scorer(model, optimizer, view=view, lr_scheduler=schedule, max_grad_norm=setting.clip)


def in_full(setting: Setting, seed: int) -> Iterator[Batch]:
    """Whole pools in parts, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for pool in setting.pools(lambda: 0.0):
            yield from in_parts(pool, num_examples(pool) // setting.keep, generator)


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
    if seconds is not None:
        batches = in_full(setting, seed)
    else:
        view = halved if "half resolution" in method else None
        scorer = None
        if scoring is not None:
            rate = None if "frozen" in method else RATE[task] * optimizer.defaults["lr"]
            scorer, view = scorer_of(scoring, rate, setting, view), None
        if method == HALF_READ:
            view = beginning(2)
            target = [part for batch in target for part in in_parts(batch, 2, torch.Generator())]
        selector = Selector(
            model, optimizer, losses, target, keep, 0, lr_scheduler=schedule, max_grad_norm=clip,
            seed=seed, derivative="central", scorer=scorer,
            strategy="uniform" if method in ("uniform", "oracle") else "influence",
            **({"score_view": view} | PARTS.get(method, {})),
        )  # fmt: skip
        batches = selector.stream(stream(lambda: 0.0))
    if method.endswith("trained on"):
        setting = setting._replace(
            losses=lambda model, batch: (losses(model, batch) + losses(model, halved(batch))) / 2
        )
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
    same = "plain, same seconds"
    plain = found.get(same, found["uniform"])
    step_s = statistics.mean(each["seconds"] / each["steps"] for each in plain)
    print(f"\n{task}, {STEPS[task]} steps; a step on the whole pool costs {whole_s / step_s:.2f}")
    for method, results in found.items():
        losses = [each["test_loss"] for each in results]
        cost = statistics.mean(each["seconds"] / each["steps"] for each in results)
        line = f"  {method:<22} {statistics.mean(losses):.3f} ± {statistics.pstdev(losses):.3f}"
        line += f"  {cost / step_s:4.2f} plain-k {cost / whole_s:4.2f} plain-n"
        for other in ("uniform", "plain, itself's seconds" if method == "itself" else same):
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
    known = Finished(args.out / "results.jsonl")

    def made(task: str, method: str, seed: int) -> Made:
        if task in IMAGES:
            return IMAGES[task](method, seed)
        return text(task, method, seed, args.out)

    for task in args.tasks:
        left_out = () if task == "photographs" else HALF
        left_out += ("oracle", HALF_READ) if task in IMAGES else ()
        left_out += () if task == "finetune" else tuple(PARTS)
        if task not in ("finetune", "lora"):  # scorers have no other weights
            left_out += ("tenth, frozen", "tenth, random weights")
        methods = [m for m in args.methods if m not in left_out]
        for seed in range(args.seeds):
            for method in methods:
                if (place := f"{task}/{method}/{seed}") in known:
                    continue
                timed = "itself" if "itself's" in method else TENTH
                is_timed = method.startswith("plain")
                seconds = known[f"{task}/{timed}/{seed}"]["seconds"] if is_timed else None
                setting, scoring = made(task, method, seed)
                known[place] = run(task, setting, scoring, method, seed, seconds)
        found = {m: [known[f"{task}/{m}/{seed}"] for seed in range(args.seeds)] for m in methods}
        report(task, found, whole_pool_step_s(made(task, "uniform", 0)[0]))


if __name__ == "__main__":
    main()
