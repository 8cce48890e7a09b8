"""What a Trainer trains on is what is scored, or it is refused: losses, rows, epochs, states."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_huggingface import (
    KEEP,
    NUM,
    POOL,
    VOCABULARY,
    SelectTrainer,
    arguments,
    dataset,
    llama,
    texts,
    trainer_for,
    weights,
)
from transformers import Trainer, TrainerCallback

from selectflow.core.batches import take
from selectflow.core.passes import Objective
from selectflow.models.language import causal_lm_losses

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def trainer_of(folder, model, examples, kind=SelectTrainer, loss_fn=None, **options):
    made = {} if loss_fn is None else {"loss_fn": loss_fn}
    return kind(
        model,
        arguments(folder, **{"max_steps": 2} | options.pop("arguments", {})),
        train_dataset=examples,
        target=examples[:POOL],
        keep=KEEP,
        select_options={"horizon": 0},
        **made,
        **options,
    )


def bert(kind):
    return getattr(transformers, f"BertFor{kind}")(
        transformers.BertConfig(**SIZE, num_labels=3, max_position_embeddings=32)
    )


def examples_of(labels):
    rows = texts(40, 1)
    return [{"input_ids": row, "labels": labels(row)} for row in rows]


def classified(row):
    return row[0] % 3


def test_losses_that_are_not_known_are_refused(tmp_path):
    """With the two lines that a user adds."""
    examples = [
        {"input_ids": row, "start_positions": row[0] % 4, "end_positions": row[0] % 4 + 2}
        for row in texts(40, 1)
    ]
    says = (
        "the default loss, that of causal language models, must take .* got "
        r"BertForQuestionAnswering with .*start_positions.*; pass loss_fn, as in\n"
        r"    def loss_fn\(model, batch\): return ...  # trained loss of each example.*\n"
        r"    trainer = SelectTrainer\(..., loss_fn=loss_fn\)"
    )
    with pytest.raises(ValueError, match=says):
        trainer_of(tmp_path, bert("QuestionAnswering"), examples).train()


def test_both_losses_are_named(tmp_path):
    """A causal model under a loss of its own, which the default cannot know."""
    torch.manual_seed(0)
    model, examples = llama().eval(), dataset(texts(40, 1))
    first = {name: value[None] for name, value in examples[0].items()}
    with torch.no_grad():
        ours = causal_lm_losses(model, first).item()
        true = ours + 10 * model.lm_head.weight.square().mean().item()
    with pytest.raises(ValueError, match=f"it is {ours:.6g}, where .* by {true:.6g};"):
        trainer_of(tmp_path, model, examples, kind=OwnLoss).train()


def test_a_loss_of_the_users_own_for_another_model(tmp_path, caplog):
    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")

    model, examples = bert("SequenceClassification"), examples_of(classified)
    with caplog.at_level(logging.WARNING, "selectflow"):
        trainer_of(tmp_path, model, examples, loss_fn=losses).train()
    assert "the loss that is scored" not in caplog.text
    with caplog.at_level(logging.WARNING, "selectflow"):
        trainer_of(tmp_path, model, examples, loss_fn=lambda *args: 2 * losses(*args)).train()
    assert caplog.text.count("the loss that is scored must be the one that is trained") == 1


def default_anyway(model, batch):
    return causal_lm_losses(model, batch)


class OwnLoss(SelectTrainer):
    num_calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.num_calls += 1
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + 10 * model.lm_head.weight.square().mean()


def smoothed(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return (
        F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum") / num_items_in_batch
    )


def test_a_trainer_with_another_loss(tmp_path, caplog):
    examples = dataset(texts(40, 1))
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0.1\); pass loss_fn"):
        trainer_of(tmp_path, llama(), examples, arguments={"label_smoothing_factor": 0.1}).train()
    with pytest.raises(ValueError, match=r"has a compute_loss_func\); pass loss_fn"):
        trainer_of(tmp_path, llama(), examples, compute_loss_func=smoothed).train()
    with pytest.raises(ValueError, match=r"OwnLoss trains LlamaForCausalLM by"):
        trainer_of(tmp_path, llama(), examples, kind=OwnLoss).train()
    with caplog.at_level(logging.WARNING, "selectflow"):
        trainer = trainer_of(tmp_path, llama(), examples, kind=OwnLoss, loss_fn=default_anyway)
        trainer.train()
    assert "OwnLoss trains LlamaForCausalLM by" in caplog.text
    assert trainer.num_calls == 2  # those of the comparison are taken back


def test_a_trainers_loss_that_takes_no_single_example(tmp_path, caplog):
    class Halves(SelectTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) < 2:
                raise ValueError("two halves, please")
            return super().compute_loss(model, inputs, *args, **kwargs)

    examples = dataset(texts(40, 1))
    with pytest.raises(ValueError, match="two halves") as caught:
        trainer_of(tmp_path, llama(), examples, kind=Halves).train()
    assert "took the loss of one example" in caught.value.__notes__[0]
    with caplog.at_level(logging.WARNING, "selectflow"):
        trainer_of(tmp_path, llama(), examples, kind=Halves, loss_fn=default_anyway).train()
    assert "on a single example with Halves.compute_loss (ValueError: two halves" in caplog.text


def test_comparing_changes_nothing(tmp_path):
    """Neither the numbers drawn, as by dropout in the training, nor the model."""

    class Uncompared(SelectTrainer):
        def start_selecting(self):
            super().start_selecting()
            self._is_compared = True

    found = {}
    for kind in (SelectTrainer, Uncompared):
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2
        )
        model = transformers.GPT2LMHeadModel(config)
        trainer = trainer_of(tmp_path, model, dataset(texts(40, 1)), kind=kind)
        trainer.train()
        found[kind] = weights(model), trainer.trained_on
    assert found[SelectTrainer][1] == found[Uncompared][1]
    assert torch.equal(found[SelectTrainer][0], found[Uncompared][0])


def llava():
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 4,
        "num_attention_heads": 2, "patch_size": 2, "projection_dim": 16,
    }  # fmt: skip
    text = SIZE | {"num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=VOCABULARY - 1, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def pictures(num):
    rows = texts(num, 1).clamp(max=VOCABULARY - 2)
    rows[:, :4] = VOCABULARY - 1  # where the four patches go
    labels = rows.masked_fill(rows == VOCABULARY - 1, -100)
    return [
        {"input_ids": row, "labels": label, "pixel_values": torch.randn(3, 4, 4)}
        for row, label in zip(rows, labels, strict=True)
    ]


def test_images_are_given_to_the_model(tmp_path):
    trainer = trainer_of(tmp_path, llava(), pictures(40), arguments={"max_steps": 1})
    trainer.train()
    selection, model = trainer.selector.last, llava().eval()
    for at in range(POOL):
        with torch.no_grad():
            true = model(**take(selection.pool, torch.tensor([at]))).loss
        assert selection.losses[at].item() == pytest.approx(true.item(), rel=1e-5)


def test_images_are_given_through_adapters():
    import peft  # noqa: PLC0415

    model = peft.get_peft_model(
        llava(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    batch = {name: value[None] for name, value in pictures(1)[0].items()}
    with torch.no_grad():
        assert causal_lm_losses(model, batch).item() == pytest.approx(
            model(**batch).loss.item(), rel=1e-5
        )
        without = causal_lm_losses(model, batch | {"pixel_values": torch.zeros(1, 3, 4, 4)})
    assert without.item() != causal_lm_losses(model, batch).item()


# --- rows -----------------------------------------------------------------------------------------


def collated(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def doubled(rows):
    return collated([*rows, *rows])


def patches(rows):
    """As of Qwen2-VL: the patches of all images in one tensor."""
    return {**collated(rows), "pixel_values": torch.zeros(3 * len(rows), 5)}


@pytest.mark.parametrize(
    ("collator", "says"),
    [
        (doubled, r"language models does not have several rows; pass loss_fn, as in"),
        (patches, r"that of patches in SelectTrainer has not.*input_ids: 8.*pixel_values: 24"),
        (lambda rows: rows, r"got 12 rows of 8 examples"),
        (lambda rows: collated(rows[:3]), r"got 3 rows of 8 examples"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_are_no_examples(tmp_path, collator, says, workers):
    options = {"dataloader_num_workers": workers, "remove_unused_columns": False}
    trainer = trainer_of(
        tmp_path, llama(), dataset(texts(40, 1)), data_collator=collated, arguments=options
    )
    target = trainer._target_batches()
    trainer._target_batches = lambda: target
    trainer.data_collator = collator
    with pytest.raises(ValueError, match=says):
        trainer.train()
    assert trainer.data_collator is collator


def test_rows_of_a_loader_of_the_users_own(tmp_path):
    class Own(SelectTrainer):
        def get_train_dataloader(self):
            return [doubled(self.train_dataset[:POOL])]

    with pytest.raises(ValueError, match="but the loader in Own made others: got 16 rows of 8"):
        trainer_of(tmp_path, llama(), dataset(texts(40, 1)), kind=Own).train()


def test_a_last_pool_of_one_example(tmp_path):
    """It is no batch without padding: of a share, its one example is kept."""
    trainer = trainer_of(tmp_path, llama(), dataset(texts(POOL + 1, 1)))
    trainer._keep = 0.25
    trainer.train()
    assert [len(batch) for batch in trainer.trained_on] == [2, 1]


# --- epochs ---------------------------------------------------------------------------------------


class Stops(TrainerCallback):
    """Ends each epoch after three steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 3 == 0


