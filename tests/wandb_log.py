"""What W&B wrote, read back by its own reader."""

import json
import subprocess
import sys
from pathlib import Path


def offline_records(run_dir: Path, *options: str) -> list[dict]:
    """The records of the only W&B log under run_dir, read by W&B's own reader."""
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", *options, log]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
