"""What a run reports while it trains: metrics.jsonl, summary.json and W&B."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from selectflow.core.files import size_on_disk
from selectflow.run import wandb
from selectflow.run.metrics import STEP

Mode = Literal["disabled", "offline", "online"]


class Tracker:
    """The metrics of a run, kept in its directory and copied to W&B.

    metrics.jsonl is the source of truth. W&B is a sink of it: when it fails, it is switched off
    with one warning and the run goes on. An error in writing our own files always raises.

    Args:
        run_dir: directory of the run; made if it does not exist.
        config: the resolved configuration in plain values.
        name: name of the run in W&B.
        mode: disabled, offline (no login needed) or online (offline if W&B cannot be reached).
        project: W&B project.
        group: W&B group, the runs that are compared.
        job_type: W&B job type.
        tags: W&B tags.
        run_id: id of an earlier W&B run that this one continues; None starts a new one.
        timeout_s: seconds that W&B may take to start, and again to upload the rest at the end.

    Raises:
        OSError: the directory cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        *,
        name: str,
        mode: Mode = "disabled",
        project: str = "selectflow",
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        run_id: str | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = run_dir / "metrics.jsonl"
        self._summary = run_dir / "summary.json"
        self._last: dict[str, Any] = {}
        self._resumed_at: list[int] = []  # steps of the last evaluation before each resumption
        _cut_torn_line(self._metrics)
        options = {
            "dir": str(run_dir),
            "config": dict(config),
            "name": name,
            "project": project,
            "group": group,
            "job_type": job_type,
            "tags": list(tags),
            "id": run_id,
        }
        self._wandb = None if mode == "disabled" else wandb.start(options, mode, timeout_s)
        self.run_id: str | None = self._wandb.id if self._wandb else None

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append one line to metrics.jsonl, then send it to W&B.

        Args:
            step: optimizer steps done.
            metrics: values by metric name; a value that is not finite is written as null.

        Raises:
            OSError: the line cannot be written; it names the file.
            TypeError: a value is not a number.
        """
        record = {STEP: step} | {key: _number(key, value) for key, value in metrics.items()}
        write_text(self._metrics, json.dumps(record, allow_nan=False) + "\n", mode="a")
        self._last |= record
        finite = {key: value for key, value in record.items() if value is not None}
        self._to_wandb(lambda run: wandb.log(run, finite))

    def state_dict(self) -> dict[str, Any]:
        """The W&B run and how long metrics.jsonl is, all of it on the disk."""
        return {
            "run_id": self.run_id,
            "metrics_bytes": size_on_disk(self._metrics),
            "last": dict(self._last),
            "resumed_at": list(self._resumed_at),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`; later lines of metrics.jsonl are cut off."""
        os.truncate(self._metrics, state["metrics_bytes"])
        self._last = dict(state["last"])
        self._resumed_at = [*state.get("resumed_at", ()), self._last.get(STEP, 0)]

    def show(
        self, samples: Callable[[], Sequence[Mapping[str, Any]]], name: str = "samples"
    ) -> None:
        """Send samples to W&B, as pictures or text; without W&B they are not asked for.

        Args:
            samples: call for rows of equal keys: plain values, and maybe under "png" a picture.
            name: what they are logged under.
        """
        self._to_wandb(lambda run: wandb.show(run, samples(), name))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json and close W&B, which takes the ledger and what was selected along.

        Args:
            summary: what to add to the last logged value of each metric, as "status" and "steps".

        Raises:
            OSError: the file cannot be written; it names the file.
        """
        values = self._last | {
            key: _number(key, value) if isinstance(value, float) else value
            for key, value in summary.items()
        }
        if self._resumed_at:
            values["resumed_at"] = self._resumed_at
        # Written beside and then renamed: a reader sees the whole summary or none.
        beside = self._summary.with_name("summary.json.tmp")
        write_text(beside, json.dumps(values, indent=2, allow_nan=False) + "\n", mode="w")
        os.replace(beside, self._summary)
        self._to_wandb(lambda run: wandb.finish(run, values, self._summary.parent))
        self._wandb = None

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # W&B raises anything, and none of it is worth losing a run
            self._wandb = None
            wandb.warn(
                f"W&B failed and is switched off, the run goes on with {self._metrics}", error
            )


def _number(name: str, value: Any) -> float | int | None:
    """A plain number of a metric, None if it is not finite."""
    if isinstance(value, int):
        return value
    try:
        value = float(value)  # also 0-d tensors and numpy scalars
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} must be a number, got {value!r}") from error
    return value if math.isfinite(value) else None


def write_text(path: Path, text: str, mode: Literal["a", "w"]) -> None:
    """Write or append a text.

    Raises:
        OSError: it cannot be written; names the file.
    """
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        # A full disk is only noticed on closing, and then the error does not say where.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _cut_torn_line(path: Path) -> None:
    """Drop a last line without its end, left by a run that was killed while writing it."""
    if not path.is_file():
        return
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)
