"""The files of a comparison: tables, pictures, and one HTML page that opens without a network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

from selectflow.report import figures
from selectflow.report.compare import Comparison
from selectflow.report.figures import Panel
from selectflow.report.groups import flat
from selectflow.report.runs import KEPT_ALTERED, WALL
from selectflow.report.samples import Examined
from selectflow.report.tables import grids, quantity, sentences, to_records, write_csv
from selectflow.run.wandb import Chart, Report


def write_outputs(comparison: Comparison, examined: Sequence[Examined], folder: Path) -> list[Path]:
    """Write compare.csv, compare.html and the pictures.

    Args:
        comparison: what `summarize` returns.
        examined: what `examine_groups` returns.
        folder: takes them; made if missing.

    Returns:
        The files: compare.csv, compare.html, and as PNG compare (quality and kept noise), curves
        (over every axis), selection and scores, where there is something to draw.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "compare.csv", folder / "compare.html"]
    write_csv(comparison, written[0])
    written[1].write_text(render(comparison, examined), encoding="utf-8")
    for name, shown in _pictures(comparison, examined).items():
        if shown:
            written.append(folder / f"{name}.png")
            figures.write_png(shown, written[-1])
    return written


def _pictures(comparison: Comparison, examined: Sequence[Examined]) -> dict[str, list[Panel]]:
    """The panels of each picture; empty where the runs have nothing for it."""
    axes = figures.axes_of(comparison)
    selection = figures.selection(comparison, {run.label: run.selected for run in examined})
    curves = {axis.metric: figures.curves(comparison, axis) for axis in axes}
    kept = quantity(KEPT_ALTERED).label
    first = [found[0] for axis, found in curves.items() if found and axis in (axes[0].metric, WALL)]
    return {
        "compare": first + [panel for panel in selection if panel.y_label == kept],
        "curves": [panel for found in curves.values() for panel in found],
        "selection": selection,
        "scores": [p for run in examined for p in figures.histograms(run.label, run.selected)],
    }


def render(comparison: Comparison, examined: Sequence[Examined]) -> str:
    """The page.

    Args:
        comparison: what `summarize` returns.
        examined: what one run of each group selected, of those that keep a ledger.
    """
    # Imported here, so that the other commands start without them.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415
    from markupsafe import Markup  # noqa: PLC0415

    numbers = count()

    def drawn(panels: Sequence[Panel]) -> list[Any]:
        return [Markup(figures.to_svg(panel, f"p{next(numbers)}")) for panel in panels]

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    selected = {run.label: run.selected for run in examined}
    values: dict[str, Any] = {
        "title": f"{quantity(comparison.quality).title.capitalize()} by strategy",
        "style": Markup(_resource("page.css")),
        "task": describe_task(comparison),
        "groups": _legend(comparison),
        "sentences": sentences(comparison),
        "notes": comparison.notes,
        "grids": grids(comparison),
        "axes": [
            {"title": axis.title, "panels": drawn(figures.curves(comparison, axis))}
            for axis in figures.axes_of(comparison)
        ],
        "selection": drawn(figures.selection(comparison, selected)),
        "examined": [(run, drawn(figures.histograms(run.label, run.selected))) for run in examined],
        "baseline": comparison.baseline,
    }
    return environment.from_string(_resource("page.html")).render(values) + "\n"


def _resource(name: str) -> str:
    return files("selectflow.report").joinpath(name).read_text("utf-8")


def _legend(comparison: Comparison) -> list[Mapping[str, Any]]:
    """Name, number of seeds, colour and dashes of each group."""
    return [
        {
            "name": f"{row.label} ({row.num_runs} seed{'s' if row.num_runs > 1 else ''})",
            "colour": place % len(figures.COLOURS),
            "dash": figures.DASHES[place % len(figures.DASHES)],
        }
        for place, row in enumerate(comparison.rows)
    ]


def describe_task(comparison: Comparison) -> str:
    """Number of runs, data, model, and the settings of both that are not the defaults.

    Settings of text are those of text alone, and of label noise those of digits.
    """
    from selectflow.run.sections import DataConfig, ModelConfig  # noqa: PLC0415

    sections = {"data": DataConfig(), "model": ModelConfig()}
    defaults = dict(flat({key: of.model_dump(mode="json") for key, of in sections.items()}))
    name = comparison.task.get("data.name")
    unused = tuple(
        prefix
        for prefix, of in {"data.text.": "text", "data.label_noise": "digits"}.items()
        if name != of
    )
    parts = [
        f"{key} {value}"
        for key, value in comparison.task.items()
        if value is not None and not key.startswith(unused)
        if key in ("data.name", "model.name") or value != defaults.get(key)
    ]
    return "; ".join([f"{len(comparison.all_runs)} runs", *([", ".join(parts)] if parts else [])])


def to_report(comparison: Comparison, written: list[Path]) -> Report:
    """The comparison as a W&B run logs it.

    Args:
        comparison: what `summarize` returns.
        written: the files of `write_outputs`.
    """
    head, rows = to_records(comparison)
    charts = {
        f"over_{axis.metric.rpartition('/')[2]}/{panel.title.replace(' ', '_')}": Chart(
            panel.y_label,
            panel.x_label,
            {line.label: (line.curve.x.tolist(), line.curve.mean.tolist()) for line in panel.lines},
        )
        for axis in figures.axes_of(comparison)
        for panel in figures.curves(comparison, axis)
    }
    return Report(
        config={
            "runs": [run.where for run in comparison.all_runs],
            "baseline": comparison.baseline,
            "quality": comparison.quality,
            "notes": comparison.notes,
            "task": comparison.task,
        },
        summary={
            f"{record[0]}/{name}": value
            for record in rows
            for name, value in zip(head[1:], record[1:], strict=True)
            if value is not None
        },
        tables={"summary": (head, rows)},
        charts=charts,
        files=written,
    )
