"""What the cells of a sweep came to, read from the directories of their runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from selectflow.report.runs import Run, load_run
from selectflow.run.config import RunConfig, known_keys, load
from selectflow.run.yaml import dump_yaml, read_yaml, set_key
from selectflow.tune.cell_table import Cell, Cells, State, sort_cells
from selectflow.tune.space import Setting
from selectflow.tune.sweep import Sweep


def make_cell(
    sweep: Sweep, setting: Setting, runs: Sequence[Run], state: State, note: str = ""
) -> Cell:
    """A cell from its runs.

    Args:
        sweep: the sweep.
        setting: of the cell.
        runs: one for each seed that was begun, in the order of the seeds.
        state: how it ended.
        note: why it failed.
    """
    config, metric = sweep.load(setting), sweep.keys.metric.name
    lasts = [_last(run, metric) for run in runs]
    known = [last for last in lasts if last is not None]
    errors = [
        row["select/relative_error"]
        for run in runs
        for row in run.metrics
        if row.get("select/relative_error") is not None
    ]
    return Cell(
        setting=setting,
        horizon=config.select.horizon,
        lr=config.optimizer.lr,
        state=state,
        values=tuple(
            last
            for run, last in zip(runs, lasts, strict=True)
            if run.status == "finished" and last is not None
        ),
        last=statistics.fmean(known) if known else None,
        steps=sum(run.summary.get("steps", run.metrics[-1]["train/step"]) for run in runs),
        seconds=sum(run.metrics[-1]["perf/wall_s"] for run in runs),
        relative_error=statistics.fmean(errors) if errors else None,
        note=note,
    )


def sort_into(sweep: Sweep, cells: Iterable[Cell]) -> Cells:
    """All cells of a sweep, best first."""
    full = None
    if sweep.keys.method == "grid":
        settings = sweep.grid()[: sweep.keys.run_cap]
        full = max(1, len(sweep.seeds)) * sum(sweep.load(each).steps for each in settings)
    goal = sweep.keys.metric.goal
    return Cells(sort_cells(list(cells), goal), sweep.keys.metric.name, goal, full)


def load_runs(run_dirs: Iterable[Path]) -> list[Run]:
    """The runs that have measured something, in the order given."""
    logs = [(path, path / "metrics.jsonl") for path in run_dirs]
    return [load_run(path) for path, log in logs if log.exists() and log.stat().st_size]


def cells_of_runs(sweep: Sweep, run_dirs: Iterable[Path]) -> Cells:
    """The cells of a sweep that others have run, as W&B's agents do.

    A cell is complete when all seeds of a grid are finished, stopped when its last run was.
    """
    groups: dict[str, list[tuple[RunConfig, Run]]] = {}
    for run in load_runs(run_dirs):
        config = load(Path(run.where) / "config.yaml")
        groups.setdefault(json.dumps(_setting(sweep, config)), []).append((config, run))
    cells = []
    for members in groups.values():
        members.sort(key=lambda member: member[0].seed)
        runs, setting = [run for _, run in members], _setting(sweep, members[0][0])
        num = len(sweep.seeds) if sweep.keys.method == "grid" else 1
        states = [run.status for run in runs]
        if all(state == "finished" for state in states) and len(runs) >= num:
            cells.append(make_cell(sweep, setting, runs, "complete"))
        elif "stopped" in states:
            cells.append(make_cell(sweep, setting, runs, "stopped"))
        else:
            note = f"{len(runs)} of {num} seeds: {', '.join(states)}"
            cells.append(make_cell(sweep, setting, runs, "failed", note))
    return sort_into(sweep, cells)


def _setting(sweep: Sweep, config: RunConfig) -> Setting:
    values = config.model_dump(mode="python")
    setting: Setting = {}
    for key in sweep.domains:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        setting[key] = list(value) if isinstance(value, tuple) else value
    return setting


def _last(run: Run, metric: str) -> float | None:
    known = [row[metric] for row in run.metrics if row.get(metric) is not None]
    return known[-1] if known else None


def write_best(sweep: Sweep, found: Cells, path: Path) -> None:
    """Write the configuration of the best cell: the sweep's base with its setting.

    Raises:
        OSError: the file cannot be written.
    """
    assert found.best is not None
    values = read_yaml(sweep.config)
    for override in [f"name={sweep.name}-best-s{{seed}}", *sweep.arguments(found.best.setting)[1:]]:
        set_key(values, override, known_keys(), "select.horizon=2")
    size = f"{found.best.mean:.4g}" + (f" ± {found.best.sd:.2g}" if found.best.sd else "")
    head = (
        f"# The best of the {len(found.cells)} cells of the sweep {sweep.name}: {found.metric} "
        f"{size} over {len(found.best.values)} seeds.\n#\n"
        f"#   python {sweep.keys.program} {path} seed=0\n"
    )
    path.write_text(head + dump_yaml(values), encoding="utf-8")
