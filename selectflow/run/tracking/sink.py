"""W&B as a sink: runs, their samples and artifacts, and comparisons. Nothing is read from it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

# W&B draws a metric over one axis. Evaluations are also sent under these names, so that they are
# drawn over all three; `train/step` is the axis of the names they have in metrics.jsonl.
_AXES = {"by_samples": "data/samples_seen", "by_seconds": "perf/wall_s"}
_EVALUATIONS = ("test/", "target/")


Mode = Literal["offline", "online"]


def start(options: dict[str, Any], mode: Mode, timeout_s: float) -> Any:
    """A W&B run; offline where W&B cannot be reached, None where it cannot start.

    Args:
        options: of `wandb.init`; "id" None starts a new run.
        mode: online or offline.
        timeout_s: seconds to start, and again to upload the rest at the end.
    """
    try:
        return _open(options, mode, timeout_s)
    except Exception as error:  # W&B raises anything, and none of it is worth losing a run
        if mode == "online":
            warn(
                "W&B cannot be reached, the run is tracked offline; `wandb sync` uploads it", error
            )
            return start(options, "offline", timeout_s)
        warn("W&B cannot start and is switched off, the run goes on without it", error)
        return None


def _open(options: dict[str, Any], mode: Mode, timeout_s: float) -> Any:
    # Imported here alone: a run without W&B does not pay for it.
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True))  # else the login below asks the server who we are
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
    run.define_metric("train/step")
    for axis in _AXES.values():
        run.define_metric(axis, step_metric="train/step")
    run.define_metric("*", step_metric="train/step")
    return run


def warn(message: str, error: Exception) -> None:
    """Warn once, with the first line of an error of W&B."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    warnings.warn(f"{message} ({reason})", stacklevel=2)


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

    if not rows:
        return
    pictures: dict[str, list[Any]] = {}
    table = wandb.Table(columns=["sample", *(column for column in rows[0] if column != "png")])
    for row in rows:
        facts = {column: value for column, value in row.items() if column != "png"}
        shown: Any = facts.get("text", "")
        if row.get("png") is not None:
            shown = _image(row["png"], str(facts.get("facts", "")))
            pictures.setdefault(str(facts.get("end", "all")), []).append(shown)
        table.add_data(shown, *facts.values())
    run.log({f"{name}/{end}": images for end, images in pictures.items()})
    run.log({f"{name}/table": table})


def _image(png: bytes, caption: str) -> Any:
    import wandb  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    with Image.open(io.BytesIO(png)) as image:
        return wandb.Image(image.copy(), caption=caption)


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
