"""The results of the README from scratch: tables and figures, at equal steps and in equal time.

    python tests/benchmarks/results.py [--tasks noised lora] [--methods offline] [--seeds 5]

Every method is run by the trainers in `trainers/` from a file of `configs/`; the digits all at one
learning rate, that of the configurations, stated and not searched. `uniform` goes on for as many
seconds as the slowest method of its seed took, and is read where it stood after the same steps and
after the same seconds: selection counts, and so do offline's recording and sweep; evaluation does
not. Nothing is chosen by the test set. The second table of a task gives every method the early
stopping that a target set allows: each is read where its target loss was lowest so far.

Finished runs stay in --out and are not repeated; runs.jsonl has a line for each. results.md and the
figures are written there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from results_tasks import BOTH, ROOT, TASKS, UNIFORM, Options, Task, trainer

from selectflow.report.compare import Comparison, Stat, stat, summarize
from selectflow.report.figures import Panel, curves, kept_shares, write_png
from selectflow.report.runs import KEPT, KEPT_ALTERED, Run, end, load_run, value_at
from selectflow.report.tables import AXES, Grid, grids, quantity, spread, verdict
from selectflow.run.config import RunConfig, load
from selectflow.run.metrics import STEP, TARGET_LOSS, TEST_ACCURACY, TEST_LOSS, WALL_S

STRETCHED = f"{UNIFORM}, schedule stretched"

# --- running


def configure(task: Task, method: str, seed: int, folder: Path, common: Options) -> list[str]:
    """The command line of a run, that of its trainer."""
    config, options = task.methods[method]
    options = common | options | task.data(folder, seed) | {
        "root": folder, "name": name_of(method, seed), "seed": seed, "overwrite": "true",
        "track.wandb": "disabled", "num_threads": 1,
    }  # fmt: skip
    overrides = [f"{key}={value}" for key, value in options.items()]
    return [str(ROOT / "configs" / f"{config}.yaml"), *overrides]


def name_of(method: str, seed: int) -> str:
    """Folder of a run."""
    return f"{re.sub(r'[^a-zA-Z0-9]+', '-', method).strip('-')}-s{seed}"


def run(task: Task, method: str, arguments: list[str], record: Path) -> Run:
    """The run of a command line, repeated only where it is not there yet or was another."""
    config = load(arguments[0], arguments[1:])
    if is_there(config):
        return load_run(config.run_dir)
    with contextlib.redirect_stdout(io.StringIO()):
        status = trainer(task.trainer)(arguments)
    if status != 0:
        sys.exit(status)
    found = load_run(config.run_dir)
    if found.status != "finished":  # Ctrl-C or SIGTERM: a run ends without an error
        sys.exit(f"{found.where}: {found.status} at step {found.last_step}; start again to go on")
    line = {
        "task": task.title, "method": method, "seed": config.seed, "folder": str(config.run_dir),
        "steps": found.last_step, WALL_S: end(found, WALL_S), TEST_LOSS: end(found, TEST_LOSS),
        TEST_ACCURACY: end(found, TEST_ACCURACY), "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(), "machine": machine(),
    }  # fmt: skip
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return found


def only(task: Task, methods: Sequence[str] | None) -> Task:
    """A task with some of its methods, and uniform."""
    if methods is None:
        return task
    if unknown := [method for method in methods if method not in task.methods]:
        sys.exit(f"--methods must be among {', '.join(task.methods)}, got {', '.join(unknown)}")
    chosen = {name: how for name, how in task.methods.items() if name in {UNIFORM, *methods}}
    return replace(task, methods=chosen)


def is_there(config: RunConfig) -> bool:
    """Whether a finished run of the same configuration is stored, at least as long."""
    if not (config.run_dir / "summary.json").exists():
        return False
    stored = load_run(config.run_dir)
    mine, theirs = config.model_dump(mode="json"), dict(stored.config)
    long_enough = (theirs.pop("max_wall_s") or math.inf) >= (mine.pop("max_wall_s") or math.inf)
    return stored.status == "finished" and long_enough and mine == theirs


def run_task(
    task: Task, folder: Path, record: Path, seeds: int, common: Options
) -> dict[str, list[Run]]:
    """All runs by method. Seeds outside: a drift of the machine's speed meets all methods alike."""
    found: dict[str, list[Run]] = {method: [] for method in task.methods}
    for seed in range(seeds):
        for method in sorted(task.methods, key=UNIFORM.__eq__):  # uniform last: see `longer`
            arguments = configure(task, method, seed, folder, common)
            config = load(arguments[0], arguments[1:])
            others = [runs[seed] for runs in found.values() if runs[seed:]]
            if method == UNIFORM:
                arguments += longer(config, others)
            began = time.perf_counter()
            found[method].append(run(task, method, arguments, record))
            seconds = time.perf_counter() - began
            print(f"{task.title}, seed {seed}, {method}: {seconds:.1f} s", flush=True)
        if overrides := stretched(config, found[UNIFORM][seed], others):
            arguments += overrides
            found.setdefault(STRETCHED, []).append(run(task, STRETCHED, arguments, record))
    return found


