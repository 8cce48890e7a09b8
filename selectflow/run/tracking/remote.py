"""Runs read from W&B by their path."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
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
    except Exception as error:  # W&B raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrackingError(
            f"W&B run must be one that can be read, got {path} ({reason}); check the path, the key "
            "and the network, or name run directories"
        ) from error


def _reach(url: str, timeout_s: float) -> None:
    """Connects to a server and hangs up; where there is none, W&B's client retries for minutes.

    Raises:
        OSError: nothing answers.
    """
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    if address.scheme in proxies and not urllib.request.proxy_bypass(address.hostname or ""):
        return  # only the proxy knows
    port = address.port or {"https": 443, "http": 80}[address.scheme]
    socket.create_connection((address.hostname or "", port), timeout_s).close()
