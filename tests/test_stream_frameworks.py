"""Streams inside of other frameworks, which save what has `state_dict` by duck typing."""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from small_datasets import keys_of, make_small
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader

from selectflow.data import PoolStream


@runtime_checkable
class LightningStateful(Protocol):
    """As `lightning.fabric.utilities.types._Stateful`: what its loops save of each dataloader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def stream_of(root, **options):
    return PoolStream(root, pool=3, seed=0, memory_gib=0, **options)


def test_accelerate_saves_and_loads_a_registered_stream(tmp_path):
    make_small(tmp_path / "data")
    whole = keys_of(islice(stream_of(tmp_path / "data"), 12))
    project = ProjectConfiguration(project_dir=str(tmp_path))
    accelerator = Accelerator(cpu=True, project_config=project)
    stream = stream_of(tmp_path / "data")
    accelerator.register_for_checkpointing(stream)
    assert keys_of(islice(stream, 5)) == whole[:15]
    accelerator.save_state(str(tmp_path / "saved"))
    next(stream)
    accelerator.load_state(str(tmp_path / "saved"))
    assert keys_of(islice(stream, 7)) == whole[15:]
    accelerator.free_memory()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_prepared_dataloader_keeps_the_order(tmp_path, num_workers):
    make_small(tmp_path)
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(stream_of(tmp_path), batch_size=None, num_workers=num_workers)
    prepared = accelerator.prepare(loader)
    expected = list(islice(stream_of(tmp_path), 8))
    for ours, theirs in zip(islice(prepared, 8), expected, strict=True):
        assert ours["key"] == theirs["key"]
        assert torch.equal(ours["image"], theirs["image"])
    accelerator.free_memory()


@pytest.mark.parametrize("protocol", [LightningStateful, Stateful])
def test_a_stream_is_the_dataloader_and_state_of_a_trainer(tmp_path, protocol):
    """A loop that takes any iterable, and saves and restores those that fit its protocol."""
    make_small(tmp_path)
    loaders: list[Iterable[Any]] = [stream_of(tmp_path), [1, 2]]
    batches = islice(iter(loaders[0]), 4)
    before = keys_of(batches)
    states = [each.state_dict() for each in loaders if isinstance(each, protocol)]
    assert len(states) == 1
    again = stream_of(tmp_path)
    assert isinstance(again, protocol)
    again.load_state_dict(states[0])
    rest = keys_of(islice(iter(again), 4))
    assert before + rest == keys_of(islice(stream_of(tmp_path), 8))
