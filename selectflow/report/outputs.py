"""All files of a comparison: table, pictures and the page."""

from __future__ import annotations

from pathlib import Path

from selectflow.report import panels
from selectflow.report.chart import write_png
from selectflow.report.compare import Comparison
from selectflow.report.page import write_page
from selectflow.report.panels import Histogram, Panel
from selectflow.report.quantities import KEPT_ALTERED, WALL, quantity
from selectflow.report.samples import Examined
from selectflow.report.table import to_records, write_csv
from selectflow.run.wandb import Chart, Report


def write_outputs(comparison: Comparison, examined: list[Examined], folder: Path) -> list[Path]:
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
    write_page(comparison, examined, written[1])
    for name, shown in pictures(comparison, examined).items():
        if shown:
            written.append(folder / f"{name}.png")
            write_png(shown, written[-1])
    return written


def to_report(comparison: Comparison, files: list[Path]) -> Report:
    """The comparison as a W&B run logs it.

    Args:
        comparison: what `summarize` returns.
        files: what `write_outputs` wrote.
    """
    head, rows = to_records(comparison)
    charts = {
        f"over_{axis.metric.rpartition('/')[2]}/{panel.title.replace(' ', '_')}": Chart(
            panel.y_label,
            panel.x_label,
            {line.label: (line.curve.x.tolist(), line.curve.mean.tolist()) for line in panel.lines},
        )
        for axis in panels.axes_of(comparison)
        for panel in panels.curves(comparison, axis)
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
        files=files,
    )


def pictures(
    comparison: Comparison, examined: list[Examined]
) -> dict[str, list[Panel] | list[Histogram]]:
    """The panels of each picture; empty where the runs have nothing for it."""
    axes = panels.axes_of(comparison)
    selection = panels.selection(comparison)
    selection += panels.domains(
        {run.label: [run.selected] for run in examined}, list(comparison.runs)
    )
    curves = {axis.metric: panels.curves(comparison, axis) for axis in axes}
    kept = quantity(KEPT_ALTERED).label
    first = [found[0] for axis, found in curves.items() if found and axis in (axes[0].metric, WALL)]
    return {
        "compare": first + [panel for panel in selection if panel.y_label == kept],
        "curves": [panel for found in curves.values() for panel in found],
        "selection": selection,
        "scores": [p for run in examined for p in panels.histograms(run.label, run.selected)],
    }
