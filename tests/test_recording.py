"""A recorded run is the run that torch.optim makes, in bounded memory; others are refused."""

import resource
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS, image_loss
from reference import clone
from torch import nn

from selectflow.core.optim import Adjoint, State
from selectflow.core.torch_optim import OptimizerReader
from selectflow.offline.record import fingerprint, record, reopen

MLP = PROBLEMS[0]


def setting(problem=MLP, num=12, size=6, dtype=torch.float64, **options):
    model, make = problem.make(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **options)
    return model, optimizer, [make(size) for _ in range(num)]


def distance(first, second):
    return max((one - two).norm() for one, two in zip(first, second, strict=True) if one)


def real_states(model, optimizer, loss_fn, batches, scheduler=None, max_grad_norm=None):
    """The state before every update of a plain torch loop, and the one after the last."""
    model, optimizer = clone(model, optimizer)
    scheduler = scheduler and scheduler(optimizer)
    model.eval()
    reader = OptimizerReader(model, optimizer)
    states = []
    for batch in [*batches, None]:
        states.append(State(*(part.map(torch.clone) for part in reader.state())))
        if batch is not None:
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            if max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            if scheduler:
                scheduler.step()
    return states


@pytest.mark.parametrize(
    ("problem", "spacing"), [(MLP, 1), (MLP, 100), *((problem, 5) for problem in PROBLEMS)]
)
def test_every_state_is_that_of_a_torch_loop(problem, spacing):
    """With schedule and clipping; dropout and batch norm as in evaluation."""

    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    model, optimizer, batches = setting(problem)
    expected = real_states(model, optimizer, problem.loss_fn, batches, halve, 0.5)
    trajectory = record(
        model, optimizer, problem.loss_fn, batches, halve(optimizer), 0.5, spacing=spacing
    )
    assert len(trajectory) == 12
    assert trajectory.snapshots.indices == sorted({*range(0, 13, spacing), 12})
    assert distance(expected[-1], expected[0]) > 1e-2
    for index, state in enumerate(expected):
        assert distance(state, trajectory.state(index)) < 1e-10
    assert distance(OptimizerReader(model, optimizer).state(), expected[-1]) == 0
    assert all(module.training for module in model.modules())


def test_an_optimizer_with_a_past_goes_on_from_it():
    model, optimizer, batches = setting()
    first = record(model, optimizer, image_loss, batches[:5])
    second = record(model, optimizer, image_loss, batches[5:])
    assert (first.first_step, second.first_step) == (0, 5)
    assert second.updates[0].rules[0].step == 6
    whole_model, whole_optimizer, _ = setting()
    whole = record(whole_model, whole_optimizer, image_loss, batches, spacing=100)
    for index in range(len(second) + 1):
        assert distance(second.state(index), whole.state(5 + index)) < 1e-12


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_limit_thins_snapshots_out(on_disk, tmp_path):
    model, optimizer, batches = setting(num=40)
    size = 3 * sum(p.numel() * 8 for p in model.parameters())
    folder = tmp_path / "run" if on_disk else None
    trajectory = record(
        model, optimizer, image_loss, batches, limit_gib=6.5 * size / 2**30, folder=folder
    )
    snapshots = trajectory.snapshots
    assert snapshots.indices == [0, 8, 16, 24, 32, 40]
    assert snapshots.gib == pytest.approx(6 * size / 2**30)
    if on_disk:
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["recording.json", *(snapshots.path(i).name for i in snapshots.indices)]
        assert sum(snapshots.path(i).stat().st_size for i in snapshots.indices) < 6.5 * size


def test_a_sweep_does_not_depend_on_where_the_snapshots_are(tmp_path):
    found = []
    for options in ({}, {"spacing": 5}, {"spacing": 100, "folder": tmp_path / "run"}):
        model, optimizer, batches = setting()
        trajectory = record(model, optimizer, image_loss, batches, **options)
        _, grad = trajectory.derivatives.gradient(trajectory.state(11).params, batches[-1])
        adjoint = Adjoint(grad, grad.zeros_like(), grad.zeros_like())
        gammas = {}

        def keep(visit, gammas=gammas):
            gammas[visit.index] = visit.gamma

        trajectory.sweep(trajectory.window(first=2), 11, adjoint, keep)
        assert list(gammas) == list(range(10, 1, -1))
        found.append(gammas)
    for gammas in found[1:]:
        for index, gamma in gammas.items():
            assert (gamma - found[0][index]).norm() < 1e-9 * gamma.norm()


def test_a_reopened_recording_is_the_same(tmp_path):
    model, optimizer, batches = setting()
    trajectory = record(model, optimizer, image_loss, batches, spacing=5, folder=tmp_path / "run")
    fresh, _, _ = setting()
    again = reopen(tmp_path / "run", fresh, image_loss, batches)
    assert again.updates == trajectory.updates
    assert again.losses == trajectory.losses
    for index in (0, 3, 12):
        assert distance(again.state(index), trajectory.state(index)) == 0


