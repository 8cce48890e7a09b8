"""Really killed: SIGKILL at random moments of the trainer, resumed until it is done."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import assert_same, outcome

ROOT = Path(__file__).parents[1]
STEPS = 240


def start(tmp_path, name, *overrides):
    command = [
        sys.executable, "-W", "ignore", str(ROOT / "trainers/vision.py"),
        str(ROOT / "configs/digits_online.yaml"), f"name={name}", f"root={tmp_path / 'runs'}",
        f"data.root={tmp_path / 'digits'}", f"steps={STEPS}", "resume=auto", "eval_every=30",
        "checkpoint_every=10", "track.wandb=disabled", *overrides,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("select.horizon=0",),
        ("select.horizon=3", "select.interval=2"),
        ("select.horizon=3", "data.num_workers=2", "data.memory_gib=0"),
    ],
    ids=["immediate", "look-ahead", "workers"],
)
def test_a_run_killed_again_and_again_ends_as_if_it_never_was(tmp_path, overrides):
    started = time.perf_counter()
    whole = start(tmp_path, "whole", *overrides)
    assert whole.wait() == 0, whole.stderr.read().decode()
    whole.stderr.close()
    seconds = time.perf_counter() - started
    moments = random.Random(0)
    for _ in range(12):
        process = start(tmp_path, "killed", *overrides)
        time.sleep(moments.uniform(0.3, 1.0) * seconds)
        process.kill()
        process.wait()
        process.stderr.close()
    final = start(tmp_path, "killed", *overrides)
    assert final.wait() == 0, final.stderr.read().decode()
    final.stderr.close()
    assert_same(outcome(tmp_path / "runs" / "whole"), outcome(tmp_path / "runs" / "killed"))
