"""A comparison as a W&B run: its tables, charts, pictures, page and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selectflow.run.tracking import sink


@dataclass(frozen=True)
class Chart:
    """Lines over one axis: of each key its x and y."""

    title: str
    x_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Report:
    """What is logged of a comparison.

    Attributes:
        config: which runs, and how they are compared.
        summary: values for the run's summary, as "uniform/quality".
        tables: head and rows by name.
        charts: drawn by W&B, by name.
        files: pictures and the page, shown and kept in an artifact, and what else is kept.
    """

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]
    charts: Mapping[str, Chart]
    files: Sequence[Path]


def log_report(
    report: Report,
    folder: Path,
    *,
    mode: Literal["online", "offline"],
    project: str = "selectflow",
    group: str | None = None,
    timeout_s: float = 30.0,
) -> str | None:
    """Log a comparison as a run of job type "compare".

    Args:
        report: what to log.
        folder: takes W&B's own files, under wandb/.
        mode: online (offline if W&B cannot be reached) or offline, for `wandb sync`.
        project: W&B project.
        group: W&B group, that of the runs.
        timeout_s: seconds that W&B may take to start, and again to upload the rest at the end.

    Returns:
        The id of the run; None where W&B failed, which is warned of.
    """
    options = {
        "dir": str(folder),
        "config": dict(report.config),
        "name": "compare",
        "project": project,
        "group": group,
        "job_type": "compare",
        "tags": ["compare"],
        "id": None,
    }
    run = sink.start(options, mode, timeout_s)
    if run is None:
        return None
    try:
        _send(run, report)
    except Exception as error:  # W&B raises anything; the files are written already
        sink.warn("W&B failed, the comparison is in its files alone", error)
        return None
    return str(run.id)


def _send(run: Any, report: Report) -> None:
    import wandb  # noqa: PLC0415

    logged: dict[str, Any] = {}
    for name, (head, rows) in report.tables.items():
        logged[name] = wandb.Table(columns=list(head), data=[list(row) for row in rows])
    for name, chart in report.charts.items():
        x, y = zip(*chart.lines.values(), strict=True)
        keys = list(chart.lines)
        logged[name] = wandb.plot.line_series(x, y, keys, chart.title, chart.x_label)
    files = wandb.Artifact(f"comparison-{run.id}", type="comparison")
    for path in report.files:
        files.add_file(str(path))
        if path.suffix == ".png":
            logged[f"pictures/{path.stem}"] = wandb.Image(str(path))
        elif path.suffix == ".html":
            logged["page"] = wandb.Html(path.read_text("utf-8"), inject=False)
    run.log(logged)
    run.summary.update(dict(report.summary))
    run.log_artifact(files)
    run.finish()
