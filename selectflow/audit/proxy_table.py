"""A study of the error proxy as tables of the terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by the colour-blind; the yellow is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "0.6")


class Point(Protocol):
    """What the picture reads of one point; see `audit_proxy.Point`."""

    @property
    def change(self) -> str: ...
    @property
    def lr(self) -> float: ...
    @property
    def first(self) -> float: ...
    @property
    def second(self) -> float: ...
    @property
    def effect(self) -> float: ...


class Cell(Protocol):
    """What the tables read of one cell; see `audit_proxy_report.Cell`."""

    @property
    def change(self) -> str: ...
    @property
    def lr(self) -> float | None: ...
    @property
    def horizon(self) -> int | None: ...
    @property
    def largest_rho(self) -> float | None: ...
    @property
    def num(self) -> int: ...
    @property
    def sign_first(self) -> float: ...
    @property
    def sign_corrected(self) -> float: ...
    @property
    def rank_first(self) -> float: ...
    @property
    def rank_corrected(self) -> float: ...
    @property
    def rank_error(self) -> float: ...
    @property
    def rank_relative(self) -> float: ...
    @property
    def rank_fast(self) -> float: ...
    @property
    def rank_fast_relative(self) -> float: ...
    @property
    def relative(self) -> float: ...
    @property
    def true_relative(self) -> float: ...


def print_proxy(cells: Sequence[Cell]) -> None:
    """Print, for each change, the grid of errors, and the figures over learning rates."""
    for change in dict.fromkeys(cell.change for cell in cells):
        found = [cell for cell in cells if cell.change == change]
        Console().print(_grid(change, found))
        Console().print(_over_rates(change, found))


def _grid(change: str, cells: Sequence[Cell]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{change}: relative error of first order",
        caption="Median predicted / true; (Spearman of |Q| with |D - I|)",
        caption_justify="left",
    )
    horizons = [h for h in dict.fromkeys(cell.horizon for cell in cells) if h is not None]
    table.add_column("lr")
    for horizon in horizons:
        table.add_column(f"h {horizon}", justify="right")
    at = {(cell.lr, cell.horizon): cell for cell in cells if cell.largest_rho is None}
    for lr in dict.fromkeys(cell.lr for cell in cells):
        if lr is not None:
            table.add_row(f"{lr:g}", *(_errors(at[lr, horizon]) for horizon in horizons))
    return table


def _errors(cell: Cell) -> str:
    rank = "" if math.isnan(cell.rank_error) else f" ({cell.rank_error:.2f})"  # of one point none
    return f"{cell.relative:.2g} / {cell.true_relative:.2g}{rank}"


def _over_rates(change: str, cells: Sequence[Cell]) -> Table:
    limits = [cell.largest_rho for cell in cells if cell.largest_rho is not None]
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
    for cell in cells:
        if cell.lr is None:
            figures = (
                cell.sign_first, cell.sign_corrected, cell.rank_first, cell.rank_corrected,
                cell.rank_error, cell.rank_relative, cell.rank_fast, cell.rank_fast_relative,
            )  # fmt: skip
            table.add_row(_which(cell), str(cell.num), *map(_number, figures))
    return table


def _which(cell: Cell) -> str:
    if cell.largest_rho is not None:
        return "trusted"
    return "all" if cell.horizon is None else str(cell.horizon)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def write_png(points: Sequence[Point], path: Path) -> None:
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


def _draw_errors(axes: Axes, points: Sequence[Point]) -> None:
    for lr, colour in zip(dict.fromkeys(point.lr for point in points), _COLOURS, strict=False):
        found = [p for p in points if p.lr == lr and p.second and p.effect != p.first]
        true = [abs(p.effect - p.first) for p in found]
        predicted = [abs(p.second) for p in found]
        axes.plot(true, predicted, ".", markersize=3, color=colour, label=f"lr {lr:g}")
    axes.axline((1e-6, 1e-6), (1e-5, 1e-5), color="0.7", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="true error |D - I|", ylabel="predicted error |Q|")
    axes.legend(frameon=False, markerscale=3)


def _draw_effects(axes: Axes, points: Sequence[Point]) -> None:
    for label, colour, corrected in (("I", _COLOURS[1], 0.0), ("I + Q", _COLOURS[0], 1.0)):
        predicted = [p.first + corrected * p.second for p in points]
        effect = [p.effect for p in points]
        axes.plot(effect, predicted, ".", markersize=3, color=colour, label=label)
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
    axes.set(xlabel="effect D, really made", ylabel="predicted")
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.legend(frameon=False, markerscale=3)
