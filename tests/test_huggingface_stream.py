"""A stream with live shares in transformers' Trainer, against our own loop on the same stream."""

import shutil
from itertools import islice

import pytest
import torch
from test_huggingface import (
    LENGTH,
    POOL,
    VOCABULARY,
    SelectTrainer,
    llama,
    own_loop,
    texts,
    trainer_for,
    weights,
)
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from selectflow.control.shares import AutoShares
from selectflow.data import DataError, Manifest, PoolStream, write_manifest, write_split
from selectflow.integrations.huggingface import STATE_FILE
from selectflow.integrations.stream_batches import StreamBatches

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

SHARES = AutoShares(delay=2, memory=10, prior=2)  # the look-ahead peeks at one pool


def write_sources(root):
    """Two sources of texts: tokens follow from each other, as in the target set, or do not."""
    parts = {"text": texts(120, 1)[::2], "noise": torch.randint(1, VOCABULARY, (90, LENGTH))}
    for name, rows in parts.items():
        samples = [{"__key__": f"s{at}", "npy": row.numpy()} for at, row in enumerate(rows)]
        shards = write_split(root / name, "train", samples, 20)
        manifest = Manifest({"train": tuple(shards)}, ("npy",), {"name": name}, 0)
        write_manifest(root / name, manifest)
    return {name: root / name for name in parts}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"))


def stream_of(sources, **options):
    return PoolStream(sources, **{"pool": POOL, "seed": 5, "shares": SHARES} | options)


class Noted(TrainerCallback):
    """The shares of a stream after each step."""

    def __init__(self, stream):
        self.stream, self.shares = stream, []

    def on_step_end(self, args, state, control, **kwargs):
        self.shares.append(self.stream.shares)


def trained(folder, stream, model=None, resume=None, **options):
    trainer = trainer_for(folder, model, train_dataset=stream, **options)
    noted = Noted(stream)
    trainer.add_callback(noted)
    trainer.train(resume)
    return trainer, noted.shares


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_draws_and_learns_what_our_own_loop_does(tmp_path, sources, accumulation):
    stream = stream_of(sources)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 12}
    if accumulation == 2:  # it peeks at the pools of an update
        stream = stream_of(sources, shares=AutoShares(delay=5, memory=10, prior=2))
    own = stream_of(sources, shares=stream._option)
    expected_model, expected = own_loop(12, accumulation, own)
    trainer, shares = trained(tmp_path, stream, **options)
    assert trainer.trained_on == expected
    assert len(expected) == 12 * accumulation
    assert torch.equal(weights(trainer.model), weights(expected_model))
    assert shares[-1] == own.shares
    assert shares[-1]["text"] > 0.5  # of 60 / 150 at first
    (logged,) = [line for line in trainer.state.log_history if "loss" in line]
    assert logged["data/share/text"] == shares[9]["text"]


@pytest.mark.parametrize(
    "how",
    [{}, {"num_workers": 2, "memory_gib": 0, "shares": AutoShares(delay=6, memory=10, prior=2)}],
    ids=["in memory", "workers"],
)
def test_resumes_with_the_trainers_checkpoint_while_shares_move(tmp_path, sources, how):
    """Stopped at an odd step, with a pool peeked at, which is drawn again."""
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 13}
    whole, expected = trained(tmp_path, stream_of(sources, **how), **options)
    assert expected[4] != expected[8] != expected[12]
    rest, shares = trained(
        tmp_path, stream_of(sources, **how), llama(9), str(tmp_path / "checkpoint-5"), **options
    )
    assert rest.trained_on == whole.trained_on[5:]
    assert shares == expected[5:]
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_a_second_training_goes_on_behind_the_first(tmp_path, sources):
    stream, seen = stream_of(sources, shares={"text": 1, "noise": 1}), []

    def noting(candidates):
        seen.extend(candidates.pool["input_ids"].tolist())
        return candidates.influence()

    trainer = trainer_for(
        tmp_path, train_dataset=stream, select_options={"strategy": noting}, max_steps=3
    )
    trainer.train()
    trainer.train()
    pools = islice(stream_of(sources, shares={"text": 1, "noise": 1}), 6)
    assert seen == [row for pool in pools for row in pool["tokens"].tolist()]


def test_images_and_labels_have_the_names_of_transformers(tmp_path):
    samples = [{"__key__": f"s{at}", "npy": torch.full((1, 2, 2), at).float().numpy(), "cls": at}
               for at in range(4)]  # fmt: skip
    shards = write_split(tmp_path, "train", samples, 4)
    write_manifest(tmp_path, Manifest({"train": tuple(shards)}, ("cls", "npy"), {"name": "i"}, 0))
    stream = PoolStream(tmp_path, pool=4, seed=0, shuffle=False)
    (batch,) = islice(StreamBatches(stream, default_data_collator), 1)
    assert batch["labels"].tolist() == [0, 1, 2, 3]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert set(batch) == {"labels", "pixel_values"}


@pytest.mark.parametrize("cut", [{"pool": POOL + 1}, {"rank": 1, "world_size": 2}])
def test_a_stream_that_is_cut_otherwise(tmp_path, sources, cut):
    with pytest.raises(ValueError, match=r"cut as the Trainer trains, \{'pool': 8, 'rank': 0"):
        trainer_for(tmp_path, train_dataset=stream_of(sources, **cut)).train()


def test_a_checkpoint_that_does_not_know_the_stream(tmp_path, sources):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    checkpoint = tmp_path / "checkpoint-3"
    trained(tmp_path, stream_of(sources), **options)
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=r"must go on from where it was saved, but .*selector.pt"):
        trained(tmp_path, stream_of(sources), None, str(checkpoint), **options)
    shutil.rmtree(tmp_path)
    trainer_for(tmp_path, **options).train()  # on a dataset
    with pytest.raises(ValueError, match="the checkpoint has no position of the stream"):
        trained(tmp_path, stream_of(sources), None, str(checkpoint), **options)


def test_live_shares_in_a_loader_of_ones_own_are_never_told(tmp_path, sources):
    class Wrapped(SelectTrainer):
        def get_train_dataloader(self):
            return DataLoader(stream_of(sources), batch_size=None, collate_fn=by_names)

    def by_names(pool):
        return {"input_ids": pool["tokens"], "labels": pool["tokens"]}

    with pytest.raises(DataError, match=r"the Trainer and Lightning with selection, do so where"):
        trainer_for(tmp_path, kind=Wrapped).train()
