"""Documents packed into one row: as padded, and as each alone, to rounding."""

import runpy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_language import MODELS, VOCABULARY
from test_language_trainer import KINDS, configured

from selectflow import Selector
from selectflow.core.derivatives import Derivatives
from selectflow.core.params import Params
from selectflow.core.passes import Objective
from selectflow.data import TextOptions, make_text, read_batches
from selectflow.models.language import IGNORED, causal_lm_losses, document_positions, token_window

TRAINER = runpy.run_path(str(Path(__file__).parents[1] / "trainers/language.py"))
END = 0
SIZES = [[5, 2, 6], [3, 3, 7]]  # of the documents of two rows, their end tokens included
FORMS = pytest.mark.parametrize("form", ["exact", "central"])


def documents():
    """The documents of each row."""
    generator = torch.Generator().manual_seed(2)

    def document(size):
        text = torch.randint(1, VOCABULARY, (size - 1,), generator=generator)
        return torch.cat([text, torch.tensor([END])])

    return [[document(size) for size in sizes] for sizes in SIZES]


def flat():
    return [document for row in documents() for document in row]


def packed(separate=True):
    ids = torch.stack([torch.cat(row) for row in documents()])
    return {"input_ids": ids} | ({"position_ids": document_positions(ids, END)} if separate else {})


def padded():
    found = flat()
    length = max(map(len, found))
    ids = torch.full((len(found), length), END)
    labels = torch.full_like(ids, IGNORED)
    for row, document in enumerate(found):
        ids[row, : len(document)] = labels[row, : len(document)] = document
    return {"input_ids": ids, "labels": labels}


def alone():
    return [{"input_ids": document[None]} for document in flat()]


def combined(by_document):
    """Means over the documents of each row, weighted by the tokens that are predicted."""
    weights = torch.tensor(SIZES, dtype=torch.float64) - 1
    return (by_document.view(2, 3) * weights).sum(1) / weights.sum(1)


def test_positions_by_hand():
    tokens = torch.tensor([[7, 8, 0, 9, 0, 0, 5], [0, 4, 4, 4, 0, 4, 4]])
    expected = [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 0, 1]]
    assert document_positions(tokens, END).tolist() == expected


@MODELS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_agree(build, attention):
    model = build()
    model.set_attn_implementation(attention)
    single = torch.cat([causal_lm_losses(model, batch) for batch in alone()])
    assert torch.allclose(causal_lm_losses(model, padded()), single, rtol=1e-12)
    found = causal_lm_losses(model, packed())
    assert torch.allclose(found, combined(single), rtol=1e-12)
    joined = causal_lm_losses(model, packed(separate=False))
    assert (joined - found).abs().min() > 1e-4


@MODELS
@FORMS
def test_scores_agree(build, form):
    """Derivatives along one direction, by forward mode and by differences."""
    model = build()
    params = Params(model.named_parameters()).detach()
    torch.manual_seed(3)
    direction = params.map(torch.randn_like)
    derivatives = Derivatives(Objective(model, causal_lm_losses), form)
    slopes = [
        torch.cat([derivatives.directional(params, direction, batch)[1] for batch in batches])
        for batches in (alone(), [padded()], [packed()])
    ]
    bound = {"rtol": 1e-10 if form == "exact" else 1e-5}
    assert torch.allclose(slopes[1], slopes[0], **bound)
    assert torch.allclose(slopes[2], combined(slopes[0]), **bound)


@MODELS
def test_curvature_agrees(build):
    """A Hessian product of the packed rows, by forward over reverse mode, against one by one."""
    model = build()
    params = Params(model.named_parameters()).detach()
    torch.manual_seed(3)
    direction = params.map(torch.randn_like)
    derivatives = Derivatives(Objective(model, causal_lm_losses), "exact")
    found = derivatives.hessian_product(params, direction, packed())
    total = params.zeros_like()
    sizes = [size - 1 for row in SIZES for size in row]
    for index, (batch, size) in enumerate(zip(alone(), sizes, strict=True)):
        share = size / (sum(SIZES[index // 3]) - 3) / 2
        total = total.add(derivatives.hessian_product(params, direction, batch), share)
    # Llama's norms are in float32 inside
    assert (found - total).norm() < 1e-6 * total.norm()


@MODELS
def test_a_selector_scores_a_packed_row_as_its_documents(build):
    """At H = 0, where the sensitivity depends on the target alone."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scores = []
    for pool in (padded(), packed()):
        options = {"keep": 1, "horizon": 0, "derivative": "exact"}
        selector = Selector(model, optimizer, causal_lm_losses, [packed()], **options)
        selector.select(pool)
        scores.append(selector.last.scores)
    assert torch.allclose(scores[1], combined(scores[0]), rtol=1e-9)


def test_a_window_keeps_documents_apart():
    """A window that begins inside a document reads it from there."""
    from test_language import gpt2  # noqa: PLC0415

    model, row = gpt2(), documents()[0]
    ids = torch.cat(row)[None]
    batch = {"input_ids": ids, "position_ids": document_positions(ids, END)}
    seen = token_window(6)(batch)
    # of the second document only the first token is seen, which is not predicted
    expected = causal_lm_losses(model, {"input_ids": row[0][None]})
    assert torch.allclose(causal_lm_losses(model, seen), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_shards_of_packed_blocks(tmp_path, kind):
    """The trainer's loss of a block is that of the block cut at its end tokens."""
    text = {"rest": "pack", "block": 64, "num_target": 4, "num_test": 8, "num_train": 64}
    text |= {"source": f"jsonl:{short_texts(tmp_path)}", "target_domain": None}
    root = tmp_path / "text"
    data = {
        "name": "text", "root": root, "text": text, "pool": 8, "target_batch": 4,
        "separate_documents": True,
    }  # fmt: skip
    make_text(root, TextOptions(**text))
    task = TRAINER["build_task"](configured(tmp_path, data, KINDS[kind]))
    model = task.model.double().eval()
    batch = read_batches(root, "test", 8)[0]
    assert ((batch["tokens"] == 255).sum(1) > 1).all()
    found = task.loss_fn(model, batch)
    for row, loss in zip(batch["tokens"], found, strict=True):
        ends = [0, *((row == 255).nonzero().flatten() + 1).tolist(), len(row)]
        parts = [row[a:b][None] for a, b in pairwise(ends) if b - a > 1]
        sums = [causal_lm_losses(model, {"input_ids": p}) * (p.shape[1] - 1) for p in parts]
        expected = sum(sums) / sum(p.shape[1] - 1 for p in parts)
        assert torch.allclose(loss, expected, rtol=1e-10)
    joined = TRAINER["loss_fn"](255)(model, batch)
    assert (joined - found).abs().min() > 1e-6


def short_texts(tmp_path):
    path = tmp_path / "short.jsonl"
    lines = [f'{{"text": "{"word" * (n % 5 + 1)} {n}"}}' for n in range(600)]
    path.write_text("\n".join(lines))
    return path
