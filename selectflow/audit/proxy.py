"""The error proxy: what it predicts for a change of training, and what the change really does.

A run is trained plainly and stops at several places in its middle. There a window of coming
updates is taken, and two kinds of changes are both predicted and really made: single examples are
removed from its first batch, and all its batches are exchanged for selected ones. A selection is
one look-ahead's: for each horizon the examples of each pool whose scores are highest.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter
from rich import box
from rich.console import Console
from rich.table import Table

from selectflow.audit.problems import ProxyRun
from selectflow.audit.reruns import effects
from selectflow.audit.study import (
    COLOURS,
    ProxyConfig,
    rank_correlation,
    read_study,
    run_study,
    write_rows,
    write_study,
)
from selectflow.control.ladder import AutoHorizon
from selectflow.core.batches import num_examples
from selectflow.core.optim import State
from selectflow.core.proxy import closed_form, probe, relative_error
from selectflow.core.update import Update
from selectflow.core.weight_changes import removals, selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUSTED = AutoHorizon().tolerance
"""The largest rho at which a longer horizon is tried."""

# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProxyPoint:
    """One change, one horizon."""

    change: str  # "removal", or "keep F" for a selection of the fraction F
    lr: float  # learning rate of the run
    seed: int  # of the run
    window: int  # which of the run's
    horizon: int  # updates to where the target loss is read
    first: float  # I by the closed form
    second: float  # Q by the closed form
    effect: float  # D, really made
    fast_first: float | None = None  # I by the fast form; None for a removal
    fast_second: float | None = None  # Q by the fast form; None for a removal
    exact_s: float  # seconds of the closed form over the whole window, or of all removals together
    fast_s: float | None = None  # seconds of the fast form; None for a removal


def measure_proxy(config: ProxyConfig, lr: float, seed: int) -> Iterator[ProxyPoint]:
    """All points of one run.

    Raises:
        ConfigError: there are too few examples.
    """
    run = ProxyRun(config, lr, seed)
    run.train(config.warm_steps)
    for number in range(config.num_windows):
        place = run, run.reader.state(), run.updates()
        for found in (_removals, _selections):
            for values in found(*place):
                yield ProxyPoint(lr=lr, seed=seed, window=number, **values)
        run.train(config.between)


def _removals(run: ProxyRun, state: State, updates: Sequence[Update]) -> Iterator[dict[str, Any]]:
    batches = [run.batch(run.config.batch) for _ in updates]
    changes = removals(batches, range(run.config.num_removals))
    window = run.derivatives, updates, state, changes, run.target
    began = time.perf_counter()
    horizons = sorted(run.config.horizons)
    first, second = closed_form(*window, horizons)
    seconds = time.perf_counter() - began
    effect = effects(*window)[:, horizons]
    for column, horizon in enumerate(horizons):
        for row in range(run.config.num_removals):
            yield {
                "change": "removal",
                "horizon": horizon,
                "first": float(first[row, column]),
                "second": float(second[row, column]),
                "effect": float(effect[row, column]),
                "exact_s": seconds,
            }


def _selections(run: ProxyRun, state: State, updates: Sequence[Update]) -> Iterator[dict[str, Any]]:
    size = run.config.batch
    for keep in run.config.keeps:
        pools = [run.batch(round(size / keep)) for _ in updates]
        orders = [torch.randperm(num_examples(pool), generator=run.generator) for pool in pools]
        nominal = [order[:size] for order in orders]
        for horizon in run.config.horizons:
            num = max(horizon, 1)
            selected = run.best_scored(state, updates, pools[:num], nominal, horizon)
            change = selection(pools[:num], nominal[:num], selected)
            window = run.derivatives, updates[:num], state, change, run.target
            exact = probe(*window, method="exact", horizons=(horizon,))
            fast = probe(*window, method="fast", horizons=(horizon,))
            yield {
                "change": f"keep {keep:g}",
                "horizon": horizon,
                "first": exact.first[0],
                "second": exact.second[0],
                "effect": exact.effect[0],
                "fast_first": fast.first[0],
                "fast_second": fast.second[0],
                "exact_s": exact.seconds,
                "fast_s": fast.seconds,
            }


# --- figures over the points of all runs ----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProxyFigures:
    """Figures of all points of one kind of change, at one or all learning rates and horizons.

    With I and Q of the points, their effect D, rho = |Q| / |I|, the true error |D - I| and the true
    relative error |D - I| / |I|; ranks are Spearman's correlations.
    """

    change: str
    lr: float | None  # None: all
    horizon: int | None  # None: all
    largest_rho: float | None  # only the points whose rho is at most this; None: all
    num: int  # points
    sign_first: float  # share of points whose D has the sign of I
    sign_corrected: float  # the same of I + Q
    rank_first: float  # of I with D
    rank_corrected: float  # of I + Q with D
    rank_error: float  # of |Q| with the true error
    rank_relative: float  # of rho with the true relative error
    rank_fast: float  # of the fast form's |Q| with that of the closed form
    rank_fast_relative: float  # of the fast form's rho with the true relative error
    relative: float  # median of rho
    true_relative: float  # median of the true relative error
    exact_s: float  # mean seconds of the closed form
    fast_s: float  # mean seconds of the fast form


def summarize(points: Sequence[ProxyPoint]) -> list[ProxyFigures]:
    """Each change at each learning rate and horizon, then over one of them, then over both.

    The last of a change is over those that the controller would trust by their rho.
    """
    found = []
    for change in _changes(points):
        mine = [p for p in points if p.change == change]
        lrs = [*dict.fromkeys(p.lr for p in mine)]
        horizons = sorted({p.horizon for p in mine})
        for lr in (*lrs, None):
            for horizon in (*horizons, None):
                chosen = [p for p in mine if lr in (None, p.lr) and horizon in (None, p.horizon)]
                found.append(_figures(chosen, lr, horizon))
        if trusted := [p for p in mine if relative_error(p.first, p.second, 0.0) <= TRUSTED]:
            found.append(_figures(trusted, None, None, TRUSTED))
    return found


def rank_of_medians(figures: Sequence[ProxyFigures], change: str) -> float:
    """Spearman of the median rho with the median true relative error, over the grid alone."""
    grid = [f for f in figures if f.change == change and None not in (f.lr, f.horizon)]
    return rank_correlation([f.relative for f in grid], [f.true_relative for f in grid])


def _figures(
    points: Sequence[ProxyPoint],
    lr: float | None,
    horizon: int | None,
    largest_rho: float | None = None,
) -> ProxyFigures:
    def column(name: str) -> Any:
        return np.array([getattr(point, name) for point in points], float)  # None is NaN

    def relative_errors(first: Any, second: Any) -> Any:
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        return np.array([relative_error(i, q, 0.0) for i, q in pairs])

    first, second, effect = column("first"), column("second"), column("effect")
    fast_first, fast_second = column("fast_first"), column("fast_second")
    corrected, error = first + second, abs(effect - first)
    fast_relative = relative_errors(fast_first, fast_second)
    relative, true_relative = relative_errors(first, second), relative_errors(first, error)
    return ProxyFigures(
        change=points[0].change,
        lr=lr,
        horizon=horizon,
        largest_rho=largest_rho,
        num=len(points),
        sign_first=float(np.mean(np.signbit(first) == np.signbit(effect))),
        sign_corrected=float(np.mean(np.signbit(corrected) == np.signbit(effect))),
        rank_first=rank_correlation(first, effect),
        rank_corrected=rank_correlation(corrected, effect),
        rank_error=rank_correlation(abs(second), error),
        rank_relative=rank_correlation(relative, true_relative),
        rank_fast=rank_correlation(abs(fast_second), abs(second)),
        rank_fast_relative=rank_correlation(fast_relative, true_relative),
        relative=float(np.median(relative)),
        true_relative=float(np.median(true_relative)),
        exact_s=float(np.mean(column("exact_s"))),
        fast_s=float(np.mean(column("fast_s"))),
    )


def _changes(found: Sequence[ProxyPoint] | Sequence[ProxyFigures]) -> list[str]:
    return [*dict.fromkeys(each.change for each in found)]


# --- the study ------------------------------------------------------------------------------------


def run_proxy(
    config: ProxyConfig, progress: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[ProxyFigures]]:
    """Measure every change at every learning rate, horizon and seed that is not measured yet.

    Args:
        progress: told what was finished, in words.

    Returns:
        The directory root/name, with points.csv, proxy.json and proxy.png over all runs so far, and
        the figures.

    Raises:
        ConfigError: the directory holds a study of another configuration; too few examples.
        OSError: a file cannot be written.
    """
    folder = config.folder

    def write(points: Sequence[ProxyPoint]) -> None:
        write_rows(points, folder / "points.csv")
        figures = summarize(points)
        ranks = {change: rank_of_medians(figures, change) for change in _changes(points)}
        content = {"cells": [asdict(each) for each in figures], "rank_of_medians": ranks}
        write_study(config, "proxy.json", content)  # which says that points.csv is whole
        write_proxy(points, folder / "proxy.png")

    read, measure = partial(read_points, config), partial(measure_proxy, config)
    points = run_study(config, read, measure, write, progress)
    return folder, summarize(points)


def read_points(config: ProxyConfig) -> list[ProxyPoint]:
    """Points that the directory holds of this configuration, whatever seeds and learning rates.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """

    def points(_: Mapping[str, Any]) -> list[ProxyPoint]:
        kind = TypeAdapter(ProxyPoint)
        with (config.folder / "points.csv").open(newline="", encoding="utf-8") as file:
            return [
                kind.validate_python({key: text or None for key, text in row.items()})
                for row in csv.DictReader(file)
            ]

    return read_study(config, "proxy.json", "a proxy study", points)


# --- tables and pictures --------------------------------------------------------------------------


def print_proxy(figures: Sequence[ProxyFigures]) -> None:
    """Print, for each change, the grid of errors, and the figures over learning rates."""
    for change in _changes(figures):
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
            which = "all" if each.horizon is None else str(each.horizon)
            table.add_row(
                which if each.largest_rho is None else "trusted",
                str(each.num),
                *("-" if math.isnan(value) else f"{value:.2f}" for value in shown),
            )
    return table


def write_proxy(points: Sequence[ProxyPoint], path: Path) -> None:
    """Draw predicted against true error, and I and I + Q against the effect, for each change."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    changes = _changes(points)
    figure = Figure(figsize=(4 * len(changes), 7.5), layout="constrained")
    for column, change in enumerate(changes, 1):
        found = [point for point in points if point.change == change]
        errors = figure.add_subplot(2, len(changes), column)
        _draw_errors(errors, found)
        errors.set_title(change)
        _draw_effects(figure.add_subplot(2, len(changes), len(changes) + column), found)
    figure.savefig(path, dpi=120)


