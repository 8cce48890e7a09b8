"""Reducible holdout loss: the model of the target set, how it is trained, kept and seen."""

import copy
import math

import pytest
import torch
from problems import PROBLEMS

from selectflow import Selector
from selectflow.strategies import ReducibleLoss

MLP, CNN, _ = PROBLEMS


def close(ours, theirs, tolerance=1e-9):
    return float((ours - theirs).norm() / theirs.norm()) < tolerance


def wrong(batch):
    """The batch with the labels of its second half shifted."""
    half = len(batch["label"]) // 2
    label = batch["label"].clone()
    label[half:] = (label[half:] + 3) % 10
    return batch | {"label": label}


def rho_selector(strategy=None, seed=0, num=60, **options):
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    target = [make(num), make(num)]
    selector = Selector(
        model, optimizer, MLP.loss_fn, target, 8, seed=seed,
        strategy=strategy or ReducibleLoss(lr=1e-2), **options,
    )  # fmt: skip
    return model, optimizer, make, target, selector


def irreducible(selector):
    return selector.state_dict()["memory"]["irreducible"]["params"]


def test_rho_is_the_loss_now_less_that_of_the_model_of_the_target_set():
    model, optimizer, make, _, selector = rho_selector()
    other = copy.deepcopy(model)
    for _ in range(3):  # the second model stays as it is while the first one is trained
        pool = make(16)
        selector.select(pool)
        other.load_state_dict(irreducible(selector))
        expected = MLP.loss_fn(model, pool) - MLP.loss_fn(other, pool)
        assert close(selector.last.scores, expected.detach())
        MLP.loss_fn(model, pool).mean().backward()
        optimizer.step()


def test_rho_keeps_labels_that_are_right():
    _, _, make, _, selector = rho_selector()
    selector.select(wrong(make(40)))
    assert (selector.last.indices < 20).all()


def test_the_irreducible_loss_model_is_stopped_before_it_fits_noise():
    """Of pure noise nothing is learned: the held-out loss is lowest near the start."""
    model, optimizer, make, _, _ = rho_selector()
    noise = [make(60) | {"label": torch.randint(10, (60,))} for _ in range(2)]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def moved(target):
        selector = Selector(
            model, optimizer, MLP.loss_fn, target, 8, strategy=ReducibleLoss(lr=1e-2)
        )
        selector.select(make(16))
        kept = irreducible(selector)
        return math.sqrt(sum(float((kept[k] - start[k]).square().sum()) for k in start))

    assert moved(noise) < 0.3 * moved([make(60), make(60)])


def test_a_target_set_that_teaches_nothing_is_said(caplog):
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters())
    noise = [make(60) | {"label": torch.randint(10, (60,))}]
    strategy = ReducibleLoss(lr=10.0, patience=1)
    Selector(model, optimizer, MLP.loss_fn, noise, 8, strategy=strategy).select(make(16))
    assert ["no epoch on the target set lowered" in r.message for r in caplog.records] == [True]


def test_a_rate_far_too_large_is_lowered_until_the_held_out_loss_falls():
    _, _, make, target, selector = rho_selector(ReducibleLoss(lr=30.0, patience=8))
    selector.select(make(16))
    model, _ = MLP.make()
    before = sum(MLP.loss_fn(model, batch).mean().item() for batch in target)
    model.load_state_dict(irreducible(selector))
    assert sum(MLP.loss_fn(model, batch).mean().item() for batch in target) < 0.5 * before


def test_rho_sees_its_model_with_the_buffers_that_it_was_trained_with():
    """Batch norm of the live model goes on, that of the other one does not."""
    model, make = CNN.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    selector = Selector(
        model, optimizer, CNN.loss_fn, [make(40)], 8, strategy=ReducibleLoss(max_epochs=3)
    )
    pool, other = make(16), copy.deepcopy(model)
    selector.select(pool)
    kept = selector.state_dict()["memory"]["irreducible"]
    other.load_state_dict(kept["params"] | kept["buffers"])
    for _ in range(3):
        CNN.loss_fn(model, make(16)).mean().backward()
        optimizer.step()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert not torch.equal(buffers["1.running_mean"], dict(other.named_buffers())["1.running_mean"])
    selector.select(pool)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    expected = CNN.loss_fn(copy.deepcopy(model).eval(), pool) - CNN.loss_fn(other.eval(), pool)
    assert close(selector.last.scores, expected.detach())


def test_a_state_of_before_there_was_a_memory_is_loaded():
    *_, selector = rho_selector()
    state = selector.state_dict()
    del state["memory"]
    selector.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, r"held_out must be in \(0, 1\), got 1.0"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"max_epochs": 0}, "max_epochs must be an integer >= 1, got 0"),
        ({"patience": 2.5}, "patience must be an integer >= 1, got 2.5"),
    ],
)
def test_options_of_rho_out_of_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        ReducibleLoss(**options)


def test_rho_needs_a_target_set_with_an_end_and_something_to_hold_out():
    model, make = MLP.make()
    optimizer = torch.optim.AdamW(model.parameters())
    endless = iter(lambda: make(4), None)
    with pytest.raises(ValueError, match="target must have a length for this strategy"):
        Selector(model, optimizer, MLP.loss_fn, endless, 4, strategy="rho").select(make(8))
    with pytest.raises(ValueError, match="at least 2 examples for 'rho', got 1"):
        Selector(model, optimizer, MLP.loss_fn, [make(1)], 4, strategy="rho").select(make(8))
