"""How many examples a pass takes: by hand, against real memory, and that it changes no score."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS
from torch import nn

from selectflow import Selector
from selectflow.core.batches import MicroBatches
from selectflow.core.chunks import _HELD_BACK, GIB, Chunks, Pass, _live_bytes, examples_that_fit
from selectflow.core.derivatives import Derivatives
from selectflow.core.params import Params
from selectflow.core.passes import Objective

MLP, _, TRANSFORMER = PROBLEMS


def sizes(chunks, params, batch, most=None):
    return [len(next(iter(part.values()))) for part in chunks.of(params, batch, most)]


def test_what_a_gradient_pass_saves_by_hand(monkeypatch):
    """The input of the second layer, the log-probabilities, and twice the larger of them.

    The process takes `_HELD_BACK` times as much.
    """
    model = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 10)).double()
    params = Params(model.named_parameters())
    batch = {"x": torch.randn(64, 50).double(), "y": torch.zeros(64, dtype=torch.long)}

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    each = 8 * (200 + 10) + 2 * 8 * 200
    objective = Objective(model, loss_fn)
    for num in (1, 7, 64, 1000):
        limit = _HELD_BACK * (num + 0.5) * each / GIB
        assert examples_that_fit(objective, params, batch, limit) == num
    with pytest.raises(ValueError, match=r"memory_gib must be at least .* which one example"):
        examples_that_fit(objective, params, batch, 0.5 * each / GIB)
    assert examples_that_fit(objective, params, batch, None) == int(GIB / _HELD_BACK / each)
    monkeypatch.setattr("selectflow.core.chunks.USUAL_GIB", 1e-9)
    assert examples_that_fit(objective, params, batch, None) == 1


def test_what_lives_at_once_by_hand():
    """Two tensors of the batch's size at a time, and with the last two the product; no views."""
    model = nn.Linear(50, 3).double()
    objective = Objective(model, lambda model, x: model(x).sum(1))
    params, batch = Params(model.named_parameters()).detach(), torch.randn(64, 50).double()

    def run(part):
        doubled = (part * 2).view(-1, 5, 10).transpose(1, 2)
        for _ in range(5):
            doubled = doubled + 1  # the old one lives until the new one is there
        return doubled.reshape(-1, 50) @ model.weight.T  # a copy, and the product

    each = 8 * (50 + 50 + 3)
    assert _live_bytes(objective, params, batch, run) == 64 * each
    by = Pass("mine", None, run)
    for num in (3, 10):
        limit = _HELD_BACK * (num + 0.5) * each / GIB
        assert examples_that_fit(objective, params, batch, limit, by) == num


def test_an_exact_hessian_product_goes_in_smaller_parts_than_a_gradient():
    """Its tangents and second derivatives are counted, and the product is that of the whole."""
    model, make = TRANSFORMER.make()
    model.eval()
    params, batch = Params(model.named_parameters()).detach(), make(24)
    torch.manual_seed(1)
    direction, sizes = params.map(torch.randn_like), []

    def loss_fn(model, batch):
        sizes.append(len(batch["tokens"]))
        return TRANSFORMER.loss_fn(model, batch)

    objective = Objective(model, loss_fn)
    expected = Derivatives(objective, "exact").hessian_product(params, direction, batch)
    chunked = Derivatives(objective, "exact", "auto", 1e-3)
    sizes.clear()
    found = chunked.hessian_product(params, direction, batch)
    largest = max(sizes)
    sizes.clear()
    chunked.gradient(params, batch)
    assert 1 < largest < max(sizes)
    assert (found - expected).norm() < 1e-12 * expected.norm()
    exact = Derivatives(objective, "exact").directional(params, direction, batch)[1]
    assert torch.allclose(chunked.directional(params, direction, batch)[1], exact, rtol=1e-10)


def test_parts_of_a_batch():
    model, make = MLP.make()
    objective, params = Objective(model, MLP.loss_fn), Params(model.named_parameters())
    batch = make(10)
    assert sizes(Chunks(objective, None), params, batch) == [10]
    assert sizes(Chunks(objective, 4), params, batch) == [4, 4, 2]
    assert sizes(Chunks(objective, 4), params, batch, most=3) == [3, 3, 3, 1]
    assert sizes(Chunks(objective, None), params, batch, most=8) == [8, 2]
    several = MicroBatches([make(3), make(5)])
    assert sizes(Chunks(objective, 4), params, several) == [3, 4, 1]
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, 'auto' or None"):
        Chunks(objective, "all")


def test_longer_sequences_go_in_smaller_parts():
    """The choice is a function of the shapes: the same again after others were seen."""
    model, _ = TRANSFORMER.make()
    objective = Objective(model, TRANSFORMER.loss_fn)
    params = Params(model.named_parameters()).detach()
    chunks = Chunks(objective, "auto", 3e-4)
    found = {}
    for length in (5, 9, 5, 9):
        batch = {"tokens": torch.randint(17, (60, length))}
        found.setdefault(length, []).append(sizes(chunks, params, batch)[0])
    assert found[5][0] == found[5][1] > found[9][0] == found[9][1] > 1


@pytest.mark.parametrize("horizon", [0, 2])
def test_scores_do_not_depend_on_it(horizon):
    model, make = TRANSFORMER.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pools, target = [make(30) for _ in range(3)], make(20)
    largest = []

    def loss_fn(model, batch):
        largest.append(len(batch["tokens"]))
        return TRANSFORMER.loss_fn(model, batch)

    scores = []
    for chunk_size, memory_gib in ((None, 1.0), ("auto", 3e-4)):
        largest.clear()
        selector = Selector(
            model, optimizer, loss_fn, [target], keep=0.5, horizon=horizon, derivative="central",
            chunk_size=chunk_size, memory_gib=memory_gib,
        )  # fmt: skip
        selector.select(pools[0], pools[1:])
        scores.append(selector.last.scores)
    assert max(largest) < 15
    assert torch.allclose(*scores, rtol=1e-6, atol=1e-9 * scores[0].abs().max())


MEASURE = """
import sys, torch
from pathlib import Path
from torch import nn
from selectflow import Selector
torch.set_num_threads(1)
layers = [layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss_fn = lambda model, x: model(x).square().mean((1, 2, 3))
make = lambda: torch.randn(int(sys.argv[1]), 1, 64, 64)
size = "auto" if sys.argv[2] == "auto" else None
selector = Selector(model, optimizer, loss_fn, [make()], keep=1, horizon=0, chunk_size=size,
                    memory_gib=0.1)
selector.select(make())
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_chunks_bound_real_memory():
    """Peak resident memory over that of a pool of one, which takes about 2 MiB of activations.

    Workspaces of the convolutions and what the allocator holds back are within the limit.
    """

    def peak_mib(*args):
        command = [sys.executable, "-c", MEASURE, *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout) / 2**10

    base = peak_mib("1", "all")
    whole, chunked = peak_mib("256", "all") - base, peak_mib("256", "auto") - base
    print(f"MiB over a pool of one: {whole:.0f} at once, {chunked:.0f} in chunks of 0.1 GiB")
    assert whole > 300
    assert chunked < 0.1 * 1024
