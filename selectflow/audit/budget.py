"""The error budget: predictions of removals, each against leave-one-out retraining.

Three levels of predictions. Configuration: the sweep assumes another optimizer, schedule or decay.
Algorithm: it assumes the right one and linearises. System: it linearises rightly, in another
precision or from sparse snapshots.

A run is one learning rate and seed. `audit.json` is written whole after each, and a later start
with the same configuration goes on behind those that it holds.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectflow.audit.config import AuditConfig
from selectflow.audit.influence import influence, leave_one_out
from selectflow.audit.problems import AuditedRun
from selectflow.audit.report import (
    plain,
    spearman,
    write_csv,
    write_json,
    write_scatter,
    write_spearman,
)
from selectflow.core.batches import Batch
from selectflow.core.chunks import num_fitting
from selectflow.core.derivatives import Curvature
from selectflow.core.optim import State, Update
from selectflow.core.params import Params
from selectflow.core.sweep import Window
from selectflow.offline.trajectory import Trajectory
from selectflow.options import ConfigError

Pairs = list[tuple[int, int]]
"""(step, position in its batch) of each removal."""

# --- one recorded run, and the predictions of its removals ----------------------------------------

_CONFIG_ROWS: dict[str, dict[str, Any]] = {
    "sgd": {"method": "sgd"},
    "constant lr": {"method": "constant_lr"},
    "no decay": {"method": "no_decay"},
}
_ALGORITHM_ROWS: dict[str, dict[str, Any]] = {
    "adamw/none": {"curvature": "none"},
    "adamw/fisher": {"curvature": "fisher"},
    "adamw/exact": {},
    "adamw/exact, own update": {"own_update": "exact"},
    "adamw/exact, order 2": {"order": 2},
}
_MOST_PARALLEL = 64
_STATES_EACH = 8  # what a rerun or a query holds at its peak, in sizes of (theta, m, v)


@dataclass(frozen=True)
class RecordedRun:
    """A run with its recording.

    Attributes:
        run: what was trained.
        lr: learning rate of the run.
        trajectory: the recording.
        queries: whose losses are measured.
    """

    run: AuditedRun
    lr: float
    trajectory: Trajectory
    queries: Batch

    @classmethod
    def of(cls, run: AuditedRun, lr: float) -> RecordedRun:
        """Record a run."""
        return cls(run, lr, run.record(lr), run.queries())

    @property
    def limits(self) -> dict[str, Any]:
        """Options that hold `leave_one_out` to the memory limit: so many reruns side by side."""
        state = self.trajectory.snapshots.state(0)
        size = _STATES_EACH * sum(part.num_bytes() for part in state)
        fitting = num_fitting(self.run.config.memory_gib, size, 1)
        return {"num_parallel": min(max(1, fitting), _MOST_PARALLEL)}

    def truth(self, pairs: Pairs, horizon: float) -> Tensor:
        """What each removal really does to each query's loss, shape (num_pairs, Q)."""
        return leave_one_out(self.trajectory, self.queries, pairs, horizon, **self.limits)

    def predicted(self, pairs: Pairs, horizon: float, options: Mapping[str, Any]) -> Tensor:
        """The same by `influence` with its options."""
        limits = {"memory_gib": self.run.config.memory_gib, **self.limits}
        return influence(self.trajectory, self.queries, pairs, horizon=horizon, **options, **limits)


class Prediction(NamedTuple):
    """One way to predict removals.

    Attributes:
        level: "config", "algorithm" or "system".
        name: what is assumed.
        recorded: the run that is swept.
        options: of `RecordedRun.predicted`.
    """

    level: str
    name: str
    recorded: RecordedRun
    options: Mapping[str, Any]


def predictions(recorded: RecordedRun, horizon: float) -> Iterator[Prediction]:
    """All predictions for one horizon, each made when it is asked for: recordings are large.

    Those of the system level need a recording of their own each, so only the whole run has them.
    """
    for name, options in _CONFIG_ROWS.items():
        if name != "constant lr" or recorded.run.config.schedule != "constant":
            yield Prediction("config", name, recorded, options)
    for name, options in _ALGORITHM_ROWS.items():
        yield Prediction("algorithm", name, recorded, options)
    if horizon == math.inf:
        yield from _system_predictions(recorded)


