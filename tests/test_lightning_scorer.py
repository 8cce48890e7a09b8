"""A scorer inside Lightning's Trainer against our own loop with one on the same pools."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from problems import image_loss
from test_lightning import (
    KEEP,
    OPTIONS,
    Module,
    doubled,
    fit,
    loader,
    target,
    trainer_of,
    weights,
)
from test_lightning_resume import OnStream, Saves, fit_stream, shards
from torch import nn

from selectflow import Scorer, Selector
from selectflow.integrations.lightning import SelectCallback

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")

__all__ = ["shards"]  # a fixture


def scorer_of(seed=5, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 20)
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    return Scorer(model, optimizer, lr_scheduler=schedule, max_grad_norm=0.5, **options)


def own_loop(accumulation, scorer):
    module = Module().double()
    (optimizer,), (schedule,) = module.configure_optimizers()
    scheduler, losses = schedule["scheduler"], []
    selector = Selector(
        module, optimizer, image_loss, list(map(doubled, target())), KEEP, **OPTIONS,
        lr_scheduler=scheduler, max_grad_norm=0.5, pools_per_update=accumulation, scorer=scorer,
    )  # fmt: skip
    for _ in range(2):
        for index, batch in enumerate(selector.stream(map(doubled, loader())), 1):
            module.trained_on.append(batch["key"])
            losses.append(selector.last.scorer_loss)
            (image_loss(module, batch).mean() / accumulation).backward()
            if index % accumulation == 0:
                nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    return module, losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation):
    own, ours = scorer_of(), scorer_of()
    expected, losses = own_loop(accumulation, own)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    module, *_ = fit(
        tmp_path, select={"scorer": ours}, accumulate_grad_batches=accumulation, logger=logger,
        log_every_n_steps=1,
    )  # fmt: skip
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))
    assert torch.equal(weights(ours.model), weights(own.model))
    assert not torch.equal(weights(ours.model), weights(scorer_of().model))
    with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        logged = [row["select/scorer_loss"] for row in csv.DictReader(file)]
    known = losses[accumulation - 1 :: accumulation]  # of the batches that end a step
    assert [float(value) for value in logged if value] == pytest.approx(known)


@pytest.mark.parametrize(
    ("saves", "options", "done"),
    [
        ({"step": 7}, {"max_epochs": -1, "max_steps": 12}, 7),
        ({"step": 3}, {"max_epochs": -1, "max_steps": 6, "accumulate_grad_batches": 2}, 6),
    ],
    ids=["each step", "accumulated"],
)
def test_resumes_from_lightnings_checkpoint(tmp_path, shards, saves, options, done):
    path, first, second = tmp_path / "saved.ckpt", scorer_of(), scorer_of(seed=8)
    how = {"select": {"scorer": first}} | options
    whole, *_ = fit_stream(tmp_path, shards, Saves(path, **saves), **how)
    how["select"] = {"scorer": second}
    rest, *_ = fit_stream(tmp_path, shards, seed=9, resume=path, **how)
    assert rest.trained_on == whole.trained_on[done:]
    assert torch.equal(weights(rest), weights(whole))
    assert torch.equal(weights(second.model), weights(first.model))
    assert second.lr_scheduler.get_last_lr() == first.lr_scheduler.get_last_lr()


@pytest.mark.parametrize("is_own", [True, False])
def test_it_is_under_the_trainers_autocast(tmp_path, is_own):
    """With the loss of the callback as with its own."""
    types = {}

    def noting(module, batch):
        kind = "model" if isinstance(module, Module) else "scorer"
        types.setdefault(kind, set()).add(module(batch["image"]).dtype)
        return image_loss(module, batch)

    scorer = scorer_of(loss_fn=noting if is_own else None)
    scorer.model.float()
    selection = SelectCallback(noting, target(), KEEP, horizon=0, derivative="central",
                               scorer=scorer)  # fmt: skip
    trainer = trainer_of(
        tmp_path, selection, precision="bf16-mixed", max_epochs=1, limit_train_batches=2
    )
    trainer.fit(Module(), selection.pools(loader()))
    assert types == {"scorer": {torch.bfloat16}}


def test_a_model_must_be_made_a_scorer(tmp_path):
    with pytest.raises(TypeError, match=r"must be a selectflow\.Scorer, got OnStream"):
        fit(tmp_path, select={"scorer": OnStream()})
