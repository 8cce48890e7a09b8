"""What audits show and leave behind: rank correlations, tables of the terminal, pictures, files."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from selectflow.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from selectflow.audit.budget import BudgetResult
    from selectflow.audit.proxy import ProxyFigures, ProxyPoint

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "0.6")

_Value = TypeVar("_Value")


def spearman(scores: Tensor, truth: Tensor) -> float:
    """Rank correlation over pairs, averaged over queries; both of shape (num_pairs, Q)."""
    pairs = zip(scores.T.tolist(), truth.T.tolist(), strict=True)
    return statistics.fmean(rank_correlation(ours, theirs) for ours, theirs in pairs)


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Spearman; NaN of fewer than two values, and where all are equal."""
    from scipy.stats import spearmanr  # noqa: PLC0415

    if len(ours) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what scipy says of NaN
        return float(spearmanr(ours, theirs).statistic)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinity and no NaN: "inf", and null for what has no value."""
    return {key: _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file of rows with the same keys, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


# --- the error budget -----------------------------------------------------------------------------


def print_budget(results: Sequence[BudgetResult]) -> None:
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
    rows = _unique(result.row for result in results)
    for row, colour in zip(rows, _COLOURS, strict=False):
        found = [result for result in results if result.row == row]
        at = sorted(_unique(getattr(result, key) for result in found))
        ranks = [[r.spearman for r in found if getattr(r, key) == x] for x in at]
        means, spread = [*map(statistics.fmean, ranks)], [*map(_deviation, ranks)]
        axes.errorbar(at, means, spread, marker="o", color=colour, label=row, capsize=2)


def _unique(values: Iterable[_Value]) -> list[_Value]:
    return list(dict.fromkeys(values))


# --- the error proxy ------------------------------------------------------------------------------


def print_proxy(figures: Sequence[ProxyFigures]) -> None:
    """Print, for each change, the grid of errors, and the figures over learning rates."""
    for change in dict.fromkeys(each.change for each in figures):
        found = [each for each in figures if each.change == change]
        Console().print(_grid(change, found))
        Console().print(_over_rates(change, found))


def _grid(change: str, figures: Sequence[ProxyFigures]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{change}: relative error of first order",
        caption="Median predicted / true; (Spearman of |Q| with |D - I|)",
        caption_justify="left",
    )
    horizons = [h for h in dict.fromkeys(each.horizon for each in figures) if h is not None]
    table.add_column("lr")
    for horizon in horizons:
        table.add_column(f"h {horizon}", justify="right")
    at = {(each.lr, each.horizon): each for each in figures if each.largest_rho is None}
    for lr in dict.fromkeys(each.lr for each in figures):
        if lr is not None:
            table.add_row(f"{lr:g}", *(_errors(at[lr, horizon]) for horizon in horizons))
    return table


def _errors(each: ProxyFigures) -> str:
    rank = "" if math.isnan(each.rank_error) else f" ({each.rank_error:.2f})"  # of one point none
    return f"{each.relative:.2g} / {each.true_relative:.2g}{rank}"


def _over_rates(change: str, figures: Sequence[ProxyFigures]) -> Table:
    limits = [each.largest_rho for each in figures if each.largest_rho is not None]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{change}: over all learning rates",
        caption="Share of right signs, then Spearman: with the effect D; with |D - I|; with "
        "|D - I| / |I|; of the fast |Q| with the exact one; of the fast rho with |D - I| / |I|"
        + "".join(f"; trusted: rho <= {limit:g}" for limit in limits),
        caption_justify="left",
    )
    heads = (
        "h", "points", "sign I", "sign I+Q", "I", "I+Q", "|Q|", "rho", "fast |Q|", "fast rho",
    )  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right", no_wrap=head == "h")
    for each in figures:
        if each.lr is None:
            shown = (
                each.sign_first, each.sign_corrected, each.rank_first, each.rank_corrected,
                each.rank_error, each.rank_relative, each.rank_fast, each.rank_fast_relative,
            )  # fmt: skip
            table.add_row(_which(each), str(each.num), *map(_number, shown))
    return table


def _which(each: ProxyFigures) -> str:
    if each.largest_rho is not None:
        return "trusted"
    return "all" if each.horizon is None else str(each.horizon)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def write_proxy(points: Sequence[ProxyPoint], path: Path) -> None:
    """Draw predicted against true error, and I and I + Q against the effect, for each change."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    changes = list(dict.fromkeys(point.change for point in points))
    figure = Figure(figsize=(4 * len(changes), 7.5), layout="constrained")
    for column, change in enumerate(changes, 1):
        found = [point for point in points if point.change == change]
        errors = figure.add_subplot(2, len(changes), column)
        _draw_errors(errors, found)
        errors.set_title(change)
        _draw_effects(figure.add_subplot(2, len(changes), len(changes) + column), found)
    figure.savefig(path, dpi=120)


def _draw_errors(axes: Axes, points: Sequence[ProxyPoint]) -> None:
    for lr, colour in zip(dict.fromkeys(point.lr for point in points), _COLOURS, strict=False):
        found = [p for p in points if p.lr == lr and p.second and p.effect != p.first]
        true = [abs(p.effect - p.first) for p in found]
        predicted = [abs(p.second) for p in found]
        axes.plot(true, predicted, ".", markersize=3, color=colour, label=f"lr {lr:g}")
    axes.axline((1e-6, 1e-6), (1e-5, 1e-5), color="0.7", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="true error |D - I|", ylabel="predicted error |Q|")
    axes.legend(frameon=False, markerscale=3)


def _draw_effects(axes: Axes, points: Sequence[ProxyPoint]) -> None:
    for label, colour, corrected in (("I", _COLOURS[1], 0.0), ("I + Q", _COLOURS[0], 1.0)):
        predicted = [p.first + corrected * p.second for p in points]
        effect = [p.effect for p in points]
        axes.plot(effect, predicted, ".", markersize=3, color=colour, label=label)
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
    axes.set(xlabel="effect D, really made", ylabel="predicted")
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.legend(frameon=False, markerscale=3)
