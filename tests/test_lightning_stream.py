"""A stream with live shares inside Lightning's Trainer, against our own loop on the same stream."""

import pytest
import torch
from lightning.pytorch import Callback
from problems import image_loss
from small_datasets import make_small
from test_lightning import OPTIONS, trainer_of, weights
from test_lightning_resume import OnStream, Saves
from torch import nn
from torch.utils.data import DataLoader

from selectflow import Selector
from selectflow.control.shares import AutoShares
from selectflow.data import PoolStream
from selectflow.integrations.lightning import SelectCallback

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")

KEEP, STEPS = 3, 12
SHARES = AutoShares(delay=3, memory=10, prior=2)  # one pool is peeked at, one drawn by Lightning


def write_sources(root):
    """Three sources of 40, 20 and 7 images, which hold the number that is their label."""
    for place, (name, count) in enumerate({"a": 40, "b": 20, "c": 7}.items()):
        make_small(root / name, count, per_shard=6, first=6 * place)
    return {name: root / name for name in "abc"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def stream_of(sources, **options):
    return PoolStream(sources, **{"pool": 10, "seed": 5, "shares": SHARES} | options)


class OnSources(OnStream):
    def __init__(self, seed=0):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 46)).double()


class Noted(Callback):
    """The shares of a stream after each batch."""

    def __init__(self, stream):
        self.stream, self.shares, self.logged = stream, [], []

    def on_train_batch_end(self, trainer, *args):
        self.shares.append(self.stream.shares)
        self.logged.append(float(trainer.callback_metrics["data/share/b"]))


def target_of(sources):
    return [next(PoolStream(sources["b"], pool=10, seed=0))]


def trained(folder, sources, saves=None, seed=0, resume=None, how=None, **options):
    module, stream = OnSources(seed), stream_of(sources, **how or {})
    selection, noted = (
        SelectCallback(image_loss, target_of(sources), KEEP, **OPTIONS),
        Noted(stream),
    )
    callbacks = [selection, noted, *([] if saves is None else [saves])]
    trainer = trainer_of(folder, selection, callbacks=callbacks, max_epochs=-1, **options)
    trainer.fit(module, selection.pools(stream), ckpt_path=resume)
    return module, noted


def own_loop(stream, sources):
    module = OnSources()
    (optimizer,), (schedule,) = module.configure_optimizers()
    selector = Selector(
        module, optimizer, image_loss, [as_double(batch) for batch in target_of(sources)], KEEP,
        **OPTIONS, lr_scheduler=schedule["scheduler"], max_grad_norm=0.5,
    )  # fmt: skip
    for batch in selector.stream(stream):
        module.trained_on.append(batch["key"])
        optimizer.zero_grad()
        image_loss(module, batch).mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        schedule["scheduler"].step()
        if len(module.trained_on) == STEPS:
            return module
    raise AssertionError("the stream has ended")


def as_double(batch):
    return batch | {"image": batch["image"].double()}


class Doubled(PoolStream):
    def __next__(self):
        return as_double(super().__next__())


def test_keeps_draws_and_learns_what_our_own_loop_does(tmp_path, sources):
    own = Doubled(sources, pool=10, seed=5, shares=SHARES)
    expected = own_loop(own, sources)
    module, noted = trained(tmp_path, sources, max_steps=STEPS)
    assert module.trained_on == expected.trained_on
    assert torch.equal(weights(module), weights(expected))
    assert noted.shares[-1] == own.shares
    assert noted.shares[-1]["b"] > 0.4  # of 20 / 67 at first
    assert noted.logged == pytest.approx([shares["b"] for shares in noted.shares], rel=1e-6)


@pytest.mark.parametrize(
    ("saved", "done", "options"),
    [
        (7, 7, {"max_steps": STEPS}),
        (3, 6, {"max_steps": 6, "accumulate_grad_batches": 2,
                "how": {"shares": AutoShares(delay=6, memory=10, prior=2)}}),
        (7, 7, {"max_steps": STEPS, "limit_train_batches": 5}),
        (7, 7, {"max_steps": STEPS, "how": {"num_workers": 2, "memory_gib": 0, "shares":
                                            AutoShares(delay=8, memory=10, prior=2)}}),
    ],
    ids=["no length", "accumulated", "in an epoch", "workers"],
)  # fmt: skip
def test_resumes_from_lightnings_checkpoint_while_shares_move(
    tmp_path, sources, saved, done, options
):
    path = tmp_path / "saved.ckpt"
    whole, expected = trained(tmp_path, sources, Saves(path, saved), **options)
    assert expected.shares[3] != expected.shares[done] != expected.shares[-1]
    rest, noted = trained(tmp_path, sources, seed=9, resume=path, **options)
    assert rest.trained_on == whole.trained_on[done:]
    assert noted.shares == expected.shares[done:]
    assert torch.equal(weights(rest), weights(whole))


def test_live_shares_in_a_loader_are_refused(sources):
    selection = SelectCallback(image_loss, target_of(sources), KEEP)
    with pytest.raises(ValueError, match="got one in a DataLoader; give the stream itself"):
        selection.pools(DataLoader(stream_of(sources), batch_size=None))
    fixed = DataLoader(stream_of(sources, shares="size"), batch_size=None)
    assert selection.pools(fixed).loader is fixed
