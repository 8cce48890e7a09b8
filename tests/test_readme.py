"""The README and the guide: snippets run or import as they stand, and what they name exists."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from problems import image_loss, images, mlp

from selectflow import Selector

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "notebooks/GUIDE.md", "notebooks/RESULTS.md")
GUIDE = (ROOT / "notebooks/GUIDE.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README + GUIDE, re.DOTALL)


def snippet():
    """The README's first Python block, and its lines that mention the selector."""
    return SNIPPETS[0], [line for line in SNIPPETS[0].splitlines() if "elect" in line]


def anchors(text):
    """What a link may point at: the headings, as GitHub spells them in an address."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}


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


@pytest.mark.parametrize("code", SNIPPETS[1:])
def test_what_the_other_snippets_import_exists(code):
    compile(code, "README.md", "exec")
    exec("\n".join(re.findall(r"^from selectflow.*$", code, re.MULTILINE)), {})


def test_the_options_are_those_of_the_selector_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`|required) \|", README + GUIDE, re.MULTILINE)
    parameters = list(inspect.signature(Selector).parameters.values())[4:]  # after the target
    assert dict(rows) == {
        parameter.name: ""
        if parameter.default is parameter.empty
        else repr(parameter.default).replace("'", '"')
        for parameter in parameters
    }


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)(?:`|\s+#)", README))))
def test_every_make_target_it_names_exists(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_to_a_file_and_a_heading(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8"))
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), link
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_program_and_configuration_it_names_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:tests|trainers|configs|selectflow)/[\w/]+\.\w+", text)):
        assert (ROOT / name).exists(), name
