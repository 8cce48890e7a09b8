"""A sweep on this machine: cells in parallel processes, poor ones stopped early, resumable.

A cell is one setting of the parameters; its seeds are run one after the other. After its i-th
evaluation, counted over its seeds, its value is the mean of the metric over the seeds that have
ended and the present one. Optuna keeps the record of the cells, proposes settings (`random`,
`bayes`) and decides, at equal i, which cells are stopped; this module runs them.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Generator
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectflow.run.directory import lock
from selectflow.run.metrics import STEP, number
from selectflow.run.yaml import dump_yaml, read_yaml
from selectflow.tune.domains import Choice, Domain, encode, identity
from selectflow.tune.process import RunDiverged, RunFailed, RunProcess, run_server
from selectflow.tune.results import Cells, State, cell_of_runs, cells_of, load_logged
from selectflow.tune.space import Hyperband, Sweep, TuneError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.trial import BaseTrial, FrozenTrial

_POLL_S = 0.2
_NOTE = "note"  # on a trial that failed: why. One that failed without was interrupted.
_NUM_FAILURES = 3  # that many first cells, all failed, end the sweep: the rest would fail too
_FREE_ON_RESUME = {"run_cap", "description", "project", "entity"}


def tune(sweep: Sweep, out: Path, jobs: int, tell: Callable[[str], None]) -> Study:
    """Run what is left of a sweep.

    Args:
        out: its directory: the record `study.journal`, and `runs/`, a directory for each run.
        jobs: processes at once, >= 1, of one thread each.
        tell: takes a line for each cell that ends.

    Returns:
        The record. Started again after it was killed, a sweep repeats no cell that had ended, and
        goes on with the runs of the others from their newest checkpoints.

    Raises:
        TuneError: `out` holds another sweep, the first cells all failed, or optuna is missing.
        RunError: another process is at work in `out`.
    """
    with lock(out), run_server(Path(sweep.keys.program)) as context:
        study = open_study(sweep, out)
        active: dict[Generator[RunProcess, None, str], RunProcess] = {}
        try:
            while True:
                while len(active) < jobs and _has_more(sweep, study, len(active)):
                    cell = _run_cell(sweep, study, out, context)
                    active[cell] = next(cell)
                if not active:
                    return study
                connection.wait([run.process.sentinel for run in active.values()], _POLL_S)
                for cell in list(active):
                    try:
                        active[cell] = next(cell)
                    except StopIteration as end:
                        del active[cell]
                        tell(end.value)
                        _check_failures(study)
        finally:
            for run in active.values():
                run.stop()
            for run in active.values():
                run.process.join()


def _run_cell(
    sweep: Sweep, study: Study, out: Path, context: ForkServerContext
) -> Generator[RunProcess, None, str]:
    """Run a new cell of a study: yield its present run while it waits, return how it ended."""
    from optuna import TrialPruned  # noqa: PLC0415
    from optuna.trial import TrialState  # noqa: PLC0415

    trial = study.ask({key: _distribution(domain) for key, domain in sweep.domains.items()})
    setting = _setting_of(sweep, trial)
    name = " ".join(f"{key}={value}" for key, value in setting.items())
    try:
        mean = yield from _run_seeds(sweep, trial, setting, out, context)
    except TrialPruned as error:
        study.tell(trial, state=TrialState.PRUNED)
        return f"{name}: {error}"
    except RunFailed as error:
        trial.set_user_attr(_NOTE, str(error))
        # Of a setting that failed the search learns nothing, of one that was pruned that it is bad.
        state = TrialState.PRUNED if isinstance(error, RunDiverged) else TrialState.FAIL
        study.tell(trial, state=state)
        return f"{name}: failed, {error}"
    study.tell(trial, mean)
    return f"{name}: {sweep.keys.metric.name} {mean:.4g}"


def _run_seeds(
    sweep: Sweep, trial: Trial, setting: dict[str, Any], out: Path, context: ForkServerContext
) -> Generator[RunProcess, None, float]:
    """Run the seeds of a cell one after the other; returns the mean of the metric at their ends."""
    from optuna import TrialPruned  # noqa: PLC0415

    metric, seeds = sweep.keys.metric.name, sweep.seeds or (None,)
    finals: list[float] = []
    num_evaluations = 0
    for seed in seeds:
        overrides = sweep.local_overrides(out, seed)
        config, value = sweep.load(setting, overrides), None
        run = RunProcess(context, sweep, sweep.arguments(setting, overrides), config.run_dir)
        yield run
        for row in run.rows():
            if row is None:
                yield run
            elif metric in row:
                value = number(metric, row[metric])
                num_evaluations += 1
                if not math.isfinite(value):
                    trial.report(math.nan, num_evaluations)
                    yield from run.stopped()
                    raise RunDiverged(f"{metric} is not finite at step {row[STEP]}")
                trial.report(statistics.fmean([*finals, value]), num_evaluations)
                is_last_seed = len(finals) + 1 == len(seeds)
                is_end = is_last_seed and row[STEP] >= config.steps  # nothing left to stop
                if not is_end and trial.should_prune():
                    yield from run.stopped()
                    raise TrialPruned(f"stopped after {num_evaluations} evaluations")
        run.check()
        if value is None:
            raise RunFailed(f"it logged no {metric}")
        finals.append(value)
    return statistics.fmean(finals)


def _check_failures(study: Study) -> None:
    ended = [trial for trial in study.trials if trial.state.is_finished()]
    notes = [trial.user_attrs.get(_NOTE) for trial in ended if trial.state.name == "FAIL"]
    if len(ended) == len(notes) >= _NUM_FAILURES and all(notes):
        raise TuneError(f"a sweep's cells must run, got {len(notes)} that failed; {notes[-1]}")


def open_study(sweep: Sweep, out: Path) -> Study:
    """The record of a sweep in `out`, with a trial waiting for every setting known to be due.

    Raises:
        TuneError: `out` holds another sweep, or optuna is missing.
    """
    try:
        import optuna  # noqa: PLC0415
        from optuna.storages import journal  # noqa: PLC0415
    except ImportError as error:
        raise TuneError("optuna must be there to tune; pip install 'selectflow[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    _check_resumable(sweep, out / "sweep.yaml")
    path = str(out / "study.journal")
    study = optuna.create_study(
        storage=journal.JournalStorage(journal.JournalFileBackend(path)),
        study_name=sweep.name,
        direction=sweep.keys.metric.goal,
        load_if_exists=True,
        pruner=_pruner(sweep.keys.early_terminate),
    )
    samplers = optuna.samplers
    sampler = samplers.TPESampler if sweep.keys.method == "bayes" else samplers.RandomSampler
    # A resumed sweep must not propose again what it proposed when it began: another seed.
    study.sampler = sampler(seed=len(study.trials))
    _enqueue_due(sweep, study)
    return study


def _enqueue_due(sweep: Sweep, study: Study) -> None:
    """Let a trial wait for every cell of a grid that has not ended, or else was interrupted."""
    from optuna.trial import TrialState  # noqa: PLC0415

    is_grid = sweep.keys.method == "grid"
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a sweep that was killed
        if not is_grid:
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
    if is_grid:
        settings = sweep.grid()
        random.Random(0).shuffle(settings)  # else the first brackets would compare neighbours only
        known = [
            trial.user_attrs.get("key") for trial in study.trials if not _is_interrupted(trial)
        ]
        for setting in settings[: sweep.keys.run_cap]:
            params = {key: _encoded(sweep.domains[key], value) for key, value in setting.items()}
            if json.dumps(params) not in known:
                study.enqueue_trial(params, user_attrs={"key": json.dumps(params)})


def _check_resumable(sweep: Sweep, path: Path) -> None:
    """Write the sweep and its base configuration, or compare them with those of the record."""
    ours: Any = {key: value for key, value in sweep.raw.items() if key not in _FREE_ON_RESUME}
    ours = json.loads(json.dumps({"sweep": ours, "config": read_yaml(sweep.config)}))
    if not path.exists():
        path.write_text(dump_yaml(ours), encoding="utf-8")
        return
    theirs = read_yaml(path)
    differing = [
        f"{part}.{key}"
        for part in ours
        for key in sorted(ours[part].keys() | theirs[part].keys())
        if ours[part].get(key) != theirs[part].get(key)
    ]
    if differing:
        raise TuneError(
            f"a sweep must be resumed as it was, got other values of {', '.join(differing)} than "
            f"in {path}; choose another directory with --out, or delete {path.parent}"
        )


def _pruner(rule: Hyperband | None) -> BasePruner:
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner  # noqa: PLC0415

    if rule is None:
        return NopPruner()
    return SuccessiveHalvingPruner(rule.first, rule.eta)


def _has_more(sweep: Sweep, study: Study, num_active: int) -> bool:
    if sweep.keys.method == "grid":
        return any(trial.state.name == "WAITING" for trial in study.get_trials(deepcopy=False))
    assert sweep.keys.run_cap is not None
    return num_active + sum(map(_has_ended, study.trials)) < sweep.keys.run_cap


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna import distributions  # noqa: PLC0415

    if isinstance(domain, Choice):
        return distributions.CategoricalDistribution(encode(domain.values))
    low, high, step = domain.low, domain.high, domain.step
    if all(isinstance(number, int) for number in (low, high, step)):
        return distributions.IntDistribution(int(low), int(high), step=int(step or 1))
    return distributions.FloatDistribution(low, high, log=domain.is_log, step=step)


def read_cells(sweep: Sweep, study: Study, out: Path) -> Cells:
    """Every cell of a study that has ended, with the results of its runs under `out`."""
    states: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "stopped"}
    cells = []
    for trial in filter(_has_ended, study.trials):
        setting = _setting_of(sweep, trial)
        overrides = [sweep.local_overrides(out, seed) for seed in sweep.seeds or (None,)]
        runs = load_logged(sweep.load(setting, each).run_dir for each in overrides)
        note = trial.user_attrs.get(_NOTE, "")
        state = "failed" if note else states.get(trial.state.name, "failed")
        cells.append(cell_of_runs(sweep, setting, runs, state, note))
    return cells_of(sweep, cells)


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and not _is_interrupted(trial)


def _is_interrupted(trial: FrozenTrial) -> bool:
    """Whether a trial belonged to a sweep that was killed while it ran."""
    return trial.state.name == "FAIL" and _NOTE not in trial.user_attrs


def _setting_of(sweep: Sweep, trial: BaseTrial) -> dict[str, Any]:
    setting = dict(trial.params)
    for key, domain in sweep.domains.items():
        if isinstance(domain, Choice):
            setting[key] = domain.values[encode(domain.values).index(setting[key])]
    return {key: setting[key] for key in sweep.domains}


def _encoded(domain: Domain, value: Any) -> Any:
    """A value of a choice as `encode` has it."""
    assert isinstance(domain, Choice)
    places = {identity(each): place for place, each in enumerate(domain.values)}
    return encode(domain.values)[places[identity(value)]]
