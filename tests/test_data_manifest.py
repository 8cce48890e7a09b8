"""Manifests that are missing or malformed."""

import pytest
from small_datasets import make_small

from selectflow.data import (
    DataError,
    read_manifest,
)


def test_missing_dataset_says_what_to_do(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"root must be a dataset directory .*; write the data"):
            read_manifest(root)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "\xff",
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"sha256"', '"md5"'),
        lambda text: text.replace("train-000000.tar", "../train-000000.tar"),
        lambda text: text.replace('"count": 4', '"count": "4"'),
        lambda text: text.replace('"fields"', '"columns"'),
    ],
)
def test_malformed_manifest_is_refused(tmp_path, edit):
    make_small(tmp_path)
    path = tmp_path / "manifest.json"
    text = edit(path.read_text())
    assert text != path.read_text()
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json must be a manifest of version 1, got"):
        read_manifest(tmp_path)
