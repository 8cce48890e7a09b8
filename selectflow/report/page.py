"""The files of a comparison: tables, pictures, and one HTML page that opens without a network."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from selectflow.report import figures
from selectflow.report.compare import Comparison
from selectflow.report.figures import EDGES, Curve, Panel
from selectflow.report.groups import Groups, strategy
from selectflow.report.runs import KEPT_ALTERED, Points, Run
from selectflow.report.tables import grids, quantity, sentences, to_records, write_csv
from selectflow.run.ledger import rank_samples, read_scored, sum_samples
from selectflow.run.metrics import WALL_S
from selectflow.run.samples import Shown, extremes
from selectflow.run.sections import DataConfig, ModelConfig
from selectflow.run.wandb import Chart, Report
from selectflow.run.yaml import flat

_STRETCHES = 40  # of a run, for shares over steps

Metadata = Mapping[str, Mapping[str, Any]]


def write_outputs(comparison: Comparison, examined: Sequence[Examined], folder: Path) -> list[Path]:
    """Write compare.csv, compare.html and the pictures into a folder, made if missing.

    Returns:
        The files: compare.csv, compare.html, and as PNG compare (quality and kept noise), curves
        (over every axis), selection and scores, where there is something to draw.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "compare.csv", folder / "compare.html"]
    write_csv(to_records(comparison), written[0])
    written[1].write_text(render(comparison, examined), encoding="utf-8")
    for name, shown in _pictures(comparison, examined).items():
        if shown:
            written.append(folder / f"{name}.png")
            figures.write_png(shown, written[-1])
    return written


def _pictures(comparison: Comparison, examined: Sequence[Examined]) -> dict[str, list[Panel]]:
    """The panels of each picture; empty where the runs have nothing for it."""
    axes = figures.axes_of(comparison)
    selection = figures.selection(comparison, _shares_of(examined))
    curves = {axis.metric: figures.curves(comparison, axis) for axis in axes}
    kept = quantity(KEPT_ALTERED).label
    first = [
        found[0] for axis, found in curves.items() if found and axis in (axes[0].metric, WALL_S)
    ]
    return {
        "compare": first + [panel for panel in selection if panel.y_label == kept],
        "curves": [panel for found in curves.values() for panel in found],
        "selection": selection,
        "scores": [panel for run in examined for panel in _histograms(run)],
    }


def render(comparison: Comparison, examined: Sequence[Examined]) -> str:
    """The page, with what one run of each group selected, of those that keep a ledger."""
    return fill("page.html", values_of(comparison, examined))


def fill(name: str, values: Mapping[str, Any]) -> str:
    """A template of this folder with its values; text in them is escaped."""
    # Imported here, so that the other commands start without it.
    from jinja2 import Environment, FunctionLoader, StrictUndefined  # noqa: PLC0415

    folder = files("selectflow.report")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        loader=FunctionLoader(lambda file: folder.joinpath(file).read_text("utf-8")),
    )  # fmt: skip
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    style = folder.joinpath("page.css").read_text("utf-8")
    return environment.get_template(name).render(values, style=_markup(style)) + "\n"


def _markup(text: str) -> Any:
    """Text that is not escaped: it is ours."""
    from markupsafe import Markup  # noqa: PLC0415

    return Markup(text)


def values_of(
    comparison: Comparison,
    examined: Sequence[Examined],
    to_svg: Callable[[Panel, str], str] = figures.to_svg,
) -> dict[str, Any]:
    """The values of page.html; `to_svg` draws a panel, as `figures.to_svg` does."""
    numbers = count()

    def drawn(panels: Sequence[Panel]) -> list[Any]:
        return [_markup(to_svg(panel, f"p{next(numbers)}")) for panel in panels]

    return {
        "title": f"{quantity(comparison.quality).title.capitalize()} by strategy",
        "task": describe_task(comparison),
        "groups": _legend(comparison),
        "sentences": sentences(comparison),
        "notes": comparison.notes,
        "grids": grids(comparison),
        "axes": [
            {"title": axis.title, "panels": drawn(figures.curves(comparison, axis))}
            for axis in figures.axes_of(comparison)
        ],
        "selection": drawn(figures.selection(comparison, _shares_of(examined))),
        "examined": [(run, drawn(_histograms(run))) for run in examined],
        "baseline": comparison.baseline,
    }


def _shares_of(examined: Sequence[Examined]) -> dict[str, dict[str, Points]]:
    return {run.label: run.selected.domains for run in examined}


def _histograms(run: Examined) -> list[Panel]:
    return figures.histograms(run.label, run.selected.histograms)


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
    sections = {"data": DataConfig(), "model": ModelConfig()}
    defaults = dict(flat({key: of.model_dump(mode="json") for key, of in sections.items()}))
    name = comparison.task.get("data.name")
    owners = {"data.text.": "text", "data.label_noise": "digits"}
    unused = tuple(prefix for prefix, owner in owners.items() if name != owner)
    parts = [
        f"{key} {value}"
        for key, value in comparison.task.items()
        if value is not None and not key.startswith(unused)
        if key in ("data.name", "model.name") or value != defaults.get(key)
    ]
    num = len(comparison.all_runs)
    runs = f"{num} run{'s' if num > 1 else ''}"
    return "; ".join([runs, *([", ".join(parts)] if parts else [])])


