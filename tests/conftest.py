"""Settings of the whole suite."""

import gc
import os

# The models are tiny: threads would cost more than they gain, here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from processes import Processes
from shard_server import serve

torch.set_num_threads(1)
# Whoever runs the suite may have W&B switched off, or elsewhere.
for name in ("MODE", "DIR", "PROJECT", "ENTITY", "RUN_GROUP", "JOB_TYPE", "TAGS", "NAME", "RUN_ID"):
    os.environ.pop(f"WANDB_{name}", None)


def pytest_collection_finish():
    """What is imported by now stays: no garbage collection need go through it again.

    It takes a third of a second, and the Trainer asks for one after each training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def two():
    """Two processes in one group."""
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def four():
    """Four processes in one group."""
    processes = Processes(4)
    yield processes
    processes.stop()


@pytest.fixture
def directory(tmp_path_factory, monkeypatch):
    """A directory of its own for what is cached."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SELECTFLOW_CACHE", str(path))
    return path


@pytest.fixture
def server(tmp_path):
    """An HTTP server of a folder of its own."""
    with serve(tmp_path / "web") as http:
        yield http