def longer(config: RunConfig, others: Sequence[Run]) -> list[str]:
    """Overrides that let uniform run on to the second at which the slowest of the others ended.

    With a schedule of the learning rate that ends with the run there is no going on: see
    `stretched`.
    """
    if config.schedule.name != "constant":
        return []
    steps = config.steps if not others else others[0].last_step
    seconds = slowest(others)
    every = math.gcd(steps, config.eval_every)  # so that it is read at the others' last step too
    return [
        f"steps={1000 * steps}",
        f"max_wall_s={math.ceil(seconds + 1)}",
        f"eval_every={every}",
    ]


def stretched(config: RunConfig, uniform: Run, others: Sequence[Run]) -> list[str]:
    """Overrides that give uniform the seconds of the slowest, its schedule stretched over them."""
    own = end(uniform, WALL_S)
    if config.schedule.name == "constant" or not own or slowest(others) <= own:
        return []
    steps = round(config.steps * slowest(others) / own)
    return [f"steps={steps}", f"name={name_of(STRETCHED, config.seed)}"]


def slowest(runs: Sequence[Run]) -> float:
    """Seconds of the run that took longest."""
    return max((end(run, WALL_S) or 0.0 for run in runs), default=0.0)


# --- reading


def best_by_target(run: Run) -> Run:
    """The run under early stopping: at every step what the best model so far has on the test set.

    The best model is that of the evaluation with the lowest target loss; the test set decides
    nothing.
    """
    best: dict[str, object] = {}
    lowest, metrics = math.inf, []
    for line in run.metrics:
        if (loss := line.get(TARGET_LOSS)) is not None and loss < lowest:
            lowest, best = loss, {name: line[name] for name in BOTH if name in line}
        metrics.append(line | best)
    return replace(run, metrics=metrics)


def compare(found: dict[str, list[Run]], metric: str) -> Comparison:
    """The methods against uniform by one metric.

    To `compare` they are strategies of one task, which it could not see by itself: each seed draws
    its own imbalanced digits, and the oracle of text is uniform on another mixture.
    """
    first = next(iter(found.values()))[0].config["data"]
    runs = []
    for method, members in found.items():
        for run in members:
            data = first | {"seed": run.config["data"]["seed"]}
            config = run.config | {"data": data, "select": {"strategy": method}}
            runs.append(replace(run, config=config))
    return summarize(runs, quality=metric)


# --- writing


def headline(comparisons: Sequence[Comparison], with_noise: bool) -> Grid:
    """One row a method: values at equal steps, uniform's in the same time, and what is seen."""
    first, step = comparisons[0], comparisons[0].step
    head = [f"at step {step:.0f}", "seconds"]
    titles = {TEST_LOSS: "loss", TEST_ACCURACY: "accuracy"}
    head += [titles[each.quality] for each in comparisons]
    head += [f"{UNIFORM} in the same time: {titles[each.quality]}" for each in comparisons]
    head += ["difference to it at equal steps", "in the same time"]
    cells = []
    for rows in zip(*(each.rows for each in comparisons), strict=True):
        name = rows[0].label
        seconds = stat([value_at(run, WALL_S, step) for run in first.runs[name]])
        line = [name, spread(seconds, 1)]
        both = list(zip(rows, comparisons, strict=True))
        line += [shown(row.stats["quality_at_step"], of) for row, of in both]
        line += [shown(row.stats["baseline_in_same_time"], of) for row, of in both]
        for question in ("at_equal_steps", "in_same_time"):
            line.append(said(verdict(row.tests[question], of.quality) for row, of in both))
        altered = spread(rows[0].stats["kept_altered"], 1, 100)
        cells.append(line + ([altered] if with_noise else []))
    return Grid("", head + (["wrong among kept (%)"] if with_noise else []), cells)


def shown(found: Stat | None, comparison: Comparison) -> str:
    """Mean ± standard deviation in the unit of the quality."""
    unit = quantity(comparison.quality)
    return spread(found, unit.digits, unit.scale)


def said(verdicts: Iterable[str]) -> str:
    """Verdicts on loss and accuracy, said once where they agree."""
    found = list(verdicts)
    return found[0] if len(set(found)) == 1 else ", ".join(found)


def markdown(grid: Grid) -> str:
    """A table in Markdown."""
    lines = [grid.head, ["---"] * len(grid.head), *grid.cells]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def report(task: Task, found: dict[str, list[Run]], noise: bool) -> str:
    """The section of a task: both tables, and the paired differences behind them."""
    parts, found = [f"## {task.title}\n"], dict(found)
    if longest := found.pop(STRETCHED, None):
        parts.append(f"{as_long(longest, task.judged)}\n")
    stopped = {name: [*map(best_by_target, runs)] for name, runs in found.items()}
    for title, runs in (("As it stands", found), ("Stopped at the lowest target loss", stopped)):
        comparisons = [compare(runs, metric) for metric in task.judged]
        parts.append(f"### {title}\n\n{markdown(headline(comparisons, noise))}")
        for each in comparisons:
            tests = [grid for grid in grids(each) if grid.title.startswith("difference")]
            parts += [f"{each.quality}, {grid.title}\n\n{markdown(grid)}" for grid in tests]
    if any(kept_origins(found).cells):
        parts.append(f"### Share of each origin among the kept\n\n{markdown(kept_origins(found))}")
    return "\n".join(parts)


