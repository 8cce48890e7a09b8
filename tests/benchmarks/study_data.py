"""The five data sets of `baselines.py`, from files that packages ship: no download.

Digits of scikit-learn (8 x 8 pixels, ten classes): `noised` has 40% wrong labels in the stream,
`imbalanced` 0.05^(c / 9) of the samples of class c, `clean` neither.

`photographs`: from which of eleven photographs of scikit-image does a patch of 8 x 8 pixels
come? 40% of the stream's labels are wrong. Some patches are but sky or table: no model tells them.

`visits`: how often someone sees a doctor in a year (never, once or twice, 3 to 5 times, oftener),
from nine facts of the RAND health insurance experiment (statsmodels). The target set and the test
set are of people in fair or poor health, 9% of the stream, of which nothing is wrong. Records of
the same household stand together, so that blocks of 50 rows are dealt out whole.

The test set is the same for every seed, also for those that tune: it is used for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

WRONG, RAREST = 0.4, 0.05
SIDE, MOST, RANK = 8, 800, 3  # pixels of a patch, patches of a photograph, axes of a coloured one
BLOCK = 50
PHOTOGRAPHS = (
    "astronaut", "brick", "cell", "chelsea", "coffee", "coins", "grass", "gravel",
    "immunohistochemistry", "retina", "rocket",
)  # fmt: skip
Batch = dict[str, Tensor]


class Examples(NamedTuple):
    """Inputs (N, D), labels (N,), which may be a target, and groups that are not torn apart."""

    x: Tensor
    y: Tensor
    in_domain: Tensor
    group: Tensor


class Data(NamedTuple):
    """The stream, the target set and the test set of a seed."""

    train: Batch
    target: Batch
    test: Batch


@cache
def digits() -> Examples:
    found = load_digits()
    x, y = torch.tensor(found.images / 16).float().flatten(1), torch.tensor(found.target)
    return Examples(x, y, torch.ones(len(y), dtype=torch.bool), torch.arange(len(y)))


@cache
def photographs() -> Examples:
    from skimage import color, data  # noqa: PLC0415 - the other tasks do without

    xs, ys = [], []
    for label, name in enumerate(PHOTOGRAPHS):
        image = getattr(data, name)()
        pixels = image if image.ndim == RANK else color.gray2rgb(image)
        patches = torch.tensor(pixels / 255).float().unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)
        rows = patches.flatten(0, 1).flatten(1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(label))
        xs.append(rows[order[:MOST]])
        ys.append(torch.full((len(xs[-1]),), label))
    x, y = torch.cat(xs), torch.cat(ys)
    return Examples(4 * (x - 0.5), y, torch.ones(len(y), dtype=torch.bool), torch.arange(len(y)))


@cache
def visits() -> Examples:
    from statsmodels.datasets import randhie  # noqa: PLC0415 - the other tasks do without

    table = randhie.load_pandas().data
    y = torch.bucketize(
        torch.tensor(table["mdvis"].to_numpy()), torch.tensor([1, 3, 6]), right=True
    )
    facts = torch.tensor(table.drop(columns="mdvis").to_numpy()).float()
    in_domain = torch.tensor((table["hlthf"] + table["hlthp"]).to_numpy() > 0)
    x = (facts - facts.mean(0)) / facts.std(0)
    return Examples(x, y, in_domain, torch.arange(len(y)) // BLOCK)


TASKS: dict[str, Callable[[], Examples]] = {
    "noised": digits,
    "imbalanced": digits,
    "clean": digits,
    "photographs": photographs,
    "visits": visits,
}
NUM_TEST = {"photographs": 1000, "visits": 600}


def draw(task: str, seed: int, num_target: int) -> Data:
    """The data of a task; stream and target set are drawn by the seed."""
    found = TASKS[task]()
    (num_groups,) = found.group.unique().shape

    def dealt(seed: int, free: Tensor, num: int) -> Tensor:
        """Rows of the domain, from groups in random order: the first `num` of them."""
        order = torch.randperm(num_groups, generator=torch.Generator().manual_seed(seed))
        rows = (found.in_domain & free).nonzero().flatten()
        return rows[order.argsort()[found.group[rows]].argsort(stable=True)][:num]

    free = torch.ones(len(found.y), dtype=torch.bool)
    test = dealt(0, free, NUM_TEST.get(task, 400))
    free[torch.isin(found.group, found.group[test])] = False
    target = dealt(seed + 1, free, num_target)
    free[torch.isin(found.group, found.group[target])] = False
    train, generator = free.nonzero().flatten(), torch.Generator().manual_seed(seed)
    y = found.y[train]
    if task == "imbalanced":
        there = torch.rand(len(y), generator=generator) < RAREST ** (y / 9)
        train, y = train[there], y[there]
    if task in ("noised", "photographs"):
        classes = int(found.y.max()) + 1
        other = (y + torch.randint(1, classes, y.shape, generator=generator)) % classes
        y = torch.where(torch.rand(len(y), generator=generator) < WRONG, other, y)
    held_out = ({"x": found.x[rows], "y": found.y[rows]} for rows in (target, test))
    return Data({"x": found.x[train], "y": y}, *held_out)
