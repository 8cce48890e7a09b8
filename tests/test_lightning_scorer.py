"""A small model that scores inside Lightning's Trainer, against our own loop."""

import pytest
import torch
from problems import image_loss
from test_lightning import KEEP, OPTIONS, Module, fit, loader, own_loop, target, trainer_of, weights
from torch import nn

from selectflow import Scorer
from selectflow.integrations.lightning import SelectCallback

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")


def beside():
    torch.manual_seed(9)
    layers = nn.Linear(64, 5), nn.Dropout(0.2), nn.GELU(), nn.Linear(5, 10)
    model = nn.Sequential(nn.Flatten(), *layers).double()
    return Scorer(model, torch.optim.AdamW(model.parameters(), 1e-2))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation):
    own, theirs = beside(), beside()
    expected = own_loop(accumulation, scorer=own)
    module, *_ = fit(tmp_path, select={"scorer": theirs}, accumulate_grad_batches=accumulation)
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))
    assert torch.equal(weights(theirs.model), weights(own.model))


def test_it_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    whole, once, again = beside(), beside(), beside()
    expected, *_ = fit(tmp_path, select={"scorer": whole})
    _, trainer, _ = fit(tmp_path, select={"scorer": once}, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    module = Module(seed=4).double()
    selection = SelectCallback(image_loss, target(), KEEP, **OPTIONS, scorer=again)
    trainer = trainer_of(tmp_path, selection)
    trainer.fit(module, selection.pools(loader()), ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(weights(module), weights(expected))
    assert torch.equal(weights(again.model), weights(whole.model))
