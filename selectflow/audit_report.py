"""The error budget: how much of influence's error comes from where, setting by setting.

Three levels, each a set of rows compared with the same ground truth, leave-one-out retraining in
float64. Configuration: the sweep assumes another optimizer, schedule or decay. Algorithm: it
assumes the right one and linearises. System: it linearises rightly, in another precision or
from sparse snapshots.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectflow.audit import influence, leave_one_out
from selectflow.audit_config import AuditConfig
from selectflow.audit_settings import Setting
from selectflow.sparse import SparseTrajectory
from selectflow.trajectory import Trajectory

Pairs = list[tuple[int, int]]

CONFIG_ROWS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd"},
    "constant lr": {"method": "constant_lr"},
    "no decay": {"method": "no_decay"},
}
ALGORITHM_ROWS: dict[str, dict[str, Any]] = {
    "adamw/none": {"curvature": "none"},
    "adamw/fisher": {"curvature": "fisher"},
    "adamw/exact": {},
    "adamw/exact, own update": {"own_update": "exact"},
    "adamw/exact, order 2": {"order": 2},
}
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


@dataclass(frozen=True)
class Audit:
    """All rows of a setting, and one run's scores for the scatter: (truth, row -> scores)."""

    config: AuditConfig
    results: list[Result]
    truth: Tensor
    scores: dict[str, Tensor]


def run_audit(config: AuditConfig, progress: Callable[[str], None] = lambda _: None) -> Audit:
    """Measure every row at every learning rate, horizon and seed.

    Args:
        config: of the audit.
        progress: told what was finished, in words.

    Returns:
        The rows; scatter data are those of the first learning rate and seed.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    results: list[Result] = []
    kept: tuple[Tensor, dict[str, Tensor]] | None = None
    for lr in config.lrs:
        for seed in range(config.seeds):
            found, truth, scores = _run(Setting(config, seed), lr)
            results += found
            kept = kept or (truth, scores)
            progress(f"lr {lr:g}, seed {seed}")
    assert kept is not None
    return Audit(config, results, *kept)


def _run(setting: Setting, lr: float) -> tuple[list[Result], Tensor, dict[str, Tensor]]:
    config, results = setting.config, list[Result]()
    trajectory, queries = setting.record(lr), setting.queries()
    cost = _Rows(results, lr, math.inf, setting.seed, torch.empty(0))
    cost.add("cost", "training", None, trajectory.seconds)
    pairs = _spread_pairs(config, setting.seed)
    began = time.perf_counter()
    truth = leave_one_out(trajectory, queries, pairs)
    cost.add("cost", "leave one out", None, time.perf_counter() - began)
    whole = dataclasses.replace(cost, truth=truth)
    scores = {
        name: whole.measure(level, name, partial(influence, trajectory, queries, pairs, **options))
        for level, name, options in _rows(config)
    }
    for name, other, asked in _system(setting, lr):
        whole.measure("system", name, partial(influence, other, asked, pairs))
    for horizon in config.horizons:
        near = _near_pairs(config, setting.seed, horizon)
        truth_near = leave_one_out(trajectory, queries, near, horizon)
        rows = dataclasses.replace(cost, truth=truth_near, horizon=horizon)
        for level, name, options in _rows(config):
            score = partial(influence, trajectory, queries, near, horizon=horizon, **options)
            rows.measure(level, name, score)
    return results, truth, scores


@dataclass(frozen=True)
class _Rows:
    """Where the results of one truth go."""

    results: list[Result]
    lr: float
    horizon: float
    seed: int
    truth: Tensor

    def measure(self, level: str, name: str, score: Callable[[], Tensor]) -> Tensor:
        began = time.perf_counter()
        found = score().double()
        self.add(level, name, found, time.perf_counter() - began)
        return found

    def add(self, level: str, name: str, scores: Tensor | None, seconds: float) -> None:
        rank = error = math.nan
        if scores is not None:
            rank = spearman(scores, self.truth)
            error = float((scores - self.truth).norm() / self.truth.norm())
        self.results.append(
            Result(level, name, self.lr, self.horizon, self.seed, rank, error, seconds)
        )


def _rows(config: AuditConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, options in CONFIG_ROWS.items():
        if name != "constant lr" or config.schedule != "constant":
            yield "config", name, options
    for name, options in ALGORITHM_ROWS.items():
        yield "algorithm", name, options


def _system(setting: Setting, lr: float) -> Iterator[tuple[str, Trajectory, Any]]:
    """Name, recording and queries of each system-level row."""
    for dtype in (torch.float32, torch.bfloat16):
        other = dataclasses.replace(setting, dtype=dtype)
        yield str(dtype).removeprefix("torch."), other.record(lr), other.queries()
    spacing = setting.config.spacing
    sparse = setting.record(lr, spacing)
    for hold in (False, True):
        name = f"every {spacing}, moments {'held' if hold else 'interpolated'}"
        yield name, SparseTrajectory.of(sparse, hold), setting.queries()


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


# --- writing --------------------------------------------------------------------------------


def write_audit(audit: Audit, folder: Path) -> None:
    """Write audit.json and audit.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(result) for result in audit.results]
    plain = [{key: _json(value) for key, value in row.items()} for row in rows]
    content = {"config": audit.config.model_dump(mode="json"), "results": plain}
    (folder / "audit.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with (folder / "audit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _json(value: Any) -> Any:
    """JSON has no infinity and no NaN: "inf", and null for what was not measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
