"""Weights & Biases: a run and its samples, a comparison of runs, and a run read back.

The only file of a run that imports wandb, and only where W&B is used: a run without it does not
pay for the import. W&B raises anything. An error of its own costs a warning and never a run.

Arguments of the caller override W&B's environment variables and settings files, and these our
defaults, as in `wandb.init`. But "disabled" from any of them wins, and "offline" over "online".
"""

from __future__ import annotations

import io
import os
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selectflow.run.metrics import SAMPLES_SEEN, STEP, WALL_S

# W&B draws a metric over one axis: the step. Evaluations are sent again under these prefixes, to be
# drawn over samples and over seconds, too.
_AXES = {"by_samples": SAMPLES_SEEN, "by_seconds": WALL_S}
_EVALUATIONS = ("test/", "target/")


NAME = "W&B"
Mode = Literal["disabled", "offline", "online"]
_PROJECT = "selectflow"
# WANDB_MODE -> mode; "run" and "dryrun" are W&B's earlier names, "shared" is one run of many nodes
_MODES: dict[str, Mode] = {
    "disabled": "disabled", "offline": "offline", "online": "online",
    "dryrun": "offline", "run": "online", "shared": "online",
}  # fmt: skip


def mode_of(asked: Mode | None) -> Mode:
    """The mode used, from the one the caller asks for, if any, and WANDB_MODE."""
    text = os.environ.get("WANDB_MODE", "").strip().lower()
    said = _MODES.get(text)
    if text and said is None:
        warnings.warn(
            f"WANDB_MODE must be one of {', '.join(_MODES)}, got {text!r}; W&B is switched off",
            stacklevel=2,
        )
        return "disabled"
    return _settled(asked or said or "disabled", said)


def _settled(asked: Mode, said: str | None) -> Mode:
    if "disabled" in (asked, said):
        return "disabled"
    return "offline" if "offline" in (asked, said) else "online"


def start(options: dict[str, Any], mode: Mode, timeout_s: float) -> Any:
    """A W&B run; offline where W&B cannot be reached, None where it cannot start or is off.

    Args:
        options: of `wandb.init`; "id" None starts a new run, None elsewhere is W&B's own setting.
            "dir" gives way to WANDB_DIR.
        mode: online or offline.
        timeout_s: of `Tracker`.
    """
    try:
        return _open(options, mode, timeout_s)
    except Exception as error:
        if mode == "online":
            warn(
                "W&B cannot be reached, the run is tracked offline; `wandb sync` uploads it", error
            )
            return start(options, "offline", timeout_s)
        warn("W&B cannot start and is switched off, the run goes on without it", error)
        return None


def _open(options: dict[str, Any], mode: Mode, timeout_s: float) -> Any:
    import wandb  # noqa: PLC0415

    # silent: else the login below asks the server who we are
    known = wandb.setup(wandb.Settings(silent=True)).settings
    settled = _settled(mode, known.mode)  # `wandb offline` and `wandb disabled` count
    if settled == "disabled":
        return None
    mode, env = settled, os.environ
    project = options["project"] or env.get("WANDB_PROJECT") or known.project or _PROJECT
    options = options | {"project": project, "dir": env.get("WANDB_DIR") or options["dir"]}
    # At a terminal, wandb.init would stop the run to ask for a key.
    if mode == "online" and not wandb.run and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no login found; set WANDB_API_KEY or run `wandb login`")
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        init_timeout=timeout_s,
        finish_timeout=timeout_s,
        reinit="create_new",  # an earlier run of this process that died must not be continued
    )
    # Offline there is nothing to resume: `wandb sync` joins runs of one id.
    resume: Literal["allow"] | None = "allow" if options["id"] and mode == "online" else None
    run = wandb.init(mode=mode, settings=settings, resume=resume, **options)
    run.define_metric(STEP)
    for axis in _AXES.values():
        run.define_metric(axis, step_metric=STEP)
    run.define_metric("*", step_metric=STEP)
    return run


def warn(message: str, error: Exception) -> None:
    """Warn once, with the first line of an error of W&B, or of another sink."""
    warnings.warn(f"{message} ({_first_line(error)})", stacklevel=2)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def log(run: Any, metrics: Mapping[str, float | int]) -> None:
    """Send metrics of one step, evaluations over samples and seconds too."""
    again: dict[str, float | int] = {}
    for prefix, axis in _AXES.items():
        if axis in metrics:
            found = {n: v for n, v in metrics.items() if n.startswith(_EVALUATIONS)}
            again |= {f"{prefix}/{name}": value for name, value in found.items()}
            for name in found:
                run.define_metric(f"{prefix}/{name}", step_metric=axis)
    run.log(dict(metrics) | again)


