"""What a selection brings from a device to the host, counted."""

from typing import ClassVar

import pytest
import torch
from problems import image_loss, images
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from selectflow import Selector
from selectflow.strategies import Selection

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


class Reads(TorchFunctionMode):
    """Counts what the host asks of tensors: on a device it would wait for each."""

    num = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num += func in [getattr(torch.Tensor, name) for name in READS]
        return func(*args, **(kwargs or {}))


class Away(torch.Tensor):
    """A tensor that says it is on another device, and notes what is brought from there.

    It says "meta": any other device would have to be there.
    """

    brought: ClassVar = []

    @staticmethod
    def __new__(cls, held):
        kind = {"dtype": held.dtype, "device": "meta"}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **kind)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.held, (args, kwargs or {}))
        device = kwargs.pop("device", None)
        found = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default or device == torch.device("cpu"):
            cls.brought.append(func.overloadpacket)
            return found
        return tree_map_only(torch.Tensor, cls, found)


def selector_of(num_layers=2, **options):
    torch.manual_seed(0)
    layers = [nn.Flatten(), *(nn.Linear(64, 64) for _ in range(num_layers)), nn.Linear(64, 10)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.AdamW(model.parameters())

    def loss_fn(model, batch):
        return image_loss(model, batch | {"image": batch["image"].double()})

    for _ in range(2):
        loss_fn(model, images(8)).mean().backward()
        optimizer.step()
    options = {"keep": 4, "derivative": "central"} | options
    return Selector(model, optimizer, loss_fn, [images(8)], **options)


@pytest.mark.parametrize(
    ("horizon", "interval", "num"), [(0, 1, 6), (0, 4, 6), (1, 1, 7), (3, 1, 13), (3, 4, 13)]
)
def test_reads_do_not_grow_with_the_parameters(horizon, interval, num):
    """At H = 0: the target loss, norms of gamma, the length of the step, and whether all is finite;
    of each update up to 3 more. And twice the optimizer's step counts, which are on the host unless
    the optimizer is fused.
    """
    for num_layers in (2, 12):
        selector = selector_of(num_layers, horizon=horizon, interval=interval)
        pools = [{k: v for k, v in images(16).items() if k != "key"} for _ in range(4)]
        selector.select(pools[0], pools[1:])  # decides on the forms
        selector.state.ahead = None
        with Reads() as reads:
            selector.select(pools[0], pools[1:])
        assert reads.num == num
        if interval > 1:  # step counts, the length of the step, and whether all is finite
            with Reads() as reads:
                selector.select(pools[0], pools[1:])
            assert reads.num == 3


def test_scores_and_indices_stay_on_the_device_until_they_are_looked_at():
    found = []
    pool = images(16)
    for strategy in ("influence", lambda candidates: Away(candidates.influence())):
        selector = selector_of(strategy=strategy)
        Away.brought.clear()
        kept = selector.select(pool)
        found.append((selector.last, kept))
    (expected, expected_kept), (last, kept) = found
    # whether all is finite, and the indices once, since the pool is on the host
    ops = torch.ops.aten
    assert Away.brought == [ops._local_scalar_dense, ops._to_copy]
    assert kept["key"] == expected_kept["key"]
    assert torch.equal(kept["image"], expected_kept["image"])
    Away.brought.clear()
    for name in ("scores", "indices", "scores", "indices"):
        assert type(getattr(last, name)) is torch.Tensor
        assert torch.equal(getattr(last, name), getattr(expected, name))
    assert len(Away.brought) == 2


def test_of_equal_scores_the_first_are_kept_on_the_device_too():
    selector = selector_of(
        strategy=lambda _: Away(torch.tensor([1.0, 2, 1, 2, 0, 2, 1, 2])), keep=6
    )
    selector.select(images(8))
    assert selector.last.indices.tolist() == [1, 3, 5, 7, 0, 2]


def test_influence_that_a_strategy_wrote_to_is_checked():
    def spoilt(candidates):
        scores = candidates.influence()
        scores[3] = torch.nan
        return scores

    with pytest.raises(
        FloatingPointError, match=r"scores must be finite, got nan for keys sample-3"
    ):
        selector_of(strategy=spoilt).select(images(16))


def test_a_selection_is_frozen_and_says_what_it_has():
    last = Selection(images(2), torch.tensor([1]), None, torch.ones(2), 0, None, 0, None, 0.0, 0.0)
    assert last.scores is None
    assert "indices=tensor([1])" in repr(last)
    with pytest.raises(AttributeError, match="cannot assign to field 'scores'"):
        last.scores = torch.ones(2)
