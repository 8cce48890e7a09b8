"""The error proxy: what it predicts for a change of training, and what the change really does.

A run is trained plainly and stops at several places in its middle. There a window of coming
updates is taken, and two kinds of changes are both predicted and really made: single examples are
removed from its first batch, and all its batches are exchanged for selected ones. A selection is
one look-ahead's: for each horizon the examples of each pool whose scores are highest.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectflow.audit.config import ProxyConfig
from selectflow.audit.problems import PROBLEMS, build_adamw, cast, spoiled
from selectflow.audit.report import plain, rank_correlation, write_csv, write_json, write_proxy
from selectflow.audit.reruns import effects
from selectflow.control.rules import AutoHorizon
from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate
from selectflow.core.optim import Adjoint, State, Update
from selectflow.core.passes import Objective
from selectflow.core.proxy import closed_form, probe, relative_error
from selectflow.core.sweep import SweepStep, Window, sweep
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import removals, selection
from selectflow.options import ConfigError

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
        place = Place(run, number, run.reader.state(), run.updates())
        yield from _removals(place)
        yield from _selections(place)
        run.train(config.between)


class ProxyRun:
    """A run that goes on when it is told to; deterministic, as scores are: dropout is off.

    Args:
        config: of the study.
        lr: learning rate.
        seed: of the weights and of the data.

    Raises:
        ConfigError: there are too few examples.
    """

    def __init__(self, config: ProxyConfig, lr: float, seed: int) -> None:
        problem = PROBLEMS[config.model.kind]
        self.config, self.lr, self.seed = config, lr, seed
        self.generator = torch.Generator().manual_seed(seed)
        examples = problem.examples(config.model)
        known = num_examples(examples)
        used = config.num_target + max(round(config.batch / keep) for keep in (*config.keeps, 1))
        if used > known:
            raise ConfigError(
                f"num_target + batch / keeps must be <= {known}, the examples there are, got "
                f"{used}; lower one of them"
            )
        order = torch.randperm(known, generator=self.generator)
        examples = cast(take(examples, order), config.precision)
        self.target = take(examples, slice(config.num_target))
        rest = take(examples, slice(config.num_target, None))
        self.rest = spoiled(rest, config.noise, self.generator)
        torch.manual_seed(seed)
        model = problem.adapt(config.model, problem.build(config.model))
        self.model = model.to(config.precision).eval()
        self.optimizer = build_adamw(config, self.model, lr)
        self.reader = OptimizerReader(self.model, self.optimizer)
        self.derivatives = Derivatives(Objective(self.model, problem.loss_fn), "exact")

    def batch(self, size: int) -> Batch:
        """The next examples, none twice in a batch."""
        order = torch.randperm(num_examples(self.rest), generator=self.generator)
        return take(self.rest, order[:size])

    def updates(self) -> list[Update]:
        """The next updates, as many as the longest horizon reads."""
        return self.reader.updates(max(*self.config.horizons, 1))

    def train(self, steps: int) -> None:
        """Go on for so many plain training steps."""
        loss_fn = PROBLEMS[self.config.model.kind].loss_fn
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss_fn(self.model, self.batch(self.config.batch)).mean().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Place:
    """A moment of a run, and the updates that follow.

    Attributes:
        run: which is at that moment.
        number: of the run's windows, the one that begins here.
        state: of the model and the optimizer.
        updates: that follow.
    """

    run: ProxyRun
    number: int
    state: State
    updates: Sequence[Update]

    def point(self, change: str, horizon: int, **measured: Any) -> ProxyPoint:
        """A point of this place, with what was measured."""
        where = {"lr": self.run.lr, "seed": self.run.seed, "window": self.number}
        return ProxyPoint(change=change, horizon=horizon, **where | measured)


def _removals(place: Place) -> Iterator[ProxyPoint]:
    run, config = place.run, place.run.config
    batches = [run.batch(config.batch) for _ in place.updates]
    changes = removals(batches, range(config.num_removals))
    window = run.derivatives, place.updates, place.state, changes, run.target
    began = time.perf_counter()
    horizons = sorted(config.horizons)
    first, second = closed_form(*window, horizons)
    seconds = time.perf_counter() - began
    effect = effects(*window)
    for column, horizon in enumerate(horizons):
        for row in range(config.num_removals):
            yield place.point(
                "removal",
                horizon,
                first=float(first[row, column]),
                second=float(second[row, column]),
                effect=float(effect[row, horizon]),
                exact_s=seconds,
            )


def _selections(place: Place) -> Iterator[ProxyPoint]:
    run, config = place.run, place.run.config
    for keep in config.keeps:
        pools = [run.batch(round(config.batch / keep)) for _ in place.updates]
        orders = [torch.randperm(num_examples(pool), generator=run.generator) for pool in pools]
        nominal = [order[: config.batch] for order in orders]
        for horizon in config.horizons:
            num = max(horizon, 1)
            selected = best_scored(place, pools[:num], nominal, horizon)
            change = selection(pools[:num], nominal[:num], selected)
            window = run.derivatives, place.updates[:num], place.state, change, run.target
            exact = probe(*window, method="exact", horizons=(horizon,))
            fast = probe(*window, method="fast", horizons=(horizon,))
            yield place.point(
                f"keep {keep:g}",
                horizon,
                first=exact.first[0],
                second=exact.second[0],
                effect=exact.effect[0],
                fast_first=fast.first[0],
                fast_second=fast.second[0],
                exact_s=exact.seconds,
                fast_s=fast.seconds,
            )


def best_scored(
    place: Place, pools: Sequence[Batch], nominal: Sequence[Tensor], horizon: int
) -> list[Tensor]:
    """The B examples of each pool with the highest scores, by one look-ahead of this horizon."""
    run, found = place.run, dict[int, Tensor]()
    derivatives, size = run.derivatives, run.config.batch

    def keep(visit: SweepStep) -> None:
        gamma = place.updates[visit.index].masked(visit.gamma, visit.after)
        _, slopes = derivatives.directional(visit.state.params, gamma, pools[visit.index])
        found[visit.index] = slopes.argsort(stable=True)[:size]

    def read_target(end: State) -> Adjoint:
        _, grad = derivatives.gradient(end.params, run.target)
        return Adjoint(grad, end.exp_avg.zeros_like(), end.exp_avg_sq.zeros_like())

    if horizon == 0:
        ahead = immediate(derivatives, place.updates[0], place.state, run.target)
        slopes = derivatives.directional(place.state.params, ahead.sensitivities[0], pools[0])[1]
        return [slopes.argsort(stable=True)[:size]]
    window = Window(derivatives, place.updates[:horizon], lambda i, _: take(pools[i], nominal[i]))
    sweep(window, place.state, read_target, keep, capacity=horizon)
    return [found[index] for index in range(horizon)]


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

    first, second, effect = column("first"), column("second"), column("effect")
    fast_first, fast_second = column("fast_first"), column("fast_second")
    error = abs(effect - first)
    relative = _relative_errors(first, second)
    true_relative = _relative_errors(first, error)
    return ProxyFigures(
        change=points[0].change,
        lr=lr,
        horizon=horizon,
        largest_rho=largest_rho,
        num=len(points),
        sign_first=float(np.mean(np.signbit(first) == np.signbit(effect))),
        sign_corrected=float(np.mean(np.signbit(first + second) == np.signbit(effect))),
        rank_first=rank_correlation(first, effect),
        rank_corrected=rank_correlation(first + second, effect),
        rank_error=rank_correlation(abs(second), error),
        rank_relative=rank_correlation(relative, true_relative),
        rank_fast=rank_correlation(abs(fast_second), abs(second)),
        rank_fast_relative=rank_correlation(
            _relative_errors(fast_first, fast_second), true_relative
        ),
        relative=float(np.median(relative)),
        true_relative=float(np.median(true_relative)),
        exact_s=float(np.mean(column("exact_s"))),
        fast_s=float(np.mean(column("fast_s"))),
    )


def _relative_errors(first: Any, second: Any) -> Any:
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return np.array([relative_error(i, q, 0.0) for i, q in pairs])


def _changes(points: Sequence[ProxyPoint]) -> list[str]:
    return [*dict.fromkeys(point.change for point in points)]


# --- the study ------------------------------------------------------------------------------------


def run_proxy(
    config: ProxyConfig, progress: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[ProxyFigures]]:
    """Measure every change at every learning rate, horizon and seed that is not measured yet.

    Args:
        config: of the study.
        progress: told what was finished, in words.

    Returns:
        The directory root/name, with points.csv, proxy.json and proxy.png over all runs so far, and
        the figures.

    Raises:
        ConfigError: the directory holds a study of another configuration; too few examples.
        OSError: a file cannot be written.
    """
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    points = [] if config.overwrite else read_points(config)
    for lr, seed in config.runs_left({(point.lr, point.seed) for point in points}, progress):
        points += measure_proxy(config, lr, seed)
        write_csv([*map(dataclasses.asdict, points)], folder / "points.csv")
        figures = summarize(points)
        content = {
            "config": config.model_dump(mode="json"),
            "cells": [plain(dataclasses.asdict(each)) for each in figures],
            "rank_of_medians": plain({c: rank_of_medians(figures, c) for c in _changes(points)}),
        }
        write_json(content, folder / "proxy.json")  # which says that points.csv is whole
        write_proxy(points, folder / "proxy.png")
    return folder, summarize(points)


def read_points(config: ProxyConfig) -> list[ProxyPoint]:
    """Points that the directory holds of this configuration, whatever seeds and learning rates.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """
    path = config.folder / "proxy.json"
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text("utf-8"))["config"]
        with (config.folder / "points.csv").open(newline="", encoding="utf-8") as file:
            points = [_point(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be of a proxy study, got {error!r}; remove it") from error
    config.check_same(held, path)
    return points


def _point(row: Mapping[str, str]) -> ProxyPoint:
    kinds = {"change": str, "seed": int, "window": int, "horizon": int}
    values: dict[str, Any] = {
        key: kinds.get(key, float)(text) if text else None for key, text in row.items()
    }
    return ProxyPoint(**values)