def _system_predictions(recorded: RecordedRun) -> Iterator[Prediction]:
    """The right optimizer and exact curvature, in low precision or from sparse snapshots."""
    config = recorded.run.config
    for dtype in (torch.float32, torch.bfloat16):
        if dtype != config.precision:
            run = dataclasses.replace(recorded.run, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            yield Prediction("system", name, RecordedRun.of(run, recorded.lr), {})
    sparse = recorded.run.record(recorded.lr, config.spacing)
    for hold in (False, True):
        name = f"every {config.spacing}, moments {'held' if hold else 'interpolated'}"
        guessed = dataclasses.replace(recorded, trajectory=SparseTrajectory.of(sparse, hold))
        yield Prediction("system", name, guessed, {})


# --- states guessed between snapshots -------------------------------------------------------------


@dataclass(frozen=True)
class SparseTrajectory(Trajectory):
    """A trajectory whose states between snapshots are guessed.

    Attributes:
        hold_moments: moments are those of the last snapshot, else interpolated.
    """

    hold_moments: bool = False

    @classmethod
    def of(cls, trajectory: Trajectory, hold_moments: bool) -> SparseTrajectory:
        """The same recording, read sparsely."""
        fields = {
            field.name: getattr(trajectory, field.name) for field in dataclasses.fields(Trajectory)
        }
        return cls(**fields, hold_moments=hold_moments)

    def window(
        self,
        first: int = 0,
        curvature: Curvature = "exact",
        assumed: Sequence[Update] | None = None,
    ) -> Window:
        """As of `Trajectory`; an update then leads to the guessed state after it."""
        plain = super().window(first, curvature, assumed)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(Window)}
        return _SparseWindow(**fields, source=self)

    def guess(self, index: int) -> State:
        """The state before update `index`, from the snapshots around it."""
        known = self.snapshots.indices
        place = bisect.bisect_right(known, index) - 1
        before = self.snapshots.state(known[place])
        if known[place] == index:
            return before
        after = self.snapshots.state(known[place + 1])
        share = (index - known[place]) / (known[place + 1] - known[place])

        def between(start: Params, end: Params) -> Params:
            return start.add(end - start, share)

        params = between(before.params, after.params)
        if self.hold_moments:
            return before._replace(params=params)
        moments = (between(*pair) for pair in zip(before[1:], after[1:], strict=True))
        return State(params, *moments)


@dataclass
class _SparseWindow(Window):
    source: SparseTrajectory | None = None

    def advance(self, index: int, state: State) -> tuple[Params, State]:
        assert self.source is not None
        _, grad = self.derivatives.gradient(state.params, self.batch(index, state))
        return grad, self.source.guess(index + 1)


# --- the study ------------------------------------------------------------------------------------

_SAMPLED_STEPS = 6  # a finite horizon costs one sweep for each step that pairs are drawn from


@dataclass(frozen=True)
class BudgetResult:
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
    """Measure every prediction at every learning rate, horizon and seed that is not measured yet.

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
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    results = [] if config.overwrite else read_results(config)
    done = {(result.lr, result.seed) for result in results}
    for lr, seed in config.runs_left(done, progress):
        found, truth, scores = measure_budget(AuditedRun(config, seed), lr)
        if not results:
            write_scatter(truth, scores, folder)
        results += found
        rows = [dataclasses.asdict(result) for result in results]
        content = {"config": config.model_dump(mode="json"), "results": [*map(plain, rows)]}
        write_json(content, folder / "audit.json")
        write_csv(rows, folder / "audit.csv")
        write_spearman(results, folder)
    return folder


def measure_budget(
    run: AuditedRun, lr: float
) -> tuple[list[BudgetResult], Tensor, Mapping[str, Tensor]]:
    """One run: its results, and the truth and scores of removals over the whole of it."""
    recorded, config = RecordedRun.of(run, lr), run.config
    results = [_cost("training", recorded, recorded.trajectory.seconds)]
    whole, truth, scores = _compare(recorded, _spread_pairs(config, run.seed), math.inf)
    results += whole
    for horizon in config.horizons:
        results += _compare(recorded, _near_pairs(config, run.seed, horizon), horizon)[0]
    return results, truth, scores


def _compare(
    recorded: RecordedRun, pairs: Pairs, horizon: float
) -> tuple[list[BudgetResult], Tensor, dict[str, Tensor]]:
    """All predictions of one horizon against the truth; the scores but of the system level."""
    began = time.perf_counter()
    truth = recorded.truth(pairs, horizon)
    results, scores = list[BudgetResult](), dict[str, Tensor]()
    if horizon == math.inf:
        results.append(_cost("leave one out", recorded, time.perf_counter() - began))
    for level, name, swept, options in predictions(recorded, horizon):
        began = time.perf_counter()
        found = swept.predicted(pairs, horizon, options).double()
        seconds = time.perf_counter() - began
        error = float((found - truth).norm() / truth.norm())
        where = (recorded.lr, horizon, recorded.run.seed)
        results.append(BudgetResult(level, name, *where, spearman(found, truth), error, seconds))
        if level != "system":
            scores[name] = found
    return results, truth, scores


def _cost(row: str, recorded: RecordedRun, seconds: float) -> BudgetResult:
    seed = recorded.run.seed
    return BudgetResult("cost", row, recorded.lr, math.inf, seed, math.nan, math.nan, seconds)


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


def read_results(config: AuditConfig) -> list[BudgetResult]:
    """Results that the directory holds of this configuration, whatever seeds and learning rates.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """
    path = config.folder / "audit.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text("utf-8"))
        held, rows = content["config"], content["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be of an audit, got {error!r}; remove it") from error
    config.check_same(held, path)
    return [
        BudgetResult(**{key: _number(key, value) for key, value in row.items()}) for row in rows
    ]


def _number(key: str, value: Any) -> Any:
    """The inverse of `plain` for a field of `BudgetResult`."""
    if key == "horizon" and value == "inf":
        return math.inf
    return math.nan if value is None else value
