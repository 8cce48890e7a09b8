"""The commands that make, list, show and verify shards."""

import numpy as np
import pytest
from PIL import Image

from selectflow.cli import main
from selectflow.data import (
    read_split,
)


def test_commands_make_list_show_and_verify(tmp_path, capsys):
    root = str(tmp_path / "d")
    assert main(["shards", "make", "digits", "--root", root, "--pack", "16"]) == 0
    assert "train 1197, target 200, test 400" in capsys.readouterr().out
    assert main(["shards", "ls", root]) == 0
    listed = capsys.readouterr().out
    assert "samples of a record: 16" in listed
    assert "pack=16" in listed
    sheet = tmp_path / "sheet.png"
    assert main(["shards", "head", root, "--count", "4", "--image", str(sheet)]) == 0
    assert "train-000000/000000/3 cls=3" in capsys.readouterr().out
    first = next(iter(read_split(root, "train")))["npy"][0]
    with Image.open(sheet) as image:
        assert image.size == (192, 192)
        shown = np.asarray(image)[2:94, 2:94, 0]
    corners = shown[4::12, 4::12][:8, :8]  # an image of 8 x 8 was enlarged to 92
    assert np.abs(corners / 255 - first).max() < 0.01
    assert main(["shards", "verify", root]) == 0


@pytest.mark.parametrize(
    "dataset", ["digit", "folder", "folder:", "torchvision", "text:", "code:x"]
)
def test_unknown_datasets_are_refused(tmp_path, dataset, capsys):
    with pytest.raises(SystemExit):
        main(["shards", "make", dataset, "--root", str(tmp_path)])
    assert (
        "must be digits, torchvision:NAME, folder:PATH, text, text:SOURCE or code, got"
        in capsys.readouterr().err
    )


def test_options_of_another_dataset_are_refused(tmp_path, capsys):
    assert main(["shards", "make", "text", "--root", str(tmp_path), "--size", "3"]) == 2
    assert "--size must be left out for text, got 3; it takes" in capsys.readouterr().err
