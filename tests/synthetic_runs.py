"""Run directories with known metrics, for the tests of comparisons."""

from pathlib import Path

import torch

from selectflow.report.runs import Run, load_run
from selectflow.run.ledger import Ledger
from selectflow.run.log import Tracker
from selectflow.run.yaml import dump_yaml
from selectflow.strategies import Selection

POOLS = [{"a": 1.0, "b": 2.0, "c": 6.0}, {"a": 300.0, "b": 100.0, "d": 200.0}]


def make_run(
    path: Path,
    accuracies: list[float],
    *,
    strategy: str = "influence",
    horizon: object = 1,
    seed: int = 0,
    step_s: float = 0.1,
    upfront_s: float = 0.0,
    status: str | None = "finished",
    **config: object,
) -> Run:
    """A run evaluated every 10 steps of `step_s` seconds, a quarter of them selecting.

    Its test loss is 1 - accuracy, its batch 16 of 64; status None: without a summary.
    """
    select = {"strategy": strategy, "horizon": horizon, "interval": 1, "keep": 16}
    config = {
        "name": path.name,
        "seed": seed,
        "steps": 100,
        "data": {"name": "digits", "label_noise": 0.4, "seed": 0},
        "select": select,
    } | config
    tracker = Tracker(path, config, name=path.name)
    (path / "config.yaml").write_text(dump_yaml(config))
    for number, accuracy in enumerate(accuracies, start=1):
        wall_s = upfront_s + 10 * number * step_s
        tracker.log(10 * number, {"test/accuracy": accuracy, "perf/wall_s": wall_s})
        tracker.log(10 * number, {"test/loss": 1 - accuracy, "data/samples_seen": 160 * number})
        scored = 0 if strategy == "uniform" else 640 * number
        tracker.log(10 * number, {"data/samples_scored": scored})
        tracker.log(10 * number, {"select/kept_altered": 0.1 * number, "perf/select_s": wall_s / 4})
    if status:
        tracker.finish({"status": status, "steps": 10 * len(accuracies)})
    return load_run(path)


def write_ledger(run_dir, pools, first=1, rank=0, size=1):
    """A ledger of pools given as {key: score} from step `first`, of each the two largest kept."""
    ledger = Ledger(run_dir, rank=rank, size=size)
    for step, pool in enumerate(pools, first):
        scores = torch.tensor(list(pool.values()), dtype=torch.float64)
        best = scores.argsort(descending=True)[:2]
        ledger.add(
            step,
            Selection(
                pool={"key": list(pool)}, indices=best, scores=scores, losses=None, step=step - 1,
                horizon=0, age=0, target_loss=None, lookahead_s=0.0, seconds=0.0,
            ),
        )  # fmt: skip
    ledger.flush()
