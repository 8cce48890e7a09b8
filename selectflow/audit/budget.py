"""The error budget: predictions of removals, each against leave-one-out retraining.

Three levels of predictions. Configuration: the sweep assumes another optimizer, schedule or decay.
Algorithm: it assumes the right one and linearises. System: it linearises rightly, in another
precision or from sparse snapshots.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selectflow.audit.influence import influence, leave_one_out
from selectflow.audit.problems import AuditedRun
from selectflow.audit.reruns import SparseTrajectory
from selectflow.audit.study import (
    COLOURS,
    AuditConfig,
    rank_correlation,
    read_study,
    run_study,
    write_rows,
    write_study,
)
from selectflow.core.batches import Batch
from selectflow.core.chunks import num_fitting
from selectflow.offline.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pairs = list[tuple[int, int]]
"""(step, position in its batch) of each removal."""

# --- one recorded run, and the predictions of its removals ----------------------------------------

_ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("config", "sgd"): {"method": "sgd"},
    ("config", "constant lr"): {"method": "constant_lr"},
    ("config", "no decay"): {"method": "no_decay"},
    ("algorithm", "adamw/none"): {"curvature": "none"},
    ("algorithm", "adamw/fisher"): {"curvature": "fisher"},
    ("algorithm", "adamw/exact"): {},
    ("algorithm", "adamw/exact, own update"): {"own_update": "exact"},
    ("algorithm", "adamw/exact, order 2"): {"order": 2},
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


def predictions(
    recorded: RecordedRun, horizon: float
) -> Iterator[tuple[str, str, RecordedRun, Mapping[str, Any]]]:
    """All predictions for one horizon, made one at a time: recordings are large.

    Those of the system level need a recording of their own each, so only the whole run has them.

    Yields:
        Level, what is assumed, the run that is swept, and options of `RecordedRun.predicted`.
    """
    config = recorded.run.config
    for (level, row), options in _ROWS.items():
        if row != "constant lr" or config.schedule != "constant":
            yield level, row, recorded, options
    if horizon < math.inf:
        return
    for dtype in (torch.float32, torch.bfloat16):
        if dtype != config.precision:
            run = dataclasses.replace(recorded.run, dtype=dtype)
            name = str(dtype).removeprefix("torch.")
            yield "system", name, RecordedRun.of(run, recorded.lr), {}
    sparse = recorded.run.record(recorded.lr, config.spacing)
    for hold in (False, True):
        name = f"every {config.spacing}, moments {'held' if hold else 'interpolated'}"
        guessed = SparseTrajectory.of(sparse, hold)
        yield "system", name, dataclasses.replace(recorded, trajectory=guessed), {}


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
        progress: told what was finished, in words.

    Returns:
        The directory root/name, with audit.json, audit.csv, spearman.png over all runs so far, and
        scatter.png of the first.

    Raises:
        ConfigError: the directory holds an audit of another configuration; too few examples.
        OSError: a file cannot be written.
    """
    folder = config.folder
    is_drawn = not config.overwrite and (folder / "audit.json").exists()

    def measure(lr: float, seed: int) -> list[BudgetResult]:
        nonlocal is_drawn
        found, truth, scores = measure_budget(AuditedRun(config, seed), lr)
        if not is_drawn:
            write_scatter(truth, scores, folder)
            is_drawn = True
        return found

    def write(results: Sequence[BudgetResult]) -> None:
        rows = [dataclasses.asdict(result) for result in results]
        write_study(config, "audit.json", {"results": rows})
        write_rows(results, folder / "audit.csv")
        write_spearman(results, folder)

    run_study(config, partial(read_results, config), measure, write, progress)
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
    special = {None: math.nan, "inf": math.inf}  # what JSON has no number for

    def results(content: Mapping[str, Any]) -> list[BudgetResult]:
        rows = content["results"]
        return [BudgetResult(**{k: special.get(v, v) for k, v in row.items()}) for row in rows]

    return read_study(config, "audit.json", "an audit", results)


