"""Bad input to the selector: each error says what was expected, what came and where."""

import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import image_loss
from test_selector import selector_for, setting, train

from selectflow.control.horizon import HorizonSchedule
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rules import AutoRate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": -1}, "horizon must be an integer >= 0, .* got -1"),
        ({"horizon": 1.5}, "horizon must be an integer >= 0, .* got 1.5"),
        ({"interval": 0}, "interval must be an integer >= 1, or auto, got 0"),
        ({"keep": 0}, "keep must be an integer >= 1 or a fraction"),
        ({"keep": 1.5}, "keep must be an integer >= 1 or a fraction"),
        ({"strategy": "influense"}, "did you mean influence"),
        ({"curvature": "gauss"}, "curvature must be one of exact, fisher, none"),
        ({"derivative": "auot"}, "derivative must be one of auto, exact, central"),
        ({"nominal": "best"}, "nominal must be one of random, policy"),
        ({"pools_per_update": 0}, "pools_per_update must be an integer >= 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1"),
        ({"memory_gib": 0}, "memory_gib must be greater than 0"),
        ({"max_grad_norm": 0}, "max_grad_norm must be > 0 or None"),
    ],
)
def test_options_out_of_range(options, message):
    model, optimizer, _, target = setting()
    with pytest.raises(ValueError, match=message):
        selector_for(model, optimizer, target, **options)


def test_a_pool_smaller_than_keep():
    model, optimizer, pools, target = setting()
    with pytest.raises(ValueError, match="at least keep = 11 examples, got 10"):
        selector_for(model, optimizer, target, keep=11).select(pools[0])


def test_leaves_that_disagree():
    model, optimizer, pools, target = setting()
    pool = pools[0] | {"label": pools[0]["label"][:5]}
    with pytest.raises(ValueError, match="same leading dimension, got image: 10, label: 5"):
        selector_for(model, optimizer, target).select(pool)


@pytest.mark.parametrize("target", [[], iter([])])
def test_an_empty_target(target):
    model, optimizer, pools, _ = setting()
    with pytest.raises(ValueError, match="target must yield at least one batch"):
        selector_for(model, optimizer, target).select(pools[0])


def test_a_target_that_is_a_generator_is_iterated_again_and_again():
    model, optimizer, pools, target = setting()
    listed = selector_for(model, optimizer, target)
    generated = selector_for(model, optimizer, (batch for batch in target))
    for pool in pools[:5]:
        for selector in (listed, generated):
            selector.state.ahead = None
            selector.select(pool)
        assert torch.equal(listed.last.scores, generated.last.scores)


def test_a_loss_that_is_not_per_example():
    model, optimizer, pools, target = setting()

    def mean(model, batch):
        return F.cross_entropy(model(batch["image"]), batch["label"])

    with pytest.raises(ValueError, match=r"one loss per example, shape \(\d+,\), got \(\)"):
        selector_for(model, optimizer, target, mean).select(pools[0])


def test_non_finite_numbers_name_the_step_and_the_examples():
    model, optimizer, pools, target = setting()
    train(model, optimizer, image_loss, pools[:3])
    pools[0]["image"][7] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 3: losses must be finite.*keys sample-7"):
        selector_for(model, optimizer, target, horizon=0).select(pools[0])
    with pytest.raises(
        FloatingPointError, match=r"step 3: scores must be finite.*sample-0, sample-2"
    ):
        selector_for(
            model, optimizer, target, strategy=lambda c: torch.arange(10.0) / (torch.arange(10) % 2)
        ).select(pools[1])


def test_a_strategy_that_returns_a_wrong_shape():
    model, optimizer, pools, target = setting()
    with pytest.raises(ValueError, match=r"one score per example, shape \(10,\), got \(3,\)"):
        selector_for(model, optimizer, target, strategy=lambda c: torch.zeros(3)).select(pools[0])


@pytest.mark.parametrize("strategy", ["influence", "uniform"])
def test_another_default_device_changes_nothing(strategy):
    """As `torch.set_default_device("cuda")`; nothing can be computed on "meta"."""
    model, optimizer, pools, target = setting()
    options = {"strategy": strategy, "horizon": 3}
    expected = selector_for(model, optimizer, target, **options).select(pools[0], pools[1:])
    torch.set_default_device("meta")
    try:
        kept = selector_for(model, optimizer, target, **options).select(pools[0], pools[1:])
    finally:
        torch.set_default_device(None)
    assert kept["key"] == expected["key"]


def endless(batches):
    while True:
        yield from batches


class Once:
    def __init__(self, batches):
        self.iterator = iter(batches)

    def __iter__(self):
        return self.iterator


@pytest.mark.parametrize("make", [endless, itertools.cycle, Once])
def test_targets_without_end_or_of_one_round_score_as_a_list_does(make):
    """To the bit, resumed in the midst of a round, too."""
    model, optimizer, pools, target = setting()
    listed = selector_for(model, optimizer, target)
    other = selector_for(model, optimizer, make(target))
    for number, pool in enumerate(pools[:7]):
        for selector in (listed, other):
            selector.state.ahead = None
            selector.select(pool)
        assert torch.equal(listed.last.scores, other.last.scores)
        if number == 3:
            state = other.state_dict()
            other = selector_for(model, optimizer, make(target))
            other.load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": np.int64(3)},
        {"keep": np.float32(0.25)},
        {"horizon": np.int64(2)},
        {"horizon": HorizonSchedule([(np.int64(0), np.int64(2))])},
        {
            "horizon": AutoHorizon(
                largest=np.int64(4), gap=np.int32(9), off=False, first=np.int64(2)
            )
        },
        {"lr": AutoRate(window=np.int16(4), longest_gap=np.int64(8))},
        {"interval": np.int32(2)},
        {"chunk_size": np.uint8(4)},
        {"pools_per_update": np.int64(2)},
        {"seed": np.int64(7)},
        {"memory_gib": np.float32(1), "max_grad_norm": np.float64(1)},
    ],
)
def test_numbers_of_numpy_are_numbers(options):
    def plain(value):
        return value.item() if isinstance(value, np.generic) else value

    model, optimizer, pools, target = setting()
    found = []
    for given in (options, {name: plain(value) for name, value in options.items()}):
        selector = selector_for(model, optimizer, target, **given)
        selector.select(pools[0], pools[1:])
        found.append(selector)
    assert torch.equal(found[0].last.scores, found[1].last.scores)
    assert torch.equal(found[0].last.indices, found[1].last.indices)
    file = io.BytesIO()
    torch.save(found[0].state_dict(), file)
    file.seek(0)
    found[1].load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, np.float64(2), "2", None])
def test_what_is_no_whole_number_is_refused(value):
    model, optimizer, _, target = setting()
    for name in ("interval", "horizon", "seed"):
        with pytest.raises(ValueError, match=f"{name} must be an integer.*got "):
            selector_for(model, optimizer, target, **{name: value})
    for make in (lambda: AutoRate(window=value), lambda: AutoHorizon(gap=value)):
        with pytest.raises(ValueError, match=r"must be >= .* integers"):
            make()
    with pytest.raises(ValueError, match="horizon must be an integer >= 0"):
        HorizonSchedule([(0, value)])