def to_report(comparison: Comparison, written: list[Path]) -> Report:
    """The comparison, and the files that `write_outputs` wrote of it, as a W&B run logs them."""
    records = to_records(comparison)
    groups = {run.config.get("track", {}).get("group") for run in comparison.all_runs}
    charts = {
        f"over_{axis.metric.rpartition('/')[2]}/{panel.title.replace(' ', '_')}": Chart(
            panel.y_label, panel.x_label, lines
        )
        for axis in figures.axes_of(comparison)
        for panel in figures.curves(comparison, axis)
        if (lines := {line.label: p for line in panel.lines if (p := _finite(line.curve))[0]})
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
            f"{record['label']}/{name}": value
            for record in records
            for name, value in record.items()
            if value is not None and name != "label"
        },
        tables={"summary": (list(records[0]), [list(record.values()) for record in records])},
        charts=charts,
        files=written,
        group=groups.pop() if len(groups) == 1 else None,
    )


def _finite(curve: Curve) -> tuple[list[float], list[float]]:
    """The points of a line that are numbers."""
    known = np.isfinite(curve.mean)
    return curve.x[known].tolist(), curve.mean[known].tolist()


# --- what runs selected -----------------------------------------------------------------------


@dataclass(frozen=True)
class Selected:
    """What a run selected.

    Attributes:
        ranked: an Arrow table of its samples, highest mean score first; see `rank_samples`.
        histograms: kind of candidate -> counts in the bins of `EDGES`: kept and rejected, and
            where it is known altered and clean.
        domains: domain -> (step, share among the kept), a point for each stretch of the run.
    """

    ranked: Any
    histograms: dict[str, npt.NDArray[np.int64]]
    domains: dict[str, Points] = field(default_factory=dict)


@dataclass(frozen=True)
class Examined:
    """What one run selected, and its extremes.

    Attributes:
        label: its group.
        run: the run.
        selected: from its ledger.
        best: samples of the highest mean score, highest first; empty where the data are gone.
        worst: of the lowest, lowest first.
        note: why no samples are shown; "" where they are.
    """

    label: str
    run: Run
    selected: Selected
    best: list[Shown]
    worst: list[Shown]
    note: str = ""


def examine_groups(groups: Groups) -> list[Examined]:
    """What the first run of each group selected, of those that keep a ledger; not of uniform."""
    firsts = {label: runs[0] for label, runs in groups.items()}
    scoring = {label: run for label, run in firsts.items() if strategy(run) != "uniform"}
    found = [examine(label, run) for label, run in scoring.items()]
    return [examined for examined in found if examined]


def examine(label: str, run: Run, num: int = 8) -> Examined | None:
    """What a run of a group selected, with the `num` samples of highest and of lowest score.

    None for a run without a ledger, as one at W&B.
    """
    from selectflow.data import DataError, read_metadata  # noqa: PLC0415

    if run.folder is None:
        return None
    best: list[Shown] = []
    worst: list[Shown] = []
    try:
        root = DataConfig.model_validate(run.config.get("data", {})).directory
        metadata = read_metadata(root, "train", max_errors=math.inf)
        selected = read_selected(run.folder, metadata)
        if selected is not None:
            best, worst = extremes(selected.ranked, root, metadata, num)
        note = "" if best else f"samples are not shown: {root} holds other ones"
    except ValidationError:  # of a program of its own
        selected = read_selected(run.folder, {})
        note = "samples are not shown: the configuration names no data that can be read here"
    except DataError as error:
        selected = read_selected(run.folder, {})
        note = f"samples are not shown: {error}"
    return Examined(label, run, selected, best, worst, note) if selected else None


def read_selected(run_dir: Path, metadata: Metadata) -> Selected | None:
    """What a run selected; None where it recorded nothing.

    Args:
        run_dir: its directory.
        metadata: sample key -> what the writer of the data recorded: "altered", "domain".
    """
    from pyarrow import array, string  # noqa: PLC0415
    from pyarrow.compute import index_in  # noqa: PLC0415

    keys = array(list(metadata), string())
    # one more, the last, of candidates that the metadata do not name: place -1
    altered = np.array([*(bool(made.get("altered")) for made in metadata.values()), False])
    named = [str(made.get("domain", "")) for made in metadata.values()]
    domains, codes = np.unique([*named, ""], return_inverse=True)
    counts: dict[str, npt.NDArray[np.int64]] = {}
    sums, kept_domains = [], []
    tells_altered = any("altered" in made for made in metadata.values())
    for table in read_scored(run_dir):
        sums.append(sum_samples(table))
        place = index_in(table["key"], value_set=keys).fill_null(-1).to_numpy()
        kept = table["kept"].to_numpy()
        kinds = {"kept": kept, "rejected": ~kept}
        if tells_altered:
            kinds |= {"altered": altered[place], "clean": ~altered[place]}
        scores = table["score"].to_numpy().clip(EDGES[0], EDGES[-1])
        for name, chosen in kinds.items():
            counts[name] = counts.get(name, 0) + np.histogram(scores[chosen], EDGES)[0]
        known = kept & (codes[place] != codes[-1])
        kept_domains.append((table["step"].to_numpy()[known], codes[place[known]]))
    if not any(len(part) for part in sums):
        return None
    return Selected(rank_samples(sums), counts, _shares(domains.tolist(), kept_domains))


def _shares(
    names: list[str], kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
) -> dict[str, Points]:
    """Share of each domain in stretches of steps, from steps and domains of kept candidates."""
    steps, domains = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    if not steps.size:
        return {}
    distinct, place = np.unique(steps, return_inverse=True)
    size = -(-len(distinct) // _STRETCHES)
    counts = np.zeros((-(-len(distinct) // size), len(names)))
    np.add.at(counts, (place // size, domains), 1)
    shares = counts / counts.sum(1, keepdims=True)
    middles = [float(distinct[at : at + size].mean()) for at in range(0, len(distinct), size)]
    return {
        name: list(zip(middles, shares[:, i].tolist(), strict=True))
        for i, name in enumerate(names)
        if counts[:, i].any()
    }
