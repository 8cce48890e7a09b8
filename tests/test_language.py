"""Losses of causal language models: by hand, position by position, and as transformers has them."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from selectflow import Selector
from selectflow.models.language import IGNORED, causal_lm_losses, token_window

VOCABULARY = 23


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


MODELS = pytest.mark.parametrize("build", [gpt2, llama])


def tokens(num=3, length=8):
    return torch.randint(1, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(1))


def by_position(model, ids, counted=None):
    """Mean of -log p over the counted positions of one row, each read off the logits."""
    logits = model(input_ids=ids[None]).logits[0]
    terms = [
        -logits[i - 1].log_softmax(0)[ids[i]]
        for i in range(1, len(ids))
        if counted is None or i in counted
    ]
    return torch.stack(terms).mean()


@MODELS
def test_a_loss_is_the_mean_over_the_tokens_that_count(build):
    model, ids = build(), tokens()
    labels = ids.clone()
    labels[0, :5] = IGNORED  # a prompt
    labels[1, 3] = IGNORED
    found = causal_lm_losses(model, {"input_ids": ids, "labels": labels, "key": ["a", "b", "c"]})
    counted = [{5, 6, 7}, {1, 2, 4, 5, 6, 7}, None]
    expected = [by_position(model, row, which) for row, which in zip(ids, counted, strict=True)]
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)
    alone = model(input_ids=ids[:1], labels=labels[:1]).loss
    assert found[0].item() == pytest.approx(alone.item(), rel=1e-6)  # theirs is in float32


@MODELS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(build, side):
    model, ids = build(), tokens(1, 6)
    padding = torch.zeros(1, 3, dtype=torch.long)
    order = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat(
        [torch.zeros_like(part) if part is padding else part * 0 + 1 for part in order], 1
    )
    batch = {"input_ids": torch.cat(order, 1), "attention_mask": mask}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = causal_lm_losses(model, batch)
    assert found.item() == pytest.approx(by_position(model, ids[0]).item(), rel=1e-12)
    if (
        side == "left"
    ):  # nor is the first token predicted from padding where positions are not given
        del batch["position_ids"]
        labels = torch.cat([padding - 1, ids], 1)
        labels[labels == -1] = IGNORED
        assert torch.equal(
            causal_lm_losses(model, batch), causal_lm_losses(model, {**batch, "labels": labels})
        )


@MODELS
def test_packed_documents_count_as_if_each_stood_alone(build):
    model, ids = build(), tokens(1, 9)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    found = causal_lm_losses(model, {"input_ids": ids, "position_ids": position_ids})
    first, second = by_position(model, ids[0, :4]), by_position(model, ids[0, 4:])
    expected = (3 * first + 4 * second) / 7
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_logits_in_half_precision_are_read_in_float32():
    class Half(nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot(input_ids, VOCABULARY) * 7.3
            return transformers.modeling_outputs.CausalLMOutput(logits=logits.bfloat16())

    ids = tokens()
    found = causal_lm_losses(Half(), {"input_ids": ids})
    kept = Half()(ids, False).logits.float().log_softmax(-1)
    expected = -kept[:, :-1].gather(2, ids[:, 1:, None])[..., 0].mean(1)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        {"labels": torch.full((3, 8), IGNORED).index_fill(1, torch.tensor([0]), 5)},
        {"attention_mask": torch.tensor([[1] * 8, [1] + [0] * 7, [1] * 8])},
    ],
    ids=["labels", "mask"],
)
def test_an_example_without_a_token_that_counts_is_named(extra):
    batch = {"input_ids": tokens(), "key": ["a", "b", "c"]} | extra
    named = "keys a, b, c" if "labels" in extra else "keys b"
    with pytest.raises(ValueError, match=f"at least one token that counts.*got none for {named};"):
        causal_lm_losses(gpt2(), batch)


def test_a_model_that_keeps_its_logits_to_itself():
    class Fused(nn.Module):
        def forward(self, input_ids, use_cache):
            return transformers.modeling_outputs.CausalLMOutput(loss=torch.zeros(()))

    with pytest.raises(TypeError, match=r"must return logits.*fused cross-entropy off"):
        causal_lm_losses(Fused(), {"input_ids": tokens()})


def test_more_logits_than_tokens():
    class Prefixed(nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.zeros(len(input_ids), 12, VOCABULARY)
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    with pytest.raises(ValueError, match=r"shape \(3, 8\).*got \(3, 12, 23\).*prompt tuning"):
        causal_lm_losses(Prefixed(), {"input_ids": tokens()})


# --- a window of the tokens -----------------------------------------------------------------


def test_a_window_is_the_first_tokens():
    ids = tokens(3, 12)
    batch = {"input_ids": ids, "labels": ids.clone(), "key": ["a", "b", "c"], "length": ids[:, 0]}
    cut = token_window(5)(batch)
    assert torch.equal(cut["input_ids"], ids[:, :5])
    assert torch.equal(cut["labels"], ids[:, :5])
    assert cut["key"] == batch["key"]
    assert cut["length"] is batch["length"]
    assert token_window(12)(batch) == batch


def test_a_window_begins_before_the_first_token_that_counts():
    ids = torch.arange(1, 13).repeat(4, 1)
    labels = ids.clone()
    labels[1, :7] = IGNORED  # a prompt of 7: the first token that counts is in the middle
    labels[2, :11] = IGNORED  # the last token alone
    mask = torch.ones_like(ids)
    mask[3, :5] = 0  # padding on the left
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    cut = token_window(4)(batch)
    assert cut["input_ids"][:, 0].tolist() == [1, 6, 9, 6]
    model = gpt2()
    for row in range(4):
        start = int(cut["input_ids"][row, 0]) - 1
        alone = {name: tensor[row : row + 1, start : start + 4] for name, tensor in batch.items()}
        assert torch.equal(
            causal_lm_losses(model, cut)[row : row + 1], causal_lm_losses(model, alone)
        )


def test_scores_on_a_window_are_those_of_the_cut_text():
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pool, target = {"input_ids": tokens(6, 12)}, {"input_ids": tokens(4, 12).flip(1)}
    scores = []
    for view, cut in ((token_window(5), lambda b: b), (None, token_window(5))):
        selector = Selector(
            model, optimizer, causal_lm_losses, [cut(target)], keep=2, horizon=0, score_view=view
        )
        kept = selector.select(cut(pool))
        scores.append(selector.last.scores)
        if view:
            assert torch.equal(kept["input_ids"], pool["input_ids"][selector.last.indices])
    assert torch.equal(*scores)


@pytest.mark.parametrize("nominal", ["random", "policy"])
def test_the_look_ahead_trains_on_whole_texts(nominal):
    """Lengths tell which batches the gradients were taken on."""
    model, lengths = gpt2(), []

    def loss_fn(model, batch):
        if torch.is_grad_enabled():
            lengths.append(tuple(batch["input_ids"].shape))
        return causal_lm_losses(model, batch)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = Selector(
        model, optimizer, loss_fn, [{"input_ids": tokens(3, 12)}], keep=2, horizon=1,
        score_view=token_window(5), nominal=nominal, derivative="central",
    )  # fmt: skip
    selector.select({"input_ids": tokens(6, 12)})
    immediate = [(3, 5)] if nominal == "policy" else []
    assert lengths == [*immediate, (2, 12), (3, 5)]


def test_a_view_that_drops_examples():
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pool = {"input_ids": tokens(6, 12)}
    selector = Selector(
        model, optimizer, causal_lm_losses, [pool], keep=2,
        score_view=lambda batch: {"input_ids": batch["input_ids"][:3]},
    )  # fmt: skip
    with pytest.raises(ValueError, match="must return the same 6 examples, got 3"):
        selector.select(pool)


def test_windows_that_cannot_be():
    with pytest.raises(ValueError, match="num_tokens must be at least 2"):
        token_window(1)
    batch = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 1, 8, 8)}
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \(2, 8\)"):
        token_window(4)(batch)


def test_labels_of_whole_examples_are_refused():
    batch = {"input_ids": tokens(), "labels": torch.zeros(len(tokens()), dtype=torch.long)}
    with pytest.raises(ValueError, match=r"one for each token, shape \(.*\), got \(\d+,\)"):
        causal_lm_losses(gpt2(), batch)


def test_other_inputs_are_given_where_forward_names_them():
    class Named(torch.nn.Module):
        def forward(self, input_ids, use_cache, shift=None, **others):
            assert not others
            logits = torch.zeros(*input_ids.shape, 99)
            logits[..., 0] = shift[:, None]
            return SimpleNamespace(logits=logits)

    ids = torch.zeros(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "shift": torch.tensor([0.0, 5.0]), "key": ["a", "b"]}
    found = causal_lm_losses(Named(), batch)
    expected = [math.log(99), math.log(math.exp(5.0) + 98) - 5.0]
    assert torch.allclose(found, torch.tensor(expected))
