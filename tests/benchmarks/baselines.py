"""What else one could do with a stream and a target set, against selection: one table a task.

    python tests/benchmarks/baselines.py [--tasks noised visits] [--methods plain "H = 0"]
        [--reference "H = 0"] [--num-target 200] [--seeds 5] [--figure F]

`study_data` describes the tasks; two of them need `pip install scikit-image statsmodels`. An MLP
with two hidden layers of 128 is trained by AdamW at a constant rate on pools of 64, 16 a step. All
methods have the same pools, target set and tuning:

- A fifth of the target set is held out of every method. Its loss chooses the learning rate, of four
  by two seeds of their own, once for each budget, and stops early: a run is read where that loss
  was lowest so far. The test set is read beside it, and decides nothing.
  `greats`, `adam` and `opus`, whose runs take long, have two of the rates and one of the seeds.
- The rest of the target set is what is selected by, or trained on; of who does both, half of it is.
- Budgets are 400 optimizer steps, and `--seconds` of the processor (0: none), without evaluation.

Differences to --reference are paired by seed (t test, corrected by Holm). Finished runs are kept in
--out and not repeated.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from baselines_tables import Budget, Point, Row, Runs, Tuning, draw_losses, ranking, rows, table
from equal_time import Setting, take_step
from study_data import TASKS, Batch, draw
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from selectflow import AutoHorizon, Selector
from selectflow.core.batches import chunks, in_parts, join, num_examples, take
from selectflow.strategies import STRATEGIES

POOL, KEEP, STEPS, EVERY = 64, 16, 400, 20
HELD_OUT, MIXED = 1 / 5, 1 / 4  # of the target set; of a batch that target examples are mixed into
TUNING = Tuning((3e-4, 1e-3, 3e-3, 1e-2), (100, 101))
# of those whose runs take long
FEWER = dict.fromkeys(("greats", "adam", "opus"), Tuning((3e-3, 1e-2), (100,)))


class Method(NamedTuple):
    """What is trained on.

    Attributes:
        options: of the `Selector`; None: nothing is selected.
        stream: examples of the stream in a step, over the size of a batch.
        mixed: examples of the target set in a step, over the same.
        is_shared: whether all of the target set is trained on and selected by, not a half each.
    """

    options: dict[str, Any] | None = None
    stream: float = 1.0
    mixed: float = 0.0
    is_shared: bool = False


MAIN = {
    "plain": Method(),
    "plain, whole pools": Method(stream=POOL / KEEP),
    "target alone": Method(stream=0, mixed=1),
    "target mixed in": Method(stream=1 - MIXED, mixed=MIXED),
    "target mixed in, H = 0": Method({"horizon": 0}, 1 - MIXED, MIXED),
    "largest loss": Method({"strategy": "loss"}),
    "rho": Method({"strategy": "rho"}),
    "gradient": Method({"strategy": "gradient"}),
    "H = 0": Method({"horizon": 0}),
    "adaptive": Method({"horizon": AutoHorizon(), "lr": "auto"}),
    "adaptive, always selects": Method({"horizon": AutoHorizon(off=False), "lr": "auto"}),
}
SHARED = {
    "target mixed in, H = 0 by the same": Method({"horizon": 0}, 1 - MIXED, MIXED, is_shared=True)
}
ADAPTIVE = {
    "adaptive, from H = 0": Method({"horizon": AutoHorizon(first=0), "lr": "auto"}),
    "adaptive, given rate": Method({"horizon": AutoHorizon()}),
}
OTHERS = {  # of the field: dearer, or weaker than those above
    name: Method({"strategy": name})
    for name in STRATEGIES
    if name not in ("uniform", "loss", "rho", "gradient", "influence")
}
METHODS = MAIN | SHARED | ADAPTIVE | OTHERS

# --- training


def shuffled(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """Batches of the size, epoch after epoch, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, num_examples(data))
    while True:
        order = torch.randperm(num_examples(data), generator=generator)
        for start in range(0, len(order) - size + 1, size):
            yield take(data, order[start : start + size])


def divided(batch: Batch, num: int) -> tuple[Batch, Batch]:
    """The first so many examples, and the rest."""
    return take(batch, slice(num)), take(batch, slice(num, None))


class Start(NamedTuple):
    """Of a run.

    Attributes:
        setting: what is trained; its target is what may be used of it.
        held_out: the rest of the target set, in batches.
        judge: (model, batches) -> mean loss and accuracy; NaN where there is none.
        options: of every `Selector`.
    """

    setting: Setting
    held_out: Sequence[Batch]
    judge: Callable[[nn.Module, Sequence[Batch]], tuple[float, float]]
    options: dict[str, Any]