@pytest.mark.parametrize("horizon", [0, 3])
@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_an_epoch_that_is_stopped_leaves_nothing_to_the_next(tmp_path, horizon, sampling):
    """Each epoch begins with the pool that a plain Trainer begins it with."""
    seen = []

    class Watched(SelectTrainer):
        def training_step(self, *args, **kwargs):
            seen.append(self.selector.last.pool["input_ids"].tolist())
            return super().training_step(*args, **kwargs)

    class Plain(Trainer):
        def training_step(self, model, inputs, *args):
            batches.append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args)

    batches = []
    options = {"max_steps": -1, "num_train_epochs": 3, "train_sampling_strategy": sampling}
    trainer = trainer_for(
        tmp_path, kind=Watched, select_options={"horizon": horizon, "interval": 1}, **options
    )
    plain = Plain(llama(), arguments(tmp_path, **options), train_dataset=dataset(texts(NUM, 1)))
    for each in (trainer, plain):
        each.add_callback(Stops())
        each.train()
    assert seen == batches
    assert len(seen) == 9


# --- checkpoints ----------------------------------------------------------------------------------


def encoded(rows):
    """As every collator makes that calls `tokenizer.pad`."""
    return transformers.BatchEncoding(collated(rows))


@pytest.mark.parametrize("saved", [4, 7])
def test_an_open_window_of_the_rate_resumes(tmp_path, saved):
    def losses(model, batch):  # takes what the collator made
        return causal_lm_losses(model, {"input_ids": batch.input_ids, "labels": batch.labels})

    def made():
        return trainer_of(
            tmp_path, llama(), dataset(texts(96, 1)), data_collator=encoded, loss_fn=losses,
            arguments={"max_steps": 10, "save_strategy": "steps", "save_steps": saved},
        )  # fmt: skip

    found = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{saved}")):
        trainer = made()
        trainer._select_options |= {"lr": "auto", "horizon": 2}
        trainer.train(checkpoint)
        found.append((trainer.trained_on, weights(trainer.model)))
        window = trainer.selector.state.rate.window
        assert isinstance(window.target, transformers.BatchEncoding)
    whole, rest = found
    assert rest[0] == whole[0][saved:]
    assert torch.equal(rest[1], whole[1])


def test_a_module_with_the_losses_is_scored_as_before():
    """The default loss is that of single examples of a model in eval mode."""
    model = llama()
    batch = {"input_ids": texts(4, 5)}
    params = {name: p.detach() for name, p in model.named_parameters()}
    objective = Objective(model, causal_lm_losses)
    with objective.scoring(), torch.no_grad():
        found = objective.losses(params, batch)
    for row, loss in zip(batch["input_ids"], found, strict=True):
        true = model(input_ids=row[None], labels=row[None]).loss
        assert loss.item() == pytest.approx(true.item(), rel=1e-5)
