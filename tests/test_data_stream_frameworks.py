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


@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_stateful_dataloader_of_torchdata_resumes_the_stream(tmp_path, num_workers):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    make_small(tmp_path)
    whole = keys_of(islice(stream_of(tmp_path), 11))

    def loader():
        options = {"batch_size": None, "num_workers": num_workers}
        return loaders.StatefulDataLoader(stream_of(tmp_path), **options)

    first = loader()
    assert keys_of(islice(first, 5)) == whole[:15]
    again = loader()
    again.load_state_dict(first.state_dict())
    assert keys_of(islice(again, 6)) == whole[15:]


@pytest.mark.filterwarnings("ignore")  # its own
def test_lightning_resumes_the_stream(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(64, 20), []

        def training_step(self, batch, _):
            self.seen += batch["key"]
            return torch.nn.functional.cross_entropy(
                self.layer(batch["image"].flatten(1)), batch["label"]
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(steps, **options):
        model = Model()
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=steps, limit_train_batches=100, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, stream_of(tmp_path), **options)
        return trainer, model.seen

    make_small(tmp_path)
    whole = keys_of(islice(stream_of(tmp_path), 12))
    trainer, before = fit(7)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    _, after = fit(12, ckpt_path=tmp_path / "saved.ckpt")
    assert before + after == whole
