"""Losses of a Trainer's task, by example, against the Trainer's own loss."""

import pytest
import torch
import transformers
from test_huggingface import KEEP, POOL, VOCABULARY, SelectTrainer, arguments, llama, texts, weights
from test_huggingface_checks import SIZE, bert

from selectflow.core.batches import take
from selectflow.integrations.task_losses import TaskLosses

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

DEEP = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}  # fmt: skip


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(**DEEP, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def one_value():
    config = transformers.BertConfig(**SIZE, num_labels=1, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def ends(row):
    """All but as many tokens, from the end, as the first one says."""
    return torch.where(torch.arange(len(row)) < len(row) - row[0] % 9, row, -100)


TASKS = {
    "causal": (llama, ends, "causal language models"),
    "gpt2": (gpt2, ends, "causal language models"),
    "masked": (lambda: bert("MaskedLM"), lambda row: torch.where(row % 3 == 0, row, -100),
               "masked language models"),
    "tokens": (lambda: bert("TokenClassification"), lambda row: ends(row).where(
        ends(row) == -100, row % 3), "classes of tokens"),
    "t5": (t5, ends, "sequence to sequence"),
    "bart": (bart, ends, "sequence to sequence"),
    "class": (lambda: bert("SequenceClassification"), lambda row: row[0] % 3, "classes"),
    "several": (lambda: bert("SequenceClassification"), lambda row: (row[:3] % 2).float(),
                "classes"),
    "value": (one_value, lambda row: row[0] / 7, "classes"),
}  # fmt: skip


def trainer_of(folder, name, kind=SelectTrainer, select_options=None, **options):
    torch.manual_seed(0)
    make, labels, _ = TASKS[name]
    examples = [{"input_ids": row, "labels": labels(row)} for row in texts(48, 1)]
    return kind(
        make(),
        arguments(folder, **{"max_steps": 3} | options),
        train_dataset=examples,
        target=examples[:POOL],
        keep=KEEP,
        select_options={"horizon": 1} | (select_options or {}),
    )


@pytest.mark.parametrize("name", TASKS)
def test_their_mean_is_the_loss_of_the_trainer(tmp_path, name):
    trainer = trainer_of(tmp_path, name)
    model, losses = trainer.model.eval(), TaskLosses(trainer)
    assert losses.task == TASKS[name][2]
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        found = losses(model, batch).double()
        together = trainer.compute_loss(model, dict(batch)).double()
        alone = [
            trainer.compute_loss(model, dict(take(batch, slice(at, at + 1)))).double()
            for at in range(POOL)
        ]
    torch.testing.assert_close(found.mean(), together, rtol=1e-5, atol=0)
    num = losses.num_tokens(batch)
    if num is None:
        counts = torch.ones(POOL)
    else:
        shift = TASKS[name][2].startswith("causal")
        counts = (batch["labels"][:, shift:] != -100).sum(1)
        assert num == counts.double().mean()
        assert len(set(counts.tolist())) > 3
    expected = torch.stack(alone).nan_to_num() * counts / counts.double().mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_selected_and_trained(tmp_path, name):
    """Checked against the Trainer's own loss of its first batch."""
    trainer = trainer_of(tmp_path, name)
    trainer.train()
    assert [len(batch) for batch in trainer.trained_on] == [KEEP] * 3


@pytest.mark.parametrize("chunk_size", [1, 3, "auto"])
def test_tokens_weigh_alike_in_all_chunks(tmp_path, chunk_size):
    scores = []
    for size in (None, chunk_size):
        trainer = trainer_of(tmp_path, "masked", select_options={"chunk_size": size}, max_steps=1)
        trainer.train()
        scores.append(trainer.selector.last.scores)
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-6)


def test_the_weight_of_a_token_is_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    chunked = {"chunk_size": 3}
    whole = trainer_of(tmp_path, "causal", select_options=chunked, **options)
    whole.train()
    rest = trainer_of(tmp_path, "causal", select_options=chunked, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.trained_on == whole.trained_on[2:]
    assert rest._task.mean_tokens == whole._task.mean_tokens
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_another_weight_of_examples_is_refused(tmp_path):
    """Their losses are right one by one, and not in a batch."""

    class ByExample(SelectTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            num = len(inputs["input_ids"])
            parts = [take(inputs, slice(at, at + 1)) for at in range(num)]
            return sum(super(ByExample, self).compute_loss(model, part) for part in parts) / num

    with pytest.raises(ValueError, match="but of the first 4 examples of the first micro-batch"):
        trainer_of(tmp_path, "causal", kind=ByExample).train()


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0.1\); pass loss_fn"):
        trainer_of(tmp_path, "bart", label_smoothing_factor=0.1).train()
