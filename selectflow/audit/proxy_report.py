"""How well the proxy predicts the error of first order: points into figures, and both to disk."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from selectflow.audit.config import ProxyConfig
from selectflow.audit.proxy import Point, measure_run
from selectflow.audit.proxy_table import write_png
from selectflow.audit.report import check_same, spearman
from selectflow.control.rules import AutoHorizon
from selectflow.core.files import atomic_file
from selectflow.core.proxy import relative_error
from selectflow.options import ConfigError

TRUSTED = AutoHorizon().tolerance
"""The largest rho at which a longer horizon is tried."""


@dataclass(frozen=True)
class Cell:
    """Figures of all points of one kind of change, at one or all learning rates and horizons.

    Attributes:
        change: as of the points.
        lr: learning rate; None: all.
        horizon: updates; None: all.
        largest_rho: only the points whose rho is at most this; None: all.
        num: points.
        sign_first: share of points whose effect D has the sign of I.
        sign_corrected: the same of I + Q.
        rank_first: Spearman of I with D.
        rank_corrected: Spearman of I + Q with D.
        rank_error: Spearman of |Q| with the true error |D - I|.
        rank_relative: Spearman of rho = |Q| / |I| with the true relative error |D - I| / |I|.
        rank_fast: Spearman of the fast form's |Q| with that of the closed form.
        rank_fast_relative: Spearman of the fast form's rho with the true relative error.
        relative: median of rho.
        true_relative: median of the true relative error.
        exact_s: mean seconds of the closed form.
        fast_s: mean seconds of the fast form.
    """

    change: str
    lr: float | None
    horizon: int | None
    largest_rho: float | None
    num: int
    sign_first: float
    sign_corrected: float
    rank_first: float
    rank_corrected: float
    rank_error: float
    rank_relative: float
    rank_fast: float
    rank_fast_relative: float
    relative: float
    true_relative: float
    exact_s: float
    fast_s: float


def run_proxy(
    config: ProxyConfig, progress: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[Cell]]:
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
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder = config.root / config.name
    folder.mkdir(parents=True, exist_ok=True)
    points = [] if config.overwrite else measured_before(config, folder)
    done = {(point.lr, point.seed) for point in points}
    for lr in config.lrs:
        for seed in range(config.seeds):
            if (lr, seed) in done:
                progress(f"found lr {lr:g}, seed {seed}")
                continue
            points += measure_run(config, lr, seed)
            _write(config, points, folder)
            progress(f"measured lr {lr:g}, seed {seed}")
    return folder, summarize(points)


def measured_before(config: ProxyConfig, folder: Path) -> list[Point]:
    """Points that `folder` holds of this configuration, whatever seeds and learning rates.

    Raises:
        ConfigError: they are of another configuration, or cannot be read.
    """
    path = folder / "proxy.json"
    if not path.exists():
        return []
    try:
        held = json.loads(path.read_text("utf-8"))["config"]
        with (folder / "points.csv").open(newline="", encoding="utf-8") as file:
            points = [_point(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must be of a proxy study, got {error!r}; remove it") from error
    check_same(config, held, path)
    return points


def _point(row: dict[str, str]) -> Point:
    kinds = {"change": str, "seed": int, "window": int, "horizon": int}
    values: dict[str, Any] = {
        key: kinds.get(key, float)(text) if text else None for key, text in row.items()
    }
    return Point(**values)


def _write(config: ProxyConfig, points: Sequence[Point], folder: Path) -> None:
    """points.csv first: proxy.json says that it is whole."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Point)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, points))
    with atomic_file(folder / "points.csv") as file:
        file.write(text.getvalue().encode())
    cells = summarize(points)
    content = {
        "config": config.model_dump(mode="json"),
        "cells": [_plain(dataclasses.asdict(cell)) for cell in cells],
        "rank_of_medians": _plain({c: rank_of_medians(cells, c) for c in _changes(points)}),
    }
    with atomic_file(folder / "proxy.json") as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    write_png(points, folder / "proxy.png")


def summarize(points: Sequence[Point]) -> list[Cell]:
    """Each change at each learning rate and horizon, then over one of them, then over both.

    The last of a change is over those that the controller would trust by their rho.
    """
    cells = []
    for change in _changes(points):
        mine = [p for p in points if p.change == change]
        lrs = [*dict.fromkeys(p.lr for p in mine)]
        horizons = sorted({p.horizon for p in mine})
        for lr in (*lrs, None):
            for horizon in (*horizons, None):
                chosen = [p for p in mine if lr in (None, p.lr) and horizon in (None, p.horizon)]
                cells.append(_cell(change, lr, horizon, None, chosen))
        if trusted := [p for p in mine if _rho(p) <= TRUSTED]:
            cells.append(_cell(change, None, None, TRUSTED, trusted))
    return cells


def rank_of_medians(cells: Sequence[Cell], change: str) -> float:
    """Spearman of the median rho with the median true relative error, over the grid's cells."""
    grid = [c for c in cells if c.change == change and None not in (c.lr, c.horizon)]
    return _rank([c.relative for c in grid], [c.true_relative for c in grid])


def _cell(
    change: str,
    lr: float | None,
    horizon: int | None,
    largest_rho: float | None,
    points: Sequence[Point],
) -> Cell:
    first, second = [p.first for p in points], [p.second for p in points]
    effect = [p.effect for p in points]
    corrected = [p.first + p.second for p in points]
    error = [abs(p.effect - p.first) for p in points]
    true_relative = [relative_error(p.first, e, 0.0) for p, e in zip(points, error, strict=True)]
    relative = [_rho(p) for p in points]
    fast = [(p.fast_first, p.fast_second) for p in points]
    known = [(i, q) for i, q in fast if i is not None and q is not None]
    return Cell(
        change,
        lr,
        horizon,
        largest_rho,
        len(points),
        _same_sign(first, effect),
        _same_sign(corrected, effect),
        _rank(first, effect),
        _rank(corrected, effect),
        _rank(list(map(abs, second)), error),
        _rank(relative, true_relative),
        _rank([abs(q) for _, q in known], list(map(abs, second))) if known else math.nan,
        _rank([relative_error(i, q, 0.0) for i, q in known], true_relative) if known else math.nan,
        median(relative),
        median(true_relative),
        sum(p.exact_s for p in points) / len(points),
        sum(p.fast_s or math.nan for p in points) / len(points),
    )


def _rho(point: Point) -> float:
    """|Q| / |I| by the closed form."""
    return relative_error(point.first, point.second, 0.0)


def _changes(points: Sequence[Point]) -> list[str]:
    return [*dict.fromkeys(point.change for point in points)]


def _rank(ours: Sequence[float], theirs: Sequence[float]) -> float:
    columns = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (ours, theirs))
    return spearman(*columns)


def _same_sign(ours: Sequence[float], theirs: Sequence[float]) -> float:
    same = [math.copysign(1, a) == math.copysign(1, b) for a, b in zip(ours, theirs, strict=True)]
    return sum(same) / len(same)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: null for what was not measured."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
