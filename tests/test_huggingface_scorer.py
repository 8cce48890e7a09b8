"""A scorer inside transformers' Trainer against our own loop with one on the same stream."""

import pytest
import torch
import transformers
from test_huggingface import (
    KEEP,
    NUM,
    POOL,
    VOCABULARY,
    SelectTrainer,
    dataset,
    llama,
    texts,
    trainer_for,
    weights,
)
from test_huggingface_checks import SIZE, bert

from selectflow import Scorer, Selector
from selectflow.integrations.huggingface import STATE_FILE
from selectflow.integrations.task_losses import TaskLosses
from selectflow.models.language import causal_lm_losses

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

STEPS = 12


def small(seed=5):
    """A causal language model of another family, with dropout."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config).train()


def scorer_of(seed=5, **options):
    model = small(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8)
    return Scorer(model, optimizer, lr_scheduler=schedule, max_grad_norm=0.5, **options)


def trainer_with(folder, scorer, model=None, **options):
    how = {"max_steps": STEPS, "logging_steps": 3} | options
    return trainer_for(folder, model, {"scorer": scorer}, **how)


def own_loop(accumulation, scorer):
    """Our loop with a scorer, with the Trainer's schedule, decay and clipping."""
    model = llama()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if "norm" not in name], "weight_decay": 0.1},
            {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
        ],
        lr=3e-3, fused=True,
    )  # fmt: skip
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 5, STEPS)
    target = texts(40, 2)[::2]
    selector = Selector(
        model, optimizer, causal_lm_losses, [{"input_ids": part} for part in target.split(10)],
        keep=KEEP, horizon=2, interval=2, lr_scheduler=scheduler, max_grad_norm=1.0, seed=3,
        pools_per_update=accumulation, scorer=scorer,
    )  # fmt: skip
    model.train()
    kept, losses = [], []
    pools = ({"input_ids": pool} for pool in texts(NUM, 1).split(POOL))
    for index, batch in enumerate(selector.stream(pools), 1):
        ids = batch["input_ids"]
        kept.append(ids.tolist())
        losses.append(selector.last.scorer_loss)
        num_items = accumulation * ids[:, 1:].numel()
        model(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss.backward()
        if index % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if index == STEPS * accumulation:
            return model, kept, losses
    raise AssertionError("the stream has more pools")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation):
    own, ours = scorer_of(), scorer_of()
    expected_model, expected, losses = own_loop(accumulation, own)
    trainer = trainer_with(tmp_path, ours, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert trainer.trained_on == expected
    assert torch.equal(weights(trainer.model), weights(expected_model))
    assert torch.equal(weights(ours.model), weights(own.model))
    assert not torch.equal(weights(ours.model), weights(small()))
    logged = [log["select/scorer_loss"] for log in trainer.state.log_history if "loss" in log]
    num = 3 * accumulation
    parts = [losses[at : at + num] for at in range(0, len(losses), num)]
    known = [[loss for loss in part if loss is not None] for part in parts]
    assert logged == pytest.approx([sum(part) / len(part) for part in known])


def test_what_its_choice_is_worth_is_logged(tmp_path):
    trainer = trainer_with(tmp_path, scorer_of(), logging_steps=1)
    start = trainer.start_selecting

    def started():
        start()
        trainer.selector.state.worth.next_at = 4

    trainer.start_selecting = started
    trainer.train()
    gains = {
        log["step"]: log["select/scorer_gain"]
        for log in trainer.state.log_history
        if "select/scorer_gain" in log
    }
    assert list(gains) == [5]  # the step that is made next
    assert abs(gains[5]) < 1


@pytest.mark.parametrize(("accumulation", "saved"), [(1, 7), (2, 5)])
def test_resumes_with_the_trainers_checkpoint(tmp_path, accumulation, saved):
    """Stopped in the middle of an interval, with pools peeked at."""
    options = {"save_strategy": "steps", "save_steps": saved}
    options["gradient_accumulation_steps"] = accumulation
    first, second = scorer_of(), scorer_of(seed=8)
    whole = trainer_with(tmp_path, first, **options)
    whole.train()
    folder = tmp_path / f"checkpoint-{saved}"
    assert (folder / STATE_FILE).exists()
    rest = trainer_with(tmp_path, second, llama(seed=9), **options)
    rest.train(resume_from_checkpoint=str(folder))
    assert rest.trained_on == whole.trained_on[saved * accumulation :]
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert torch.equal(weights(second.model), weights(first.model))
    assert second.lr_scheduler.get_last_lr() == first.lr_scheduler.get_last_lr()


def test_a_loss_and_a_view_of_its_own_get_batches_of_the_collator(tmp_path):
    """The view gives the scorer the first half of each text, in other ids."""

    def half(batch):
        return {"ids": VOCABULARY - 1 - batch["input_ids"][:, :6]}

    def loss_fn(model, batch):
        seen.append(batch["ids"].shape[1])
        return causal_lm_losses(model, {"input_ids": batch["ids"]})

    seen = []
    trainer = trainer_with(tmp_path, scorer_of(loss_fn=loss_fn, view=half), max_steps=2)
    trainer.train()
    assert set(seen) == {6}
    pool = trainer.selector.last.pool
    assert pool["input_ids"].shape == (POOL, 12)


def test_under_bf16_it_is_under_autocast_too(tmp_path):
    def scores(autocast=None, **options):
        trainer = trainer_with(tmp_path, scorer_of(autocast=autocast), max_steps=1, **options)
        trainer.train()
        return trainer.selector.last.scores

    assert torch.equal(scores(bf16=True), scores(torch.bfloat16))
    assert not torch.equal(scores(bf16=True), scores())


def test_training_again_goes_on_with_the_same_scorer(tmp_path):
    scorer = scorer_of()
    trainer = trainer_with(tmp_path, scorer, max_steps=2)
    trainer.train()
    before = weights(scorer.model)
    trainer.train()
    assert trainer._select_options["scorer"].model is scorer.model
    assert not torch.equal(weights(scorer.model), before)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda: Scorer(bert("MaskedLM")), r"task, causal language models, got BertForMaskedLM"),
        (lambda: Scorer(torch.nn.Linear(2, 2)), r"must take the scorer.*Linear.*Scorer\(loss_fn"),
        (
            lambda: scorer_of(view=lambda batch: {"ids": batch["input_ids"]}),
            r"must take the scorer.*GPT2LMHeadModel.*or a view=",
        ),
    ],
    ids=["another task", "no language model", "no input_ids"],
)
def test_a_scorer_that_the_tasks_losses_do_not_take(tmp_path, scorer, message):
    trainer = trainer_with(tmp_path, scorer())
    trainer._select_options |= {"horizon": 0}
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_model_must_be_made_a_scorer(tmp_path):
    with pytest.raises(TypeError, match=r"must be a selectflow\.Scorer, got GPT2LMHeadModel"):
        trainer_with(tmp_path, small()).train()


