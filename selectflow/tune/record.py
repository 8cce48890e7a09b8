"""The cells of a sweep, each with the results of its runs, read from their directories."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selectflow.report.runs import Run, load_run
from selectflow.run.config import RunConfig, known_keys, load
from selectflow.run.yaml import dump_yaml, read_yaml, set_key
from selectflow.tune.space import Choice, Sweep

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import BaseTrial, FrozenTrial

State = Literal["complete", "stopped", "failed"]
Goal = Literal["minimize", "maximize"]
NOTE = "note"  # on a trial that failed: why. One that failed without was interrupted.


@dataclass(frozen=True)
class Cell:
    """One setting of a sweep's parameters, with the results of its runs.

    Attributes:
        setting: values of the parameters by dotted key.
        horizon: select.horizon of its runs.
        lr: optimizer.lr of its runs.
        state: complete: every seed ran to its end; stopped early; or failed.
        values: the metric at the end of each finished run, in the order of seeds.
        last: the value at which it was stopped; for a complete cell, the mean of `values`.
        steps: optimizer steps of all of its runs.
        seconds: of training and selection of all of its runs.
        relative_error: mean of `select/relative_error` over its runs, None if not logged.
        note: why it failed.
    """

    setting: dict[str, Any]
    horizon: float | str
    lr: float
    state: State
    values: tuple[float, ...]
    last: float | None
    steps: int
    seconds: float
    relative_error: float | None
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Mean of the metric over seeds; None unless complete."""
        return statistics.fmean(self.values) if self.state == "complete" else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed, or unless complete."""
        if self.state != "complete" or len(self.values) < 2:
            return None
        return statistics.stdev(self.values)


@dataclass(frozen=True)
class Cells:
    """All cells of a sweep, best first.

    Attributes:
        cells: complete ones by their mean, then the others.
        metric: its name.
        goal: minimize or maximize.
        full_steps: optimizer steps of the whole sweep without stopping early, None if unknown.
    """

    cells: tuple[Cell, ...]
    metric: str
    goal: Goal
    full_steps: int | None

    @property
    def best(self) -> Cell | None:
        """The complete cell with the best mean."""
        return self.cells[0] if self.cells and self.cells[0].state == "complete" else None

    def near_best(self) -> list[Cell]:
        """Complete cells whose mean is within the best one's standard deviation, itself first."""
        best = self.best
        if best is None or best.mean is None:
            return []
        spread = best.sd or 0.0
        return [c for c in self.cells if c.mean is not None and abs(c.mean - best.mean) <= spread]


def sort_cells(cells: Iterable[Cell], goal: Goal) -> tuple[Cell, ...]:
    """Complete cells from the best to the worst, then stopped ones, then failed ones."""
    sign = 1 if goal == "minimize" else -1
    order = ("complete", "stopped", "failed")

    def key(cell: Cell) -> tuple[int, float, float]:
        value = cell.last if cell.mean is None else cell.mean
        # of the stopped ones, those that were stopped late first
        late = 0 if cell.state == "complete" else -cell.steps
        return order.index(cell.state), late, sign * value if value is not None else 0.0

    return tuple(sorted(cells, key=key))


def read_cells(sweep: Sweep, study: Study, out: Path) -> Cells:
    """Every cell of a study that has ended, with the results of its runs under `out`."""
    states: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "stopped"}
    cells = []
    for trial in filter(has_ended, study.trials):
        setting = setting_of(sweep, trial)
        overrides = [sweep.local_overrides(out, seed) for seed in sweep.seeds or (None,)]
        runs = _load_logged(sweep.load(setting, each).run_dir for each in overrides)
        state, note = states.get(trial.state.name, "failed"), trial.user_attrs.get(NOTE, "")
        cells.append(_cell_of_runs(sweep, setting, runs, state, note))
    return _sorted(sweep, cells)


