"""A scorer that plain training left behind, against one that was trained along.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer_stale.py [digits photographs lora] [--seeds 5]

The models, scorers, rates and data of `scorer.py`, a tenth scoring. First 200 plain steps (100 on
text), whole pools in parts; then selection at H = 0 comes on, as a contest of `horizon="auto"` may
find, and the scorer is trained on what is kept. "Stale": the scorer was as it began until then.
"Along": it took every plain step as well. "None": nothing is selected. Printed is the test loss
after so many steps of selection, and the differences paired by seed.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import islice
from pathlib import Path

import torch
from equal_time import mean_loss, take_step
from finished import Finished
from scorer import RATE, in_full, scorer_of
from scorer_tasks import IMAGES, TENTH, text
from torch.optim.lr_scheduler import LambdaLR

from selectflow import Selector
from selectflow.report.compare import paired

PLAIN = {"digits": 200, "photographs": 200, "lora": 100}
READ = {"digits": (25, 100, 400), "photographs": (25, 100, 400), "lora": (25, 100)}
WAYS = ("none", "stale", "along")


def run(task: str, way: str, seed: int, folder: Path) -> list[float]:
    """Test losses, after the plain steps and then where they are read."""
    setting, small = (
        IMAGES[task](TENTH, seed) if task in IMAGES else text(task, TENTH, seed, folder)
    )
    assert small is not None
    model, optimizer, losses, target, stream, test, keep, clip, warmup = setting
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)))
    scorer = scorer_of(small, RATE[task] * optimizer.defaults["lr"], setting, None)
    own = setting._replace(model=small, optimizer=scorer.optimizer)
    plain = in_full(setting, seed)
    for batch in islice(plain, PLAIN[task]):
        take_step(setting, schedule, batch)
        if way == "along":
            take_step(own, scorer.lr_scheduler, batch)
    found = [mean_loss(losses, model, test)]
    selector = Selector(
        model, optimizer, losses, target, keep, 0, lr_scheduler=schedule, max_grad_norm=clip,
        seed=seed, derivative="central", scorer=scorer,
    )  # fmt: skip
    batches = plain if way == "none" else selector.stream(stream(lambda: 0.0))
    for step, batch in enumerate(islice(batches, READ[task][-1]), 1):
        take_step(setting, schedule, batch)
        if step in READ[task]:
            found.append(mean_loss(losses, model, test))
    return found


def report(task: str, found: dict[str, list[list[float]]]) -> None:
    print(f"\n{task}: {PLAIN[task]} plain steps, and then")
    for at, step in enumerate((0, *READ[task])):
        line = f"  {step:4}"
        for way, runs in found.items():
            values = [run[at] for run in runs]
            line += f"  {way} {statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"
        gaps = [b[at] - a[at] for a, b in zip(found["stale"], found["along"], strict=True)]
        test = paired(gaps)
        line += f"  along minus stale {statistics.mean(gaps):+.3f}"
        print(line + (f" (p {test.p:.3f})" if test else ""))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tasks", nargs="*", default=["digits", "photographs"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/scorer"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = Finished(args.out / "stale.jsonl")
    for task in args.tasks:
        found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for seed in range(args.seeds):
            for way in WAYS:
                if (place := f"{task}/{way}/{seed}") not in known:
                    known[place] = run(task, way, seed, args.out)
                found[way].append(known[place])
        report(task, found)


if __name__ == "__main__":
    main()
