"""A sweep on W&B's server: created there, and served by an agent here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

from selectflow.report.runs import Run
from selectflow.run.config import ConfigError, RunConfig, load
from selectflow.run.wandb import mode_of
from selectflow.run.yaml import as_override
from selectflow.tune.domains import identity
from selectflow.tune.results import Cells, State, cell_of_runs, cells_of, load_logged
from selectflow.tune.space import Sweep, TuneError, is_config


def wandb_spec(sweep: Sweep) -> dict[str, Any]:
    """What W&B's server is given: the file, its command completed.

    Each run needs a name of its own, as its directory is called, and reports to W&B; what the
    file's own command says of either comes later and wins. JSON has no infinity: `.inf` goes as
    text, which the run's configuration reads as a number again.
    """
    command = list(sweep.keys.command)
    after = next(place for place, word in enumerate(command, 1) if is_config(word))
    name = as_override("name", _name(sweep))
    spec: dict[str, Any] = _without_infinities(sweep.raw)
    spec["command"] = [*command[:after], name, "track.wandb=online", *command[after:]]
    return spec | {"name": sweep.name}


def serve(sweep: Sweep, count: int | None = None) -> Cells:
    """Create a sweep on W&B's server, and run its settings here until it has no more.

    Args:
        count: most runs that this agent makes; None: no limit.

    Returns:
        The cells of the runs that agents made of this sweep on this machine.

    Raises:
        TuneError: there is no key, no network, or W&B is off or offline by WANDB_MODE.
    """
    # Imported here alone: a sweep on this machine does not pay for it.
    import wandb  # noqa: PLC0415

    if mode_of("online") != "online":
        raise TuneError(
            f"a sweep on W&B must be online, got WANDB_MODE={os.environ['WANDB_MODE']}; unset it, "
            "or use --local, which needs no server"
        )
    project = sweep.keys.project or os.environ.get("WANDB_PROJECT") or "selectflow"
    try:
        sweep_id = wandb.sweep(wandb_spec(sweep), entity=sweep.keys.entity, project=project)
    except wandb.errors.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TuneError(
            f"a sweep on W&B must have a key and a network: {reason}; set WANDB_API_KEY or run "
            "`wandb login`, or use --local, which needs neither"
        ) from error
    path = "/".join(part for part in (sweep.keys.entity, project, sweep_id) if part)
    print(f"created sweep {path}; on other machines: wandb agent {path}", flush=True)
    wandb.agent(sweep_id, entity=sweep.keys.entity, project=project, count=count)
    return cells_of_runs(sweep, _run_dirs(sweep))


def cells_of_runs(sweep: Sweep, run_dirs: Iterable[Path]) -> Cells:
    """The cells of a sweep whose runs W&B's agents made.

    A cell is complete when all seeds of a grid are finished, stopped when one of its runs was.
    """
    groups: dict[str, list[tuple[RunConfig, Run]]] = {}
    for run in load_logged(run_dirs):
        config = load(Path(run.where) / "config.yaml")
        groups.setdefault(identity(_setting_in(sweep, config)), []).append((config, run))
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
        cells.append(cell_of_runs(sweep, setting, runs, state, note))
    return cells_of(sweep, cells)


def _setting_in(sweep: Sweep, config: RunConfig) -> dict[str, Any]:
    """The values that a run's configuration has for the parameters of a sweep."""
    values = {key: attrgetter(key)(config) for key in sweep.domains}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _run_dirs(sweep: Sweep) -> list[Path]:
    """The directories here of the runs that agents made of a sweep."""
    root, found = load(sweep.config, sweep.overrides).root, []
    for path in sorted(root.glob("*/config.yaml")):
        try:
            name = load(path).name
        except ConfigError:
            continue  # of another version: not a run of this sweep
        if name == _name(sweep):
            found.append(path.parent)
    return found


def _name(sweep: Sweep) -> str:
    return f"{sweep.plain_name}-{sweep.run_name()}"


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_infinities(each) for each in value]
    return ".inf" if value == math.inf else value