def spearman(scores: Tensor, truth: Tensor) -> float:
    """Rank correlation over pairs, averaged over queries; both of shape (num_pairs, Q)."""
    pairs = zip(scores.T.tolist(), truth.T.tolist(), strict=True)
    return statistics.fmean(rank_correlation(ours, theirs) for ours, theirs in pairs)


# --- tables and pictures --------------------------------------------------------------------------


def print_budget(results: Sequence[BudgetResult]) -> None:
    """Print Spearman with the truth over the whole run, mean ± standard deviation over seeds."""
    lrs = list(dict.fromkeys(result.lr for result in results))
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Spearman with leave-one-out retraining per query; (relative error); seconds a run",
        caption_justify="left",
    )
    for name in ("level", "row"):
        table.add_column(name)
    for lr in lrs:
        table.add_column(f"lr {lr:g}", justify="right")
    table.add_column("s", justify="right")
    whole = [result for result in results if result.horizon == math.inf]
    for level, row in dict.fromkeys((result.level, result.row) for result in whole):
        found = [result for result in whole if (result.level, result.row) == (level, row)]
        shown = [_rank_and_error([result for result in found if result.lr == lr]) for lr in lrs]
        seconds = statistics.fmean(result.seconds for result in found)
        table.add_row(level, row, *shown, f"{seconds:.2f}")
    Console().print(table)


def _rank_and_error(found: Sequence[BudgetResult]) -> str:
    ranks = [result.spearman for result in found]
    if any(map(math.isnan, ranks)):
        return "-"
    error = statistics.fmean(result.relative_error for result in found)
    return f"{statistics.fmean(ranks):.3f} ± {_deviation(ranks):.3f} ({error:.2g})"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def write_scatter(truth: Tensor, scores: Mapping[str, Tensor], folder: Path) -> None:
    """Draw score against truth, scatter.png.

    Args:
        truth: shape (num_pairs, Q), of one run.
        scores: row -> its scores of the same run, same shape.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = math.ceil(len(scores) / 2)
    scatter = Figure(figsize=(3 * columns, 6), layout="constrained")
    for place, (row, found) in enumerate(scores.items(), 1):
        axes = scatter.add_subplot(2, columns, place)
        axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
        axes.plot(truth.flatten(), found.flatten(), ".", markersize=2, color=COLOURS[0])
        axes.set(title=row, xlabel="loss rise by retraining", ylabel="score")
    scatter.savefig(folder / "scatter.png", dpi=120)


def write_spearman(results: Sequence[BudgetResult], folder: Path) -> None:
    """Draw Spearman over learning rates, and over horizons at the largest one, spearman.png."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = Figure(figsize=(11, 4.2), layout="constrained")
    over_lr, over_horizon = lines.add_subplot(1, 2, 1), lines.add_subplot(1, 2, 2)
    scored = [result for result in results if result.level in ("config", "algorithm")]
    largest = max(result.lr for result in scored)
    finite = [r for r in scored if r.lr == largest and r.horizon < math.inf]
    _draw_lines(over_lr, [r for r in scored if r.horizon == math.inf], "lr")
    _draw_lines(over_horizon, finite, "horizon")
    over_lr.set(title="whole run", xlabel="learning rate", ylabel="Spearman", xscale="log")
    over_horizon.set(title=f"lr {largest:g}", xlabel="horizon (updates)", xscale="log")
    lines.legend(*over_lr.get_legend_handles_labels(), loc="outside right center", frameon=False)
    lines.savefig(folder / "spearman.png", dpi=120)


def _draw_lines(axes: Axes, results: Sequence[BudgetResult], key: str) -> None:
    rows = dict.fromkeys(result.row for result in results)
    for row, colour in zip(rows, COLOURS, strict=False):
        found = [result for result in results if result.row == row]
        at = sorted({getattr(result, key) for result in found})
        ranks = [[r.spearman for r in found if getattr(r, key) == x] for x in at]
        means, spread = [*map(statistics.fmean, ranks)], [*map(_deviation, ranks)]
        axes.errorbar(at, means, spread, marker="o", color=colour, label=row, capsize=2)