def test_a_view_without_a_loss_in_chunks(tmp_path):
    trainer = trainer_with(tmp_path, scorer_of(view=lambda batch: batch))
    trainer._select_options["chunk_size"] = 4
    with pytest.raises(ValueError, match="scorer with a view must be given where pools"):
        trainer.train()


def classifier(num_labels, problem_type=None):
    config = transformers.BertConfig(
        **SIZE, num_labels=num_labels, problem_type=problem_type, max_position_embeddings=32
    )
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ((2,), "num_labels of the scorer's config must be the trained model's, 3, got 2"),
        ((3, "single_label_classification"), "problem_type.*regression, got single_label"),
    ],
)
def test_a_scorer_of_other_classes(tmp_path, scorer, message):
    trainer = trainer_for(tmp_path, classifier(3, "regression"))
    losses = TaskLosses(trainer)
    with pytest.raises(ValueError, match=message):
        losses.check_scorer(classifier(*scorer))
    losses.check_scorer(classifier(3, "regression"))


def test_a_scorer_without_a_type_of_labels_has_that_of_the_model(tmp_path):
    """Without it, values would be taken for several classes each."""
    trained, other = classifier(3, "regression"), classifier(3)
    losses = TaskLosses(trainer_for(tmp_path, trained))
    losses.check_scorer(other)
    batch = {"input_ids": texts(4, 1), "labels": torch.randn(4, 3)}
    other.eval()
    logits = other(input_ids=batch["input_ids"]).logits
    expected = ((logits - batch["labels"]) ** 2).mean(1)
    assert torch.allclose(losses(other, batch), expected)


def test_pairs_of_a_reference_model_need_a_loss_of_the_scorers(tmp_path):
    class DPOTrainer(SelectTrainer):
        """TRL's name is what tells the task."""

    trainer = trainer_for(tmp_path, kind=DPOTrainer, train_dataset=dataset(texts(8, 1)))
    with pytest.raises(ValueError, match="reference model is that of the trained one"):
        TaskLosses(trainer).check_scorer(small())