def batches(method: Method, start: Start, schedule: LambdaLR, seed: int) -> Iterator[Batch]:
    """What each step trains on."""
    setting = start.setting
    num, num_mixed = (round(share * setting.keep) for share in (method.stream, method.mixed))
    trained_on = join(setting.target)
    selected_by, pools = setting.target, setting.pools(lambda: 0.0)
    if method.options is not None and num_mixed and not method.is_shared:
        size = num_examples(selected_by[0])
        trained_on, rest = divided(trained_on, num_examples(trained_on) // 2)
        selected_by = list(chunks(rest, size))
    clean = shuffled(trained_on, num_mixed, seed) if num_mixed else None
    if not num:
        assert clean is not None
        return clean
    if method.options is None:
        generator = torch.Generator().manual_seed(seed)
        stream = (
            part for pool in pools for part in in_parts(pool, num_examples(pool) // num, generator)
        )
    else:
        stream = Selector(
            setting.model, setting.optimizer, setting.losses, selected_by, num, seed=seed,
            lr_scheduler=schedule, max_grad_norm=setting.clip, **start.options, **method.options,
        ).stream(pools)  # fmt: skip
    return stream if clean is None else map(join, zip(stream, clean, strict=False))


def run(method: Method, start: Start, seed: int, steps: int, until_s: float) -> list[Point]:
    """Train until both budgets are used up; where the run stood every so many steps."""
    setting = start.setting
    schedule = LambdaLR(
        setting.optimizer, lambda step: min(1.0, (step + 1) / max(1, setting.warmup))
    )
    points, seconds, began = [], 0.0, time.process_time()
    for step, batch in enumerate(batches(method, start, schedule, seed), start=1):
        take_step(setting, schedule, batch)
        if step % EVERY:
            continue
        seconds += time.process_time() - began
        held_out, _ = start.judge(setting.model, start.held_out)
        points.append(Point(step, seconds, held_out, *start.judge(setting.model, setting.test)))
        if step >= steps and seconds >= until_s:
            break
        began = time.process_time()
    return points


# --- classification


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def classifier(task: str, rate: float, seed: int, num_target: int) -> Start:
    """The MLP and the data of a task."""
    data = draw(task, seed, num_target)
    held_out, target = divided(data.target, round(HELD_OUT * num_target))
    torch.manual_seed(seed)
    classes, width = 1 + int(max(batch["y"].max() for batch in data)), data.test["x"].shape[1]
    layers = [nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    setting = Setting(
        model, optimizer, loss_fn, [target], lambda _: shuffled(data.train, POOL, seed),
        [data.test], KEEP, None, 0,
    )  # fmt: skip
    return Start(setting, [held_out], judged, {})


def judged(model: nn.Module, on: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    batch = join(on)
    with torch.no_grad():
        logits = model(batch["x"])
    is_right = logits.argmax(1) == batch["y"]
    return F.cross_entropy(logits, batch["y"]).item(), is_right.float().mean().item()


def train(task: str, name: str, rate: float, seed: int, num: int, seconds: float) -> list[Point]:
    """A run of a method."""
    return run(METHODS[name], classifier(task, rate, seed, num), seed, STEPS, seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(MAIN))
    parser.add_argument("--reference", choices=METHODS, default="adaptive")
    parser.add_argument("--num-target", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--figure", type=Path, help="where to draw the losses")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.out / "runs.jsonl", args.seconds, train, TUNING, FEWER)
    budgets = [Budget(f"{STEPS} steps", steps=STEPS)]
    if args.seconds:
        budgets.append(Budget(f"{args.seconds:g} s", seconds=args.seconds))
    found: dict[str, dict[str, list[Row]]] = {budget.title: {} for budget in budgets}
    for task in args.tasks:
        for budget in budgets:
            each = rows(runs, task, args.methods, args.seeds, args.num_target, budget)
            found[budget.title][task] = each
            title = f"{task}, {budget.title}, {args.num_target} of the target, {args.seeds} seeds"
            print("", title, "", *table(each, args.reference), sep="\n", flush=True)
    for title, of in found.items():
        print("", f"all tasks, {title}", "", *ranking(of, args.methods, args.reference), sep="\n")
    if args.figure:
        draw_losses(args.figure, found, args.methods)


if __name__ == "__main__":
    main()