def as_long(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """What uniform comes to in the seconds of the slowest method."""
    steps = ", ".join(str(run.last_step) for run in runs)
    seconds = spread(stat([end(run, WALL_S) for run in runs]), 1)
    ends = (f"{name} {spread(stat([end(run, name) for run in runs]), 3)}" for name in metrics)
    return f"{STRETCHED}: {steps} steps, {seconds} s: {', '.join(ends)}."


def kept_origins(found: dict[str, list[Run]]) -> Grid:
    """What the kept examples were, in % over all steps, one column an origin; empty where unknown.

    Of digits there is the share of wrong labels alone, which has its own column above.
    """
    step = compare(found, TEST_LOSS).step
    apart = {f"{KEPT}fraction", KEPT_ALTERED}
    runs = [until(run, step) for members in found.values() for run in members]
    names = {name for run in runs for line in run.metrics for name in line if KEPT in name}
    columns, cells = sorted(names - apart), []
    for method, members in found.items() if columns else ():
        line = [method]
        for column in columns:
            each = [mean_of(until(run, step), column) for run in members]
            line.append(spread(stat([value for value in each if value is not None]), 1, 100))
        cells.append(line)
    return Grid("", ["", *(name.removeprefix(KEPT) for name in columns)], cells)


def mean_of(run: Run, metric: str) -> float | None:
    """Mean over the lines that have a metric, each of as many steps; None: no line has it."""
    values = [line[metric] for line in run.metrics if line.get(metric) is not None]
    return statistics.fmean(values) if values else None


def figure(task: Task, found: dict[str, list[Run]]) -> list[Panel]:
    """Test loss over steps, as far as all go, and over seconds; what was kept over steps."""
    axes = {axis.metric: axis for axis in AXES}
    found = {name: runs for name, runs in found.items() if name != STRETCHED}
    whole = compare(found, TEST_LOSS)
    upto = {name: [until(run, whole.step) for run in runs] for name, runs in found.items()}
    short = compare(upto, TEST_LOSS)
    return [
        curves(short, axes[STEP])[0],
        curves(whole, axes[WALL_S])[0],
        *kept_shares(short, task.kept),
    ]


def until(run: Run, step: float | None) -> Run:
    """The run as it was at a step."""
    return replace(run, metrics=[line for line in run.metrics if line[STEP] <= (step or math.inf)])


def machine() -> str:
    """What decides the seconds."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpus} CPUs ({platform.machine()}), one thread, torch {torch.__version__}"


@cache
def commit() -> str:
    """The commit of the code, with -dirty where files have been changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def origin(record: Path, command: str) -> str:
    """What the tables were made with: the command, and date, commit and machine of their runs."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    last = {line["folder"]: line for line in lines}.values()  # a run that was repeated counts once
    dates, commits, machines = (
        sorted({line[key] for line in last}) for key in ("date", "commit", "machine")
    )
    return (
        f"`{command}`, {len(last)} runs from {dates[0]} to {dates[-1]}, commit "
        f"{', '.join(commits)}; {'; '.join(machines)}.\n\nMean ± standard deviation over seeds. "
        "Differences to uniform are tested in pairs of the same seed (t test, corrected by Holm "
        "for the number of methods): where it says no difference seen, p is not below 0.05. "
        "Where loss and accuracy disagree, the first word is for the loss.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="beside uniform; default: all of a task")
    parser.add_argument("--seeds", type=int, help="default: 5, of text and lora 3")
    parser.add_argument("--steps", type=int, help="default: those of the configurations")
    parser.add_argument("--lr", type=float, help="default: those of the configurations")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record, sections = args.out / "runs.jsonl", []
    common = {} if args.lr is None else {"optimizer.lr": args.lr}
    common |= {} if args.steps is None else {"steps": args.steps}
    for name in args.tasks:
        task = only(TASKS[name], args.methods)
        found = run_task(task, args.out / name, record, args.seeds or task.seeds, common)
        sections.append(report(task, found, name == "noised"))
        panels = figure(task, found)
        write_png(panels, args.out / f"{name}.png", columns=3 if len(panels) == 3 else 2)
        print(f"\n{sections[-1]}", flush=True)
    command = " ".join(["python", "tests/benchmarks/results.py", *sys.argv[1:]])
    text = "\n".join(["# Results\n", origin(record, command), *sections])
    (args.out / "results.md").write_text(text)
    print(f"wrote {args.out / 'results.md'}")


if __name__ == "__main__":
    main()
