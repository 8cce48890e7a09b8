"""Running an audit: every row against the truth, run by run, written as they come.

A run is one learning rate and seed. `audit.json` is written whole after each, and a later start
with the same configuration goes on behind those that it holds.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectflow.audit.budget_table import write_scatter, write_spearman
from selectflow.audit.config import AuditConfig, ProxyConfig
from selectflow.audit.rows import ROWS, Pairs, Recorded
from selectflow.audit.settings import Setting
from selectflow.core.files import atomic_file
from selectflow.options import ConfigError

# What may differ between two starts of an audit: where it is, and which runs are asked for.
_NOT_MEASURED = {"name", "root", "overwrite", "seeds", "lrs", "num_threads"}
_SAMPLED_STEPS = 6  # a finite horizon costs one sweep for each step that pairs are drawn from


@dataclass(frozen=True)
class Result:
    """One row in one run.

    Attributes:
        level: "config", "algorithm", "system", or "cost" for what has no score.
        row: what is assumed, or done.
        lr: learning rate.
        horizon: updates; `math.inf`: the whole run.
        seed: of the run.
        spearman: rank correlation with the truth, per query, averaged.
        relative_error: |score - truth| / |truth| over all pairs and queries.
        seconds: of computing it.
    """

    level: str
    row: str
    lr: float
    horizon: float
    seed: int
    spearman: float
    relative_error: float
    seconds: float


def run_audit(config: AuditConfig, progress: Callable[[str], None] = lambda _: None) -> Path:
    """Measure every row at every learning rate, horizon and seed that is not measured yet.

    Args:
        config: of the audit.
        progress: told what was finished, in words.

    Returns:
        The directory root/name, with audit.json, audit.csv, spearman.png over all runs so far, and
        scatter.png of the first.

    Raises:
        ConfigError: the directory holds an audit of another configuration; too few examples.
        OSError: a file cannot be written.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder = config.root / config.name
    folder.mkdir(parents=True, exist_ok=True)
    results = [] if config.overwrite else measured_before(config, folder)
    done = {(result.lr, result.seed) for result in results}
    for lr in config.lrs:
        for seed in range(config.seeds):
            if (lr, seed) in done:
                progress(f"found lr {lr:g}, seed {seed}")
                continue
            found, truth, scores = measure_run(Setting(config, seed), lr)
            if not results:
                write_scatter(truth, scores, folder)
            results += found
            write_results(config, results, folder)
            write_spearman(results, folder)
            progress(f"measured lr {lr:g}, seed {seed}")
    return folder


def measure_run(setting: Setting, lr: float) -> tuple[list[Result], Tensor, Mapping[str, Tensor]]:
    """One run: its results, and the truth and scores of removals over the whole of it."""
    recorded, config = Recorded.of(setting, lr), setting.config
    results = [_cost("training", recorded, recorded.trajectory.seconds)]
    whole, truth, scores = _compare(recorded, _spread_pairs(config, setting.seed), math.inf)
    results += whole
    for horizon in config.horizons:
        results += _compare(recorded, _near_pairs(config, setting.seed, horizon), horizon)[0]
    return results, truth, scores


def _compare(
    recorded: Recorded, pairs: Pairs, horizon: float
) -> tuple[list[Result], Tensor, dict[str, Tensor]]:
    """All rows of one horizon against the truth; scores are those of config and algorithm rows."""
    began = time.perf_counter()
    truth = recorded.truth(pairs, horizon)
    results, scores = list[Result](), dict[str, Tensor]()
    if horizon == math.inf:
        results.append(_cost("leave one out", recorded, time.perf_counter() - began))
    for source in ROWS:
        for level, name, score in source(recorded, pairs, horizon):
            began = time.perf_counter()
            found = score().double()
            seconds = time.perf_counter() - began
            error = float((found - truth).norm() / truth.norm())
            where = (recorded.lr, horizon, recorded.setting.seed)
            results.append(Result(level, name, *where, spearman(found, truth), error, seconds))
            if level != "system":
                scores[name] = found
    return results, truth, scores


def _cost(row: str, recorded: Recorded, seconds: float) -> Result:
    seed = recorded.setting.seed
    return Result("cost", row, recorded.lr, math.inf, seed, math.nan, math.nan, seconds)


def _spread_pairs(config: AuditConfig, seed: int) -> Pairs:
    """Removals drawn from all steps and positions, none twice."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(config.steps * config.batch, generator=generator)[: config.num_pairs]
    return [(place // config.batch, place % config.batch) for place in places.tolist()]


def _near_pairs(config: AuditConfig, seed: int, horizon: int) -> Pairs:
    """Removals from a few evenly spaced steps that are `horizon` updates from the end or more."""
    last = max(config.steps - horizon, 0)
    steps = sorted({round(last * part / (_SAMPLED_STEPS - 1)) for part in range(_SAMPLED_STEPS)})
    generator = torch.Generator().manual_seed(seed)
    each = min(config.batch, math.ceil(config.num_pairs / len(steps)))
    return [
        (step, position)
        for step in steps
        for position in torch.randperm(config.batch, generator=generator)[:each].tolist()
    ]


def spearman(scores: Tensor, truth: Tensor) -> float:
    """Rank correlation over pairs, averaged over queries; both of shape (num_pairs, Q)."""
    ranks = torch.stack([_ranks(scores.double()), _ranks(truth.double())])
    ranks = ranks - ranks.mean(1, keepdim=True)
    ranks = ranks / ranks.norm(dim=1, keepdim=True)
    return float((ranks[0] * ranks[1]).sum(0).mean())


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value in its column; equal values share the mean of theirs."""
    columns = values.T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns)
    upto = torch.searchsorted(ordered, columns, right=True)
    return (below + upto).double().T / 2


# --- what is left on disk -------------------------------------------------------------------


def measured_before(config: AuditConfig, folder: Path) -> list[Result]:
    """Results that `folder` holds of this configuration, whatever seeds and learning rates.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """
    path = folder / "audit.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        held, rows = content["config"], content["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be of an audit, got {error!r}; remove it") from error
    check_same(config, held, path)
    return [Result(**{key: _number(key, value) for key, value in row.items()}) for row in rows]


def check_same(config: AuditConfig | ProxyConfig, held: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with what another configuration measured.

    Raises:
        ConfigError: `held`, a configuration found in `path`, differs in what is measured.
    """
    for key, value in config.model_dump(mode="json").items():
        if key not in _NOT_MEASURED and held.get(key) != value:
            raise ConfigError(
                f"{path} must be of this configuration, got {key} {held.get(key)}, here {value}; "
                "give another name, or overwrite=true to measure all again"
            )


def write_results(config: AuditConfig, results: list[Result], folder: Path) -> None:
    """Write audit.json and audit.csv, each whole or not at all."""
    rows = [dataclasses.asdict(result) for result in results]
    plain = [{key: _json(value) for key, value in row.items()} for row in rows]
    content = {"config": config.model_dump(mode="json"), "results": plain}
    with atomic_file(folder / "audit.json") as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(folder / "audit.csv") as file:
        file.write(text.getvalue().encode())


def _json(value: Any) -> Any:
    """JSON has no infinity and no NaN: "inf", and null for what was not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def _number(key: str, value: Any) -> Any:
    """The inverse of `_json` for a field of `Result`."""
    if key == "horizon" and value == "inf":
        return math.inf
    return math.nan if value is None else value