def show(run: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Send samples as a table, and their pictures by "end" (highest, lowest) as media."""
    import wandb  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    if not rows:
        return
    pictures: dict[str, list[Any]] = {}
    table = wandb.Table(columns=["sample", *(column for column in rows[0] if column != "png")])
    for row in rows:
        facts = {column: value for column, value in row.items() if column != "png"}
        shown: Any = facts.get("text", "")
        if row.get("png") is not None:
            with Image.open(io.BytesIO(row["png"])) as image:
                shown = wandb.Image(image.copy(), caption=str(facts.get("facts", "")))
            pictures.setdefault(str(facts.get("end", "all")), []).append(shown)
        table.add_data(shown, *facts.values())
    run.log({f"{name}/{end}": images for end, images in pictures.items()})
    run.log({f"{name}/table": table})


def finish(run: Any, summary: Mapping[str, Any], run_dir: Path) -> None:
    """Send the summary and the artifacts of a run, and close it.

    Of a finished run the ledger is one artifact; what offline selection left, the manifest of the
    selected shards, their scores and what they took, another. An earlier end may be resumed from,
    and its files change.
    """
    run.summary.update(dict(summary))
    if summary.get("status") == "finished":
        _keep(run, "ledger", sorted((run_dir / "selection").glob("*.parquet")))
        manifest = run_dir / "selected" / "manifest.json"
        if manifest.is_file():
            files = [manifest, manifest.with_name("scores.parquet"), run_dir / "offline.json"]
            _keep(run, "selected-shards", [path for path in files if path.is_file()])
    run.finish()


def _keep(run: Any, kind: str, paths: Sequence[Path]) -> None:
    """Send files as an artifact. They are uploaded from where they are, not copied before."""
    import wandb  # noqa: PLC0415

    if not paths:
        return
    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for path in paths:
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


# --- a comparison of runs ----------------------------------------------------------------------


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
        group: W&B group of all the runs, if they have one.
    """

    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]
    charts: Mapping[str, Chart]
    files: Sequence[Path]
    group: str | None = None


def log_report(
    report: Report,
    folder: Path,
    *,
    mode: Literal["online", "offline"],
    project: str | None = None,
    timeout_s: float = 30.0,
) -> str | None:
    """Log a comparison as a run of job type "compare".

    Args:
        report: what to log.
        folder: takes W&B's own files, under wandb/.
        mode: online (offline if W&B cannot be reached) or offline, for `wandb sync`.
        project: W&B project; None: WANDB_PROJECT, or selectflow.
        timeout_s: seconds that W&B may take to start, and again to upload the rest at the end.

    Returns:
        The id of the run; None where W&B failed or is off, which is warned of.
    """
    used = mode_of(mode)
    if used == "disabled":
        warnings.warn("W&B is off by WANDB_MODE, the comparison is in its files", stacklevel=2)
        return None
    options = {
        "dir": str(folder), "config": dict(report.config), "name": "compare", "project": project,
        "group": report.group, "job_type": "compare", "tags": ["compare"], "id": None,
    }  # fmt: skip
    run = start(options, used, timeout_s)
    if run is None:
        return None
    try:
        _send(run, report)
    except Exception as error:  # the files are written already
        warn("W&B failed, the comparison is in its files alone", error)
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


# --- a run read back ----------------------------------------------------------------------


class TrackingError(ValueError):
    """A W&B run that cannot be read; the message says why and what to do."""


@dataclass(frozen=True)
class RemoteRun:
    """A run at W&B: its configuration, all its rows of metrics, summary, and W&B's state of it."""

    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    state: str


def download_run(path: str, timeout_s: int = 20) -> RemoteRun:
    """A run at W&B.

    Args:
        path: entity/project/run_id.

    Raises:
        TrackingError: no key, no network, or no such run.
    """
    import wandb  # noqa: PLC0415

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    try:
        if not wandb.login(prompt=False, verify=False):
            raise TrackingError(
                f"W&B must know you to read {path}, got no key; set WANDB_API_KEY or run "
                "`wandb login`, or name run directories"
            )
        _reach(settings.base_url, timeout_s)
        run = wandb.Api(timeout=timeout_s).run(path)
        history = [dict(row) for row in run.scan_history()]
        return RemoteRun(dict(run.config), history, dict(run.summary_metrics), str(run.state))
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"W&B run must be one that can be read, got {path} ({_first_line(error)}); check the "
            "path, the key and the network, or name run directories"
        ) from error


def _reach(url: str, timeout_s: float) -> None:
    """Connect to a server and hang up; where there is none, W&B's client retries for minutes."""
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if address.scheme in proxies and not urllib.request.proxy_bypass(address.hostname or ""):
        return  # only the proxy knows
    port = address.port or {"https": 443, "http": 80}[address.scheme]
    socket.create_connection((address.hostname or "", port), timeout_s).close()