def test_replaying_other_batches_is_refused():
    model, optimizer, batches = setting()
    trajectory = record(model, optimizer, image_loss, batches, spacing=5)
    trajectory.batches[7]["label"] = (trajectory.batches[7]["label"] + 1) % 10
    _, grad = trajectory.derivatives.gradient(trajectory.state(12).params, batches[0])
    adjoint = Adjoint(grad, grad.zeros_like(), grad.zeros_like())
    with pytest.raises(RuntimeError, match=r"arrive at the recorded state.*before step 10"):
        trajectory.sweep(trajectory.window(), 12, adjoint, lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_training_is_refused_and_rounding_is_not(dtype):
    def noisy(model, batch):
        return image_loss(model, {**batch, "image": F.dropout(batch["image"], 0.5)})

    model, optimizer, batches = setting(dtype=dtype, num=60)
    trajectory = record(model, optimizer, image_loss, batches, spacing=30)
    trajectory.check_replay(
        60, trajectory.replay(30, 60, trajectory.state(30)), trajectory.state(30)
    )

    model, optimizer, batches = setting(dtype=dtype)
    with pytest.raises(RuntimeError, match=r"not deterministic .*fix the randomness per example"):
        record(model, optimizer, noisy, batches, spacing=3)


def test_the_resolution_of_the_parameters_is_no_drift():
    """At a small lr a bfloat16 parameter moves by its last digit or not at all."""
    model, _, batches = setting(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    trajectory = record(model, optimizer, image_loss, batches, spacing=6)
    start, end = trajectory.state(6), trajectory.state(12)
    last_digit = torch.finfo(torch.bfloat16).eps

    def nudged(by):
        params = end.params.map(lambda x: torch.where(x > 0, x * (1 + by), x))
        return end._replace(params=params)

    assert (nudged(last_digit).params - end.params).norm() > (end.params - start.params).norm()
    trajectory.check_replay(12, nudged(last_digit), start)
    with pytest.raises(RuntimeError, match="not deterministic"):
        trajectory.check_replay(12, nudged(4 * last_digit), start)


@contextmanager
def file_size_limit(num_bytes):
    """Writes beyond `num_bytes` of one file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_file_and_leaves_nothing_to_read(tmp_path):
    model, optimizer, batches = setting()
    folder = tmp_path / "run"
    with file_size_limit(8192), pytest.raises(OSError, match=r"snapshot-00000000.*could not be"):
        record(model, optimizer, image_loss, batches, folder=folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(ValueError, match="must hold a finished recording"):
        reopen(folder, model, image_loss, batches)


def test_damaged_snapshots_are_named(tmp_path):
    model, optimizer, batches = setting()
    folder = tmp_path / "run"
    trajectory = record(model, optimizer, image_loss, batches, spacing=6, folder=folder)
    path = trajectory.snapshots.path(6)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(OSError, match=r"snapshot-00000006.* must be a whole snapshot"):
        reopen(folder, model, image_loss, batches)
    path.unlink()
    with pytest.raises(OSError, match=r"snapshot-00000006.* must be a whole snapshot"):
        reopen(folder, model, image_loss, batches)


class TestRefusals:
    def test_a_recording_of_another_model(self, tmp_path):
        model, optimizer, batches = setting()
        record(model, optimizer, image_loss, batches, folder=tmp_path / "run")
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
        assert fingerprint(other) != fingerprint(model)
        with pytest.raises(ValueError, match=r"recording of this model.*of another model"):
            reopen(tmp_path / "run", other, image_loss, batches)
        with pytest.raises(ValueError, match="the 12 recorded ones, got 11"):
            reopen(tmp_path / "run", model, image_loss, batches[:-1])

    def test_a_recording_by_other_code(self, tmp_path, monkeypatch):
        model, optimizer, batches = setting()
        record(model, optimizer, image_loss, batches, folder=tmp_path / "run")
        monkeypatch.setattr("selectflow.offline.record.FORMAT", 2)
        with pytest.raises(ValueError, match=r"got format 1, here 2: .*another version"):
            reopen(tmp_path / "run", model, image_loss, batches)

    def test_a_folder_in_use(self, tmp_path):
        model, optimizer, batches = setting()
        (tmp_path / "notes.txt").touch()
        with pytest.raises(ValueError, match="folder must be new or empty"):
            record(model, optimizer, image_loss, batches, folder=tmp_path)

    def test_no_batches(self):
        model, optimizer, _ = setting()
        with pytest.raises(ValueError, match="batches must yield at least one batch"):
            record(model, optimizer, image_loss, [])

    def test_a_limit_below_two_states(self):
        model, optimizer, batches = setting()
        with pytest.raises(ValueError, match=r"limit_gib must be at least .*, two states"):
            record(model, optimizer, image_loss, batches, limit_gib=1e-6)

    def test_without_a_limit_two_states_are_kept_of_any_model(self, monkeypatch):
        monkeypatch.setattr("selectflow.core.chunks.USUAL_GIB", 1e-9)
        model, optimizer, batches = setting()
        trajectory = record(model, optimizer, image_loss, batches)
        assert trajectory.snapshots.indices == [0, len(batches)]

    def test_a_diverging_run(self):
        model, optimizer, batches = setting()
        batches[3]["image"][2] = float("inf")
        with pytest.raises(FloatingPointError, match=r"at optimizer step 3: losses.*keys sample-2"):
            record(model, optimizer, image_loss, batches)


@pytest.mark.parametrize("is_reopened", [False, True])
def test_snapshots_come_back_to_the_device_of_the_model(tmp_path, is_reopened):
    """As of a run on an accelerator, for which torch's meta device stands here."""
    model, optimizer, batches = setting()
    trajectory = record(model, optimizer, MLP.loss_fn, batches, folder=tmp_path / "run")
    assert trajectory.state(0).params["1.weight"].device.type == "cpu"
    model.to("meta")
    if is_reopened:
        trajectory = reopen(tmp_path / "run", model, MLP.loss_fn, batches)
    for part in trajectory.state(4):
        assert {tensor.device.type for tensor in part.values()} == {"meta"}
