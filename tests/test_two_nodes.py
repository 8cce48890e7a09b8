"""Two machines: torchrun on two nodes, each in a network namespace of its own on this one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PREFIX, PORT = "10.231.7", 29557


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def nodes():
    """Names of two namespaces that are joined by a cable."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need `ip` and root")
    names = [f"select{os.getpid()}-{index}" for index in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        ip(
            "link",
            "add",
            "sel0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "sel1",
            "netns",
            names[1],
        )
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{PREFIX}.{index + 1}/24", "dev", f"sel{index}")
            for device in (f"sel{index}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            switch_off(name)
            ip("netns", "del", name)


def start(nodes, folder, name, parallel, *options):
    """The launchers of both nodes, which train one run."""
    started = []
    for index, node in enumerate(nodes):
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--node-rank", str(index), "--master-addr", f"{PREFIX}.1", "--master-port", str(PORT),
            "--max-restarts", "0",
        ]  # fmt: skip
        program = [
            str(ROOT / "trainers/vision.py"), str(ROOT / "configs/digits_online.yaml"),
            f"name={name}", f"root={folder}", f"parallel={parallel}", "steps=24", "eval_every=8",
            "checkpoint_every=4", "timeout_s=60", "resume=auto", "track.wandb=disabled",
            "num_threads=1", f"data.root={folder}/digits", *options,
        ]  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": f"sel{index}",
            "PYTHONPATH": str(ROOT),
        }
        command = ["ip", "netns", "exec", node, *launcher, *program]
        how = {"env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with (Path(folder) / f"{name}-node{index}.log").open("a") as log:
            started.append(subprocess.Popen(command, stdout=log, **how))
    return started


def switch_off(node):
    """Kill all that runs on a node."""
    for pid in ip("netns", "pids", node).split():
        os.kill(int(pid), signal.SIGKILL)


def finish(started, folder, name, limit_s=240):
    for index, process in enumerate(started):
        status = process.wait(timeout=limit_s)
        assert status == 0, (Path(folder) / f"{name}-node{index}.log").read_text()[-4000:]


def losses(folder, name):
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_node_is_killed_and_the_job_resumed(nodes, tmp_path, parallel):
    whole = start(nodes, tmp_path, "whole", parallel)
    finish(whole, tmp_path, "whole")
    broken = start(nodes, tmp_path, "broken", parallel)
    checkpoints, began = tmp_path / "broken" / "checkpoints", time.monotonic()
    while not (checkpoints.exists() and any(checkpoints.iterdir())):
        assert time.monotonic() - began < 120
        time.sleep(0.05)
    switch_off(nodes[1])
    broken[1].wait()
    assert broken[0].wait(timeout=120) != 0  # the first one notices, and does not wait for ever
    finish(start(nodes, tmp_path, "broken", parallel), tmp_path, "broken")
    assert len(losses(tmp_path, "whole")) > 1
    assert losses(tmp_path, "broken") == losses(tmp_path, "whole")
