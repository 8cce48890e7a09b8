"""Run directories with known metrics, for the tests of comparisons."""

from pathlib import Path

from selectflow.report.runs import Run, load_run
from selectflow.run.tracking import Tracker
from selectflow.run.yaml import dump_yaml


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
