"""The record of a sweep: which settings were tried, which are due, and what each came to."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectflow.run.yaml import dump_yaml, read_yaml
from selectflow.tune.cell_table import Cells, State
from selectflow.tune.cells import load_runs, make_cell, sort_into
from selectflow.tune.space import Choice, Domain, Setting
from selectflow.tune.sweep import Sweep

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

NOTE = "note"  # on a trial that failed: why. One that failed without was interrupted.
_STATES: dict[str, State] = {"COMPLETE": "complete", "PRUNED": "stopped"}
_FREE_ON_RESUME = {"run_cap", "description", "project", "entity"}


class TuneError(ValueError):
    """A sweep that cannot be run; the message says why."""


def open_study(sweep: Sweep, out: Path) -> Study:
    """The record of a sweep, with a trial waiting for every setting that is known to be due.

    Args:
        sweep: the sweep.
        out: the directory of the record, held by this process.

    Raises:
        TuneError: `out` holds another sweep, or optuna is missing.
    """
    try:
        import optuna  # noqa: PLC0415
        from optuna.storages.journal import (  # noqa: PLC0415
            JournalFileBackend,
            JournalStorage,
        )
    except ImportError as error:
        raise TuneError("optuna must be there to tune; pip install 'selectflow[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out.mkdir(parents=True, exist_ok=True)
    _check_same(sweep, out / "sweep.yaml")
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / "study.journal"))),
        study_name=sweep.name,
        direction=sweep.keys.metric.goal,
        load_if_exists=True,
        pruner=_pruner(sweep),
    )
    study.sampler = _sampler(sweep, seed=len(study.trials))
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        # of a sweep that was killed
        if sweep.keys.method != "grid":
            study.enqueue_trial(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    if sweep.keys.method == "grid":
        known = [_key(trial) for trial in study.trials if not _was_interrupted(trial)]
        for params in _encoded_grid(sweep):
            if json.dumps(params) not in known:
                study.enqueue_trial(params, user_attrs={"key": json.dumps(params)})
    return study


def has_more(sweep: Sweep, study: Study, num_active: int) -> bool:
    """Whether a setting is left that was not begun."""
    from optuna.trial import TrialState  # noqa: PLC0415

    if sweep.keys.method == "grid":
        return bool(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))
    assert sweep.keys.run_cap is not None
    return num_active + sum(map(_has_ended, study.trials)) < sweep.keys.run_cap


def next_setting(sweep: Sweep, trial: Trial) -> Setting:
    """The setting that a trial stands for: the waiting one, or a new one of the sampler."""
    return {key: _suggest(trial, key, domain) for key, domain in sweep.domains.items()}


def read_cells(sweep: Sweep, study: Study, out: Path) -> Cells:
    """Every cell that has ended, with what its runs left behind, best first."""
    cells = []
    for trial in filter(_has_ended, study.trials):
        setting = {key: _decode(each, trial.params[key]) for key, each in sweep.domains.items()}
        overrides = [sweep.local_overrides(out, seed) for seed in sweep.seeds or (None,)]
        runs = load_runs(sweep.load(setting, each).run_dir for each in overrides)
        state = _STATES.get(trial.state.name, "failed")
        cells.append(make_cell(sweep, setting, runs, state, trial.user_attrs.get(NOTE, "")))
    return sort_into(sweep, cells)


def _has_ended(trial: FrozenTrial) -> bool:
    return trial.state.is_finished() and not _was_interrupted(trial)


def _was_interrupted(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL" and NOTE not in trial.user_attrs


def _key(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("key")


def _check_same(sweep: Sweep, path: Path) -> None:
    """Write the sweep and its base configuration, or compare them with what is there."""
    ours = {key: value for key, value in sweep.raw.items() if key not in _FREE_ON_RESUME}
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


def _sampler(sweep: Sweep, seed: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler  # noqa: PLC0415

    # A resumed sweep must not propose again what it proposed when it began: another seed.
    return TPESampler(seed=seed) if sweep.keys.method == "bayes" else RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> BasePruner:
    from optuna.pruners import NopPruner, SuccessiveHalvingPruner  # noqa: PLC0415

    rule = sweep.keys.early_terminate
    if rule is None:
        return NopPruner()
    return SuccessiveHalvingPruner(
        min_resource=rule.first, reduction_factor=rule.eta, min_early_stopping_rate=0
    )


def _encoded_grid(sweep: Sweep) -> list[Setting]:
    settings = sweep.grid()
    random.Random(0).shuffle(settings)  # else the first brackets would compare neighbours only
    return [
        {key: _encode(value) for key, value in setting.items()}
        for setting in settings[: sweep.keys.run_cap]
    ]


def _suggest(trial: Trial, key: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        choices = [_encode(value) for value in domain.values]
        return _decode(domain, trial.suggest_categorical(key, choices))
    if domain.is_integer:
        return trial.suggest_int(key, int(domain.low), int(domain.high), step=int(domain.step or 1))
    return trial.suggest_float(key, domain.low, domain.high, step=domain.step, log=domain.is_log)


def _encode(value: Any) -> Any:
    """A value as optuna takes it: a list or mapping as JSON text."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else json.dumps(value)


def _decode(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Choice):
        return next(each for each in domain.values if _encode(each) == value)
    return value
