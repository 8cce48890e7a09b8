"""Selection inside Lightning's Trainer in two processes, against our own loop in two."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from problems import image_loss
from test_lightning import KEEP, OPTIONS, POOL, Module, examples, target, trainer_of
from test_lightning_resume import Saves
from test_lightning_scorer import scorer_of
from test_lightning_stream import trained as trained_on_stream
from test_lightning_stream import write_sources
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from selectflow import Selector
from selectflow.integrations.lightning import SelectCallback

# Lightning's own, of its loaders, loggers and of torch
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_STEPS = 11


def as_torchrun():
    """What torchrun tells a process of itself."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}  # the group is there already


class Single(Module):
    def __init__(self, seed=0):
        super().__init__(seed)
        self.double()


class Sharded(Single):
    def configure_model(self):
        if not isinstance(next(self.parameters()), DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[1], mesh=mesh)
            fully_shard(self, mesh=mesh)


def strategy(name):
    if name == "ddp":
        return "ddp"
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class Resumable(DataLoader):
    """Knows how many batches it gave in its epoch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num, self.skip = 0, 0

    def __iter__(self):
        skip, self.skip, self.num = self.skip, 0, 0
        for batch in super().__iter__():
            self.num += 1
            if self.num > skip:
                yield batch

    def state_dict(self):
        return {"num": self.num}

    def load_state_dict(self, state):
        self.skip = state["num"]


def by_trainer(folder, name, resume=None, step=None, scorer=None):
    as_torchrun()
    module = (Sharded if name == "fsdp2" else Single)(9 if resume else 0)
    share = list(map(doubled, target()[dist.get_rank() :: 2]))
    selection = SelectCallback(image_loss, share, KEEP, **OPTIONS, scorer=scorer)
    logged = []

    class Notes(Saves):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            logged.append(trainer.callback_metrics["select/score_mean"].item())

    trainer = trainer_of(
        folder, selection, callbacks=[selection, Notes(f"{folder}/saved", step)],
        strategy=strategy(name), devices=2, max_steps=NUM_STEPS, max_epochs=-1,
        precision="32-true",
    )  # fmt: skip
    loader = Resumable(list(map(doubled, examples(20 * POOL))), batch_size=POOL)
    trainer.fit(module, selection.pools(loader), ckpt_path=resume)
    assert isinstance(trainer.train_dataloader.sampler, DistributedSampler)
    return module.trained_on, whole(module), logged


def whole(module):
    """All weights, of shards too."""
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def by_hand(name, scorer=None):
    """Our loop, under DistributedDataParallel or fully_shard."""
    inner = model = Single()
    if name == "ddp":
        model = DistributedDataParallel(inner)
    else:
        fully_shard(inner.net[1])
        fully_shard(inner)
    (optimizer,), (schedule,) = inner.configure_optimizers()
    sampler = DistributedSampler(range(20 * POOL))  # as Lightning puts it in
    selector = Selector(
        model, optimizer, image_loss, [doubled(b) for b in target()[dist.get_rank() :: 2]],
        KEEP, **OPTIONS, lr_scheduler=schedule["scheduler"], max_grad_norm=0.5,
        scorer=scorer,
    )  # fmt: skip
    kept = []
    pools = DataLoader(examples(20 * POOL), batch_size=POOL, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in selector.stream(map(doubled, pools)):
            kept.append(batch["key"])
            # the whole module is called, as Lightning does through its wrapper
            nn.functional.cross_entropy(model(batch["image"]), batch["label"]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            schedule["scheduler"].step()
            if len(kept) == NUM_STEPS:
                return kept, whole(inner)


def doubled(batch):
    return batch | {"image": batch["image"].double()}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_keeps_and_learns_what_our_own_loop_does_and_resumes(two, tmp_path, name):
    """In an epoch of 10 pools and a part of the next."""
    found = two.run(by_trainer, str(tmp_path), name, None, 5)
    expected = two.run(by_hand, name)
    for (kept, trained, _), (others, ours) in zip(found, expected, strict=True):
        assert kept == others
        assert (trained - ours).abs().max() < 1e-10
    assert found[0][0] != found[1][0]
    assert found[0][2] == found[1][2]  # means over the processes
    rest = two.run(by_trainer, str(tmp_path), name, f"{tmp_path}/saved", None)
    for (kept, trained, logged), (others, ours, before) in zip(rest, found, strict=True):
        assert kept == others[5:]
        assert torch.equal(trained, ours)
        assert logged == before[5:]


def scored_by_trainer(folder, name, resume=None, step=None):
    """The callback joins the scorer's model."""
    scorer = scorer_of(seed=8 if resume else 5)
    return *by_trainer(folder, name, resume, step, scorer), whole(scorer.model)


def scored_by_hand(name):
    scorer = scorer_of()
    joined = replace(scorer, model=DistributedDataParallel(scorer.model))
    return *by_hand(name, joined), whole(scorer.model)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_scorer_is_joined_and_resumed(two, tmp_path, name):
    """Whole in each process, also where the trained model is sharded."""
    found = two.run(scored_by_trainer, str(tmp_path), name, None, 5)
    expected = two.run(scored_by_hand, name)
    rest = two.run(scored_by_trainer, str(tmp_path), name, f"{tmp_path}/saved", None)
    for rank in range(2):
        (kept, model, _, scorer), (others, same, twin) = found[rank], expected[rank]
        assert kept == others
        assert (model - same).abs().max() < 1e-10
        assert torch.equal(scorer, found[0][3])
        assert (scorer - twin).abs().max() < 1e-10
        assert rest[rank][0] == kept[5:]
        assert torch.equal(rest[rank][1], model)
        assert torch.equal(rest[rank][3], scorer)
    assert found[0][0] != found[1][0]


def on_stream(folder, sources, resume=None):
    as_torchrun()
    module, noted = trained_on_stream(
        folder, sources, None if resume else Saves(f"{folder}/saved", 4), 9 if resume else 0,
        resume, {"rank": dist.get_rank(), "world_size": 2}, strategy="ddp", devices=2, max_steps=10,
    )  # fmt: skip
    return module.trained_on, noted.shares, whole(module)


def test_shares_of_a_stream_follow_both_processes_and_resume(two, tmp_path):
    sources = write_sources(tmp_path)
    all_of_it = two.run(on_stream, str(tmp_path / "out"), sources)
    rest = two.run(on_stream, str(tmp_path / "out"), sources, str(tmp_path / "out" / "saved"))
    shares = all_of_it[0][1]
    assert shares == all_of_it[1][1]
    assert shares[3] != shares[6] != shares[9]
    assert all_of_it[0][0] != all_of_it[1][0]
    for (kept, those, trained), (others, expected, ours) in zip(rest, all_of_it, strict=True):
        assert kept == others[4:]
        assert those == expected[4:]
        assert torch.equal(trained, ours)
