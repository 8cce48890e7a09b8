"""Runs read from W&B by their path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
        timeout_s: seconds that a request may take.

    Raises:
        TrackingError: no key, no network, or no such run.
    """
    import wandb  # noqa: PLC0415

    wandb.setup(wandb.Settings(silent=True))
    try:
        if not wandb.login(prompt=False, verify=False):
            raise TrackingError(
                f"W&B must know you to read {path}, got no key; set WANDB_API_KEY or run "
                "`wandb login`, or name run directories"
            )
        run = wandb.Api(timeout=timeout_s).run(path)
        history = [dict(row) for row in run.scan_history()]
        return RemoteRun(dict(run.config), history, dict(run.summary_metrics), str(run.state))
    except TrackingError:
        raise
    except Exception as error:  # W&B raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrackingError(
            f"W&B run must be one that can be read, got {path} ({reason}); check the path, the key "
            "and the network, or name run directories"
        ) from error
