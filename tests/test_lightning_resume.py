"""Selection inside Lightning's Trainer goes on from its checkpoints, and no pool is lost."""

import logging

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from problems import image_loss
from small_datasets import make_small
from test_lightning import KEEP, NUM, OPTIONS, Module, loader, target, trainer_of, weights
from torch import nn

from selectflow.data import PoolStream
from selectflow.integrations.lightning import SelectCallback

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")


def stream_of(root):
    return PoolStream(root, pool=6, seed=0, memory_gib=0)


class OnStream(Module):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20))
        self.double()  # Lightning loads weights before it converts a module


class Saves(Callback):
    """A checkpoint after some of the steps, or of the epochs."""

    def __init__(self, path, step=None, epoch=None):
        self.path, self.step, self.epoch = path, step, epoch

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:  # of accumulated batches the first that finds it so
            self.step = None
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, *args):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def shards(tmp_path):
    make_small(tmp_path / "data")
    return tmp_path / "data"


def fit_stream(folder, shards, saves=None, seed=0, resume=None, select=None, **options):
    module = OnStream(seed)
    selection = SelectCallback(image_loss, [next(stream_of(shards))], 3, **OPTIONS | (select or {}))
    callbacks = [selection] if saves is None else [selection, saves]
    trainer = trainer_of(folder, selection, callbacks=callbacks, **options)
    trainer.fit(module, selection.pools(stream_of(shards)), ckpt_path=resume)
    return module, trainer, selection


@pytest.mark.parametrize(
    ("saves", "options", "done"),
    [
        ({"step": 7}, {"max_epochs": -1, "max_steps": 12}, 7),
        ({"step": 3}, {"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2}, 6),
        ({"step": 7}, {"max_steps": 12, "max_epochs": -1, "limit_train_batches": 5}, 7),
        ({"epoch": 1}, {"max_epochs": 3, "limit_train_batches": 5}, 10),
    ],
    ids=["no length", "accumulated", "in an epoch", "after an epoch"],
)
def test_resumes_from_lightnings_checkpoint(tmp_path, shards, saves, options, done):
    """Stopped in the middle of an interval, with pools peeked at and one drawn by Lightning."""
    path = tmp_path / "saved.ckpt"
    whole, *_ = fit_stream(tmp_path, shards, Saves(path, **saves), **options)
    rest, *_ = fit_stream(tmp_path, shards, seed=9, resume=path, **options)
    assert rest.trained_on == whole.trained_on[done:]
    assert len(rest.trained_on) > 4
    assert torch.equal(weights(rest), weights(whole))


def test_a_checkpoint_after_training_resumes(tmp_path, shards):
    path, options = tmp_path / "saved.ckpt", {"max_epochs": -1}
    whole, *_ = fit_stream(tmp_path, shards, max_steps=12, **options)
    _, trainer, _ = fit_stream(tmp_path, shards, max_steps=7, **options)
    trainer.save_checkpoint(path)
    rest, *_ = fit_stream(tmp_path, shards, seed=9, resume=path, max_steps=12, **options)
    assert rest.trained_on == whole.trained_on[7:]
    assert torch.equal(weights(rest), weights(whole))


def test_resumes_with_a_datamodule(tmp_path, shards):
    """Its loader is asked for after the checkpoint was loaded."""

    class Data(LightningDataModule):
        def train_dataloader(self):
            return selection.pools(stream_of(shards))

    path, found = tmp_path / "saved.ckpt", []
    for resume in (None, path):
        selection = SelectCallback(image_loss, [next(stream_of(shards))], 3, **OPTIONS)
        module = OnStream(9 if resume else 0)
        trainer = trainer_of(
            tmp_path, selection, max_epochs=-1, max_steps=9,
            callbacks=[selection, Saves(path, None if resume else 4)],
        )  # fmt: skip
        trainer.fit(module, datamodule=Data(), ckpt_path=resume)
        found.append((module.trained_on, weights(module)))
    (whole, ours), (rest, theirs) = found
    assert rest == whole[4:]
    assert torch.equal(ours, theirs)


def test_an_open_window_of_the_rate_resumes(tmp_path, shards):
    path, options = tmp_path / "saved.ckpt", {"max_epochs": -1, "max_steps": 12}
    select = {"lr": "auto"}
    whole, *_ = fit_stream(tmp_path, shards, Saves(path, 7), select=select, **options)
    rest, *_ = fit_stream(tmp_path, shards, seed=9, resume=path, select=select, **options)
    assert rest.trained_on == whole.trained_on[7:]
    assert torch.equal(weights(rest), weights(whole))


def test_pools_are_neither_lost_nor_used_twice(tmp_path, shards):
    """A stream goes on over epochs, and from one training to the next, behind what was drawn."""
    seen = []

    def noting(candidates):
        seen.extend(candidates.pool["key"])
        return candidates.influence()

    module, stream = OnStream(), stream_of(shards)
    selection = SelectCallback(image_loss, [next(stream_of(shards))], 3, **OPTIONS, strategy=noting)
    pools = selection.pools(stream)
    for limit in (5, 1.0):
        trainer = trainer_of(
            tmp_path, selection, max_epochs=-1, max_steps=8, limit_train_batches=limit
        )
        trainer.fit(module, pools)
    expected = [key for _, pool in zip(range(16), stream_of(shards), strict=False)
                for key in pool["key"]]  # fmt: skip
    assert seen == expected


def test_a_loader_without_position_gives_its_epoch_again(tmp_path):
    """As in Lightning alone; what was peeked at before does not come twice."""
    path, seen = tmp_path / "saved.ckpt", []

    def noting(candidates):
        seen.append(candidates.pool["key"])
        return candidates.influence()

    for resume in (None, path):
        selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS, strategy=noting)
        seen.clear()
        trainer = trainer_of(tmp_path, selection, callbacks=[selection, Saves(path, 7)])
        trainer.fit(Module(), selection.pools(loader()), ckpt_path=resume)
    first = [batch["key"] for batch in loader()]
    assert seen == first[: NUM - 7] + first


def test_another_number_of_processes_begins_afresh(tmp_path, shards, caplog):
    path, options = tmp_path / "saved.ckpt", {"max_epochs": -1, "max_steps": 4}
    fit_stream(tmp_path, shards, Saves(path, 2), **options)
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["SelectCallback"]["processes"] *= 2
    torch.save(saved, path)
    with caplog.at_level(logging.WARNING, "selectflow"):
        fit_stream(tmp_path, shards, resume=path, **options)
    assert "of 2 processes, and this training of 1" in caplog.text
