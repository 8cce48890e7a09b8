"""An audit as a table of the terminal and as two pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "0.6")

_Value = TypeVar("_Value")


class Result(Protocol):
    """What the report reads of one measured row; see `audit_report.Result`."""

    @property
    def level(self) -> str: ...
    @property
    def row(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def horizon(self) -> float: ...
    @property
    def spearman(self) -> float: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def seconds(self) -> float: ...


def print_budget(results: Sequence[Result]) -> None:
    """Print Spearman with the truth over the whole run, mean ± standard deviation over seeds."""
    lrs = _unique(result.lr for result in results)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Spearman with leave-one-out retraining per query; (relative error); seconds a run",
        caption_justify="left",
    )
    table.add_column("level")
    table.add_column("row")
    for lr in lrs:
        table.add_column(f"lr {lr:g}", justify="right")
    table.add_column("s", justify="right")
    whole = [result for result in results if result.horizon == math.inf]
    for level, row in _unique((result.level, result.row) for result in whole):
        found = [result for result in whole if (result.level, result.row) == (level, row)]
        cells = [_cell([result for result in found if result.lr == lr]) for lr in lrs]
        seconds = statistics.fmean(result.seconds for result in found)
        table.add_row(level, row, *cells, f"{seconds:.2f}")
    Console().print(table)


def _cell(found: Sequence[Result]) -> str:
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
        folder: where the picture goes.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = math.ceil(len(scores) / 2)
    scatter = Figure(figsize=(3 * columns, 6), layout="constrained")
    for place, (row, found) in enumerate(scores.items(), 1):
        axes = scatter.add_subplot(2, columns, place)
        axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
        axes.plot(truth.flatten(), found.flatten(), ".", markersize=2, color=_COLOURS[0])
        axes.set(title=row, xlabel="loss rise by retraining", ylabel="score")
    scatter.savefig(folder / "scatter.png", dpi=120)


def write_spearman(results: Sequence[Result], folder: Path) -> None:
    """Draw Spearman over learning rates, and over horizons at the largest one, spearman.png."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = Figure(figsize=(11, 4.2), layout="constrained")
    over_lr, over_horizon = lines.add_subplot(1, 2, 1), lines.add_subplot(1, 2, 2)
    scored = [result for result in results if result.level in ("config", "algorithm")]
    largest = max(result.lr for result in scored)
    _lines(over_lr, [r for r in scored if r.horizon == math.inf], "lr")
    _lines(over_horizon, [r for r in scored if r.lr == largest and r.horizon < math.inf], "horizon")
    over_lr.set(title="whole run", xlabel="learning rate", ylabel="Spearman", xscale="log")
    over_horizon.set(title=f"lr {largest:g}", xlabel="horizon (updates)", xscale="log")
    lines.legend(*over_lr.get_legend_handles_labels(), loc="outside right center", frameon=False)
    lines.savefig(folder / "spearman.png", dpi=120)


def _lines(axes: Axes, results: Sequence[Result], key: str) -> None:
    rows = _unique(result.row for result in results)
    for row, colour in zip(rows, _COLOURS, strict=False):
        found = [result for result in results if result.row == row]
        at = sorted(_unique(getattr(result, key) for result in found))
        ranks = [[r.spearman for r in found if getattr(r, key) == x] for x in at]
        means, spread = [*map(statistics.fmean, ranks)], [*map(_deviation, ranks)]
        axes.errorbar(at, means, spread, marker="o", color=colour, label=row, capsize=2)


def _unique(values: Iterable[_Value]) -> list[_Value]:
    return list(dict.fromkeys(values))