def has_ended(trial: FrozenTrial) -> bool:
    """Whether a trial needs no further run: it is finished, and was not interrupted."""
    return trial.state.is_finished() and not is_interrupted(trial)


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether a trial belonged to a sweep that was killed while it ran."""
    return trial.state.name == "FAIL" and NOTE not in trial.user_attrs


def setting_of(sweep: Sweep, trial: BaseTrial) -> dict[str, Any]:
    """The values that a trial gives the parameters of a sweep."""
    setting = dict(trial.params)
    for key, domain in sweep.domains.items():
        if isinstance(domain, Choice):
            setting[key] = next(each for each in domain.values if encode(each) == setting[key])
    return {key: setting[key] for key in sweep.domains}


def encode(value: Any) -> Any:
    """A value as optuna takes it: a list or mapping as JSON text."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else json.dumps(value)


def cells_of_runs(sweep: Sweep, run_dirs: Iterable[Path]) -> Cells:
    """The cells of a sweep whose runs W&B's agents made.

    A cell is complete when all seeds of a grid are finished, stopped when one of its runs was.
    """
    groups: dict[str, list[tuple[RunConfig, Run]]] = {}
    for run in _load_logged(run_dirs):
        config = load(Path(run.where) / "config.yaml")
        groups.setdefault(json.dumps(_setting_in(sweep, config)), []).append((config, run))
    num = len(sweep.seeds) if sweep.keys.method == "grid" else 1
    cells = []
    for members in groups.values():
        members.sort(key=lambda member: member[0].seed)
        runs, setting = [run for _, run in members], _setting_in(sweep, members[0][0])
        endings = [run.status for run in runs]
        state: State = "stopped" if "stopped" in endings else "failed"
        if len(runs) >= num and set(endings) == {"finished"}:
            state = "complete"
        note = f"{len(runs)} of {num} seeds: {', '.join(endings)}" if state == "failed" else ""
        cells.append(_cell_of_runs(sweep, setting, runs, state, note))
    return _sorted(sweep, cells)


def _setting_in(sweep: Sweep, config: RunConfig) -> dict[str, Any]:
    """The values that a run's configuration has for the parameters of a sweep."""
    setting, values = {}, config.model_dump(mode="python")
    for key in sweep.domains:
        value: Any = values
        for part in key.split("."):
            value = value[part]
        setting[key] = list(value) if isinstance(value, tuple) else value
    return setting


def _load_logged(run_dirs: Iterable[Path]) -> list[Run]:
    """The runs that have logged a metric, in the order given."""
    logs = [(path, path / "metrics.jsonl") for path in run_dirs]
    return [load_run(path) for path, log in logs if log.exists() and log.stat().st_size]


def _cell_of_runs(
    sweep: Sweep, setting: dict[str, Any], runs: Sequence[Run], state: State, note: str
) -> Cell:
    """A cell from the runs of its seeds, in their order, of which the last may be missing."""
    config, metric = sweep.load(setting), sweep.keys.metric.name
    logged = [_logged(run, metric) for run in runs]
    lasts = [values[-1] for values in logged if values]
    finals = [
        values[-1]
        for run, values in zip(runs, logged, strict=True)
        if values and run.status == "finished"
    ]
    errors = [error for run in runs for error in _logged(run, "select/relative_error")]
    return Cell(
        setting=setting,
        horizon=config.select.horizon,
        lr=config.optimizer.lr,
        state=state,
        values=tuple(finals),
        last=statistics.fmean(lasts) if lasts else None,
        steps=sum(run.summary.get("steps", run.metrics[-1]["train/step"]) for run in runs),
        seconds=sum(run.metrics[-1]["perf/wall_s"] for run in runs),
        relative_error=statistics.fmean(errors) if errors else None,
        note=note,
    )


def _logged(run: Run, metric: str) -> list[float]:
    return [row[metric] for row in run.metrics if row.get(metric) is not None]


def _sorted(sweep: Sweep, cells: Iterable[Cell]) -> Cells:
    full = None
    if sweep.keys.method == "grid":
        settings = sweep.grid()[: sweep.keys.run_cap]
        full = max(1, len(sweep.seeds)) * sum(sweep.load(each).steps for each in settings)
    goal = sweep.keys.metric.goal
    return Cells(sort_cells(cells, goal), sweep.keys.metric.name, goal, full)


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
