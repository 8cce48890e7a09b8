"""The comparison as one HTML page that opens anywhere: no network, nothing beside the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from selectflow.report import panels, svg
from selectflow.report.compare import Comparison
from selectflow.report.panels import Histogram, Panel
from selectflow.report.quantities import quantity
from selectflow.report.samples import Examined
from selectflow.report.table import grids


def render(comparison: Comparison, examined: Sequence[Examined]) -> str:
    """The page.

    Args:
        comparison: what `summarize` returns.
        examined: what one run of each group selected, of those that keep a ledger.
    """
    # Imported here, so that the other commands start without them.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415
    from markupsafe import Markup  # noqa: PLC0415

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    names = list(comparison.runs)
    pictures = [*panels.selection(comparison), *_domains(examined, names)]
    values: dict[str, Any] = {
        "title": f"{quantity(comparison.quality).title.capitalize()} by strategy",
        "style": Markup(_resource("page.css")),
        "script": Markup(_resource("page.js")),
        "task": _task(comparison),
        "names": panels.group_names(comparison),
        "swatches": [Markup(svg.swatch(place)) for place in range(len(names))],
        "notes": comparison.notes,
        "grids": grids(comparison),
        "axes": [
            {"title": axis.title, "panels": _drawn(panels.curves(comparison, axis))}
            for axis in panels.axes_of(comparison)
        ],
        "selection": _drawn(pictures),
        "examined": [_examined(run) for run in examined],
        "baseline": comparison.baseline,
    }
    return environment.from_string(_resource("page.html")).render(values) + "\n"


def write_page(comparison: Comparison, examined: Sequence[Examined], path: Path) -> None:
    """Write the page of `render`.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(render(comparison, examined), encoding="utf-8")


def _resource(name: str) -> str:
    return files("selectflow.report").joinpath(name).read_text("utf-8")


def _task(comparison: Comparison) -> str:
    parts = [f"{key} {value}" for key, value in comparison.task.items() if value is not None]
    num = sum(len(members) for members in comparison.runs.values())
    return f"{num} runs; {', '.join(parts)}" if parts else f"{num} runs"


def _drawn(found: Sequence[Panel | Histogram]) -> list[Any]:
    from markupsafe import Markup  # noqa: PLC0415

    return [Markup(svg.draw(panel)) for panel in found]  # draw escapes


def _domains(examined: Sequence[Examined], names: Sequence[str]) -> list[Panel]:
    return panels.domains({run.label: [run.selected] for run in examined}, names)


def _examined(run: Examined) -> Mapping[str, Any]:
    from markupsafe import Markup  # noqa: PLC0415

    found = panels.histograms(run.label, run.selected)
    legends = [
        [(Markup(svg.swatch(line.place)), line.label) for line in panel.lines] for panel in found
    ]
    return {
        "label": run.label, "where": run.run.where, "note": run.note, "best": run.best,
        "worst": run.worst, "histograms": list(zip(_drawn(found), legends, strict=True)),
    }  # fmt: skip