def _draw_errors(axes: Axes, points: Sequence[ProxyPoint]) -> None:
    for lr, colour in zip(dict.fromkeys(point.lr for point in points), COLOURS, strict=False):
        found = [p for p in points if p.lr == lr and p.second and p.effect != p.first]
        true = [abs(p.effect - p.first) for p in found]
        predicted = [abs(p.second) for p in found]
        axes.plot(true, predicted, ".", markersize=3, color=colour, label=f"lr {lr:g}")
    axes.axline((1e-6, 1e-6), (1e-5, 1e-5), color="0.7", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="true error |D - I|", ylabel="predicted error |Q|")
    axes.legend(frameon=False, markerscale=3)


def _draw_effects(axes: Axes, points: Sequence[ProxyPoint]) -> None:
    for label, colour, corrected in (("I", COLOURS[1], 0.0), ("I + Q", COLOURS[0], 1.0)):
        predicted = [p.first + corrected * p.second for p in points]
        effect = [p.effect for p in points]
        axes.plot(effect, predicted, ".", markersize=3, color=colour, label=label)
    axes.axline((0, 0), slope=1, color="0.7", linewidth=1)
    axes.set(xlabel="effect D, really made", ylabel="predicted")
    axes.set_xscale("symlog", linthresh=1e-4)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.legend(frameon=False, markerscale=3)
