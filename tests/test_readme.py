"""The snippet that the README shows is run as it stands."""

import re
from pathlib import Path

import pytest
import torch
from problems import image_loss, images, mlp

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def snippet():
    """The README's first Python block, and its lines that mention the selector."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    return code, [line for line in code.splitlines() if "elect" in line]


def test_the_snippet_runs_and_learns():
    code, _ = snippet()
    torch.manual_seed(0)
    model = mlp()
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=3e-3),
        "loss_fn": image_loss,
        "target_batches": [images(32)],
        "pools": [images(64) for _ in range(150)],
    }
    test = images(200)
    before = float(image_loss(model, test).mean().detach())
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["selector"].last.indices) == 16
    assert float(image_loss(model, test).mean().detach()) < 0.85 * before


def test_adding_selection_takes_at_most_four_lines():
    _, added = snippet()
    assert 1 <= len(added) <= 4


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)(?:`|\s+#)", README))))
def test_every_make_target_it_names_exists(target):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)
