"""Whole splits: read as batches, and verified."""

import numpy as np
import pytest
import torch
from small_datasets import edit_shard, keys_of, make_small

from selectflow.cli import main
from selectflow.data import (
    DataError,
    make_digits,
    read_batches,
    read_split,
    verify,
)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    root = tmp_path_factory.mktemp("noisy")
    make_digits(root, label_noise=0.4, seed=7)
    return root


def test_batches_hold_the_split_once_in_stored_order(noisy):
    batches = read_batches(noisy, "target", 64)
    assert [len(batch["key"]) for batch in batches] == [64, 64, 64, 8]
    stored = list(read_split(noisy, "target"))
    assert keys_of(batches) == [each["__key__"] for each in stored]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [s["cls"] for s in stored]
    images = torch.cat([batch["image"] for batch in batches])
    np.testing.assert_array_equal(images.numpy(), np.stack([each["npy"] for each in stored]))
    with pytest.raises(DataError, match="batch_size must be >= 1"):
        read_batches(noisy, "target", 0)


def test_unknown_split_names_those_there_are(noisy):
    with pytest.raises(DataError, match=r"one of \['target', 'test', 'train'\], got 'val'"):
        read_batches(noisy, "val", 32)


def test_verify_names_every_fault(tmp_path, capsys):
    make_small(tmp_path)
    edit_shard(tmp_path, "train-000000.tar", lambda members: members[:3])
    (tmp_path / "train-000002.tar").unlink()
    assert [fault.shard for fault in verify(tmp_path)] == ["train-000000.tar", "train-000002.tar"]
    assert main(["shards", "verify", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "train-000000.tar must hold" in captured.out
    assert "got faults in train-000000.tar, train-000002.tar; restore them" in captured.err
