"""States of a rollout that are put away come back bit for bit, and are really away meanwhile."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS, image_loss
from test_lookahead import setting, window

from selectflow import Selector
from selectflow.core.lookahead import look_ahead
from selectflow.core.optim import Adjoint
from selectflow.core.storage import keeping
from selectflow.core.sweep import sweep

MLP = PROBLEMS[0]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The system's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])  # SGD has no second moment
@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("num_kept", [13, 6])  # all at once, and with recomputation
def test_sensitivities_are_the_same(offload, num_kept, optimizer, scratch):
    _, _, batches, target, reader, derivatives = setting(MLP, optimizer, num=13)
    state = reader.state()
    bytes_each = sum(part.num_bytes() for part in state) + state.params.num_bytes()
    found = [
        look_ahead(
            window(reader, derivatives, batches), state, target, num_sensitivities=13,
            memory_gib=(num_kept + 0.5) * bytes_each / 2**30, offload=where,
        )
        for where in ("none", offload)
    ]  # fmt: skip
    assert found[0].target_loss == found[1].target_loss
    for first, second in zip(*(f.sensitivities for f in found), strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert list(scratch.glob("selectflow-*")) == []


def test_no_more_files_than_states_that_may_be_kept(scratch):
    _, _, batches, target, reader, derivatives = setting(MLP, num=13)
    most, names = 0, []

    def read_end(end):
        _, grad = derivatives.gradient(end.params, target)
        return Adjoint(grad, grad.zeros_like(), grad.zeros_like())

    def emit(visit):
        nonlocal most
        (folder,) = scratch.glob("selectflow-*")
        most = max(most, len(list(folder.iterdir())))
        names.append(folder.name)

    with keeping("disk") as put:
        view = window(reader, derivatives, batches)
        sweep(view, reader.state(), read_end, emit, capacity=6, put=put)
    assert 4 <= most <= 4 * 6  # theta, m, v and the gradient have a file each
    assert names[0].startswith("selectflow-")


def test_nothing_is_left_after_a_failure(scratch):
    model, make = MLP.make(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    calls = 0

    def fails_late(model, batch):
        nonlocal calls
        calls += 1
        if calls > 8:
            (folder,) = scratch.glob("selectflow-*")
            written.append(len(list(folder.iterdir())))
            raise RuntimeError("interrupted")
        return image_loss(model, batch)

    written = []
    selector = Selector(
        model, optimizer, fails_late, [make(4)], keep=2, horizon=12, offload="disk",
        derivative="central",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="interrupted"):
        selector.select(make(4), [make(4) for _ in range(12)])
    assert written[0] > 0
    assert list(scratch.glob("selectflow-*")) == []


def test_a_disk_that_cannot_be_written(scratch, monkeypatch):
    model, make = MLP.make(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = Selector(model, optimizer, image_loss, [make(4)], keep=2, horizon=3, offload="disk")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selectflow.core.storage.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        selector.select(make(4), [make(4) for _ in range(3)])
    with pytest.raises(ValueError, match="offload must be one of none, cpu, disk, got 'ram'"):
        Selector(model, optimizer, image_loss, [make(4)], keep=2, offload="ram")


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from selectflow import Selector
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(1024, 2048), nn.Tanh(), nn.Linear(2048, 1024))  # 16 MiB
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss_fn = lambda model, x: (model(x) - x).square().mean(1)
make = lambda: torch.randn(4, 1024)
selector = Selector(model, optimizer, loss_fn, [make()], keep=2, horizon=int(sys.argv[2]),
                    offload=sys.argv[1], memory_gib=4.0, curvature="none", derivative="central")
selector.select(make(), [make() for _ in range(40)])
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_states_on_disk_are_not_in_memory():
    """Peak resident memory over that of H = 1: 23 states of 64 MiB, or a few of them."""

    def peak_mib(offload, horizon):
        command = [sys.executable, "-c", MEASURE, offload, str(horizon)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout) / 2**10

    base = peak_mib("none", 1)
    kept, away = peak_mib("none", 24) - base, peak_mib("disk", 24) - base
    print(f"MiB over H = 1: {kept:.0f} kept, {away:.0f} on disk")
    assert kept > 0.8 * 23 * 64
    assert away < 0.3 * kept
