"""Selection inside transformers' Trainer against our own loop on the same stream."""

import logging
import shutil

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from selectflow import AutoHorizon, Selector
from selectflow.integrations.huggingface import STATE_FILE, SelectTrainerMixin
from selectflow.models.language import causal_lm_losses

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

VOCABULARY, LENGTH, NUM, POOL, KEEP = 31, 12, 240, 8, 3


class SelectTrainer(SelectTrainerMixin, Trainer):
    """Remembers what it trained on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.trained_on = [*getattr(self, "trained_on", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def llama(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def texts(num, seed):
    """Rows of which each token follows from the one before, or, in every second row, does not."""
    torch.manual_seed(seed)
    rows = torch.randint(1, VOCABULARY, (num, LENGTH))
    for at in range(1, LENGTH):
        rows[::2, at] = (rows[::2, at - 1] * 3 + 1) % VOCABULARY
    return rows


def dataset(rows):
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, **options):
    return TrainingArguments(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": POOL, "max_steps": 50,
            "per_device_eval_batch_size": 10, "learning_rate": 3e-3, "weight_decay": 0.1,
            "lr_scheduler_type": "cosine", "warmup_steps": 5, "report_to": "none",
            "train_sampling_strategy": "sequential", "save_strategy": "no", "seed": 3,
            "logging_steps": 10, "disable_tqdm": True, "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        | options
    )  # fmt: skip


def trainer_for(
    folder, model=None, select_options=None, kind=SelectTrainer, train_dataset=None, **options
):
    return kind(
        model or llama(),
        arguments(folder, **options),
        train_dataset=train_dataset or dataset(texts(NUM, 1)),
        target=dataset(texts(40, 2)[::2]),
        keep=KEEP,
        select_options={"horizon": 2, "interval": 2} | (select_options or {}),
    )


def by_tokens(batch):
    return {"input_ids": batch["tokens"]}


def own_loop(num_steps, accumulation, stream=None):
    """Our loop as the README shows it, with the Trainer's schedule, decay and clipping."""
    model, rows = llama(), texts(NUM, 1)
    named = list(model.named_parameters())
    decayed = [p for name, p in named if "norm" not in name]
    others = [p for name, p in named if "norm" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=3e-3, fused=True,
    )  # fmt: skip
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 5, num_steps)
    target = texts(40, 2)[::2]
    selector = Selector(
        model, optimizer, lambda model, batch: causal_lm_losses(model, by_tokens(batch)),
        [{"tokens": part} for part in target.split(10)],
        keep=KEEP, horizon=2, interval=2, lr_scheduler=scheduler, max_grad_norm=1.0, seed=3,
        pools_per_update=accumulation,
    )  # fmt: skip

    def pools():
        if stream is not None:
            yield from selector.stream(stream)
        for _ in range(10):  # epochs: no look-ahead goes beyond the end of one
            yield from selector.stream({"tokens": pool} for pool in rows.split(POOL))

    model.train()
    kept = []
    for index, batch in enumerate(pools(), 1):
        ids = batch["tokens"]
        kept.append(ids.tolist())
        num_items = accumulation * ids[:, 1:].numel()
        model(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss.backward()
        if index % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if index == num_steps * accumulation:
                break
    return model, kept


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("accumulation", "num_steps"), [(1, 20), (2, 18)])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation, num_steps):
    """With 2 pools to a step beyond the end of an epoch, which has 30 of them."""
    expected_model, expected = own_loop(num_steps, accumulation)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": num_steps}
    trainer = trainer_for(tmp_path, **options)
    trainer.train()
    assert trainer.trained_on == expected
    assert len(expected) == num_steps * accumulation
    assert torch.equal(weights(trainer.model), weights(expected_model))


@pytest.mark.parametrize(
    ("accumulation", "saved", "num_steps"),
    [(1, 7, 16), pytest.param(2, 23, 50, marks=pytest.mark.slow)],
)
def test_resumes_with_the_trainers_checkpoint(tmp_path, accumulation, saved, num_steps):
    """Stopped at an odd step, in the middle of an interval and with pools peeked at."""
    options = {"save_strategy": "steps", "save_steps": saved, "max_steps": num_steps}
    options["gradient_accumulation_steps"] = accumulation
    folder, last = tmp_path / "whole", 2 * saved
    whole = trainer_for(folder, **options)
    whole.train()
    assert (folder / f"checkpoint-{last}" / STATE_FILE).exists()
    rest = trainer_for(folder, model=llama(seed=9), **options)
    rest.train(resume_from_checkpoint=str(folder / f"checkpoint-{saved}"))
    assert rest.trained_on == whole.trained_on[saved * accumulation :]
    assert torch.equal(weights(rest.model), weights(whole.model))
    shutil.rmtree(folder / f"checkpoint-{num_steps}")
    again = trainer_for(folder, model=llama(seed=9), **options)
    again.train(resume_from_checkpoint=True)  # the last one there is
    assert again.trained_on == whole.trained_on[last * accumulation :]


def test_a_checkpoint_without_a_selector(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    trainer_for(tmp_path, **options).train()
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with caplog.at_level(logging.WARNING, "selectflow"):
        trainer_for(tmp_path, **options).train(str(tmp_path / "checkpoint-3"))
    assert "selector.pt does not exist" in caplog.text
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer_for(tmp_path / "nothing", **options).train(resume_from_checkpoint=True)


def test_the_pools_are_what_the_trainer_would_have_trained_on(tmp_path):
    """Neither drawing the target nor selecting moves the generators that shuffle."""

    class Watched(SelectTrainer):
        def get_batch_samples(self, *args):
            found = super().get_batch_samples(*args)
            if self.selector.last.pool is not None:
                pools.append(self.selector.last.pool["input_ids"])
            return found

    class Plain(Trainer):
        def training_step(self, model, inputs, *args):
            batches.append(inputs["input_ids"])
            return super().training_step(model, inputs, *args)

    pools, batches = [], []
    options = {"max_steps": 6, "train_sampling_strategy": "random"}
    trainer_for(tmp_path, kind=Watched, **options).train()
    Plain(llama(), arguments(tmp_path, **options), train_dataset=dataset(texts(NUM, 1))).train()
    assert torch.equal(torch.stack(pools), torch.stack(batches))


def test_what_was_selected_is_logged(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=6, logging_steps=3)
    seen, select = [], Selector.select

    def watched(self, *args):
        found = select(self, *args)
        seen.append(self.last)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Selector, "select", watched)
        trainer.train()
    first, second = [line for line in trainer.state.log_history if "loss" in line]
    for line, part in ((first, seen[:3]), (second, seen[3:])):
        kept = [selection.scores[selection.indices].mean().item() for selection in part]
        assert line["select/score_mean"] == pytest.approx(sum(kept) / 3)
        assert line["select/target_loss"] == pytest.approx(sum(s.target_loss for s in part) / 3)
        assert line["select/kept_fraction"] == KEEP / POOL
        assert line["select/horizon"] == 2
    total = sum(selection.seconds for selection in seen)
    assert second["perf/select_s"] == pytest.approx(total)


def test_scores_follow_the_precision_of_training(tmp_path):
    """bf16 training puts the model's forward under autocast, and scoring too."""
    scores = {}
    for bf16 in (False, True):
        trainer = trainer_for(tmp_path, max_steps=1, bf16=bf16)
        trainer.train()
        scores[bf16] = trainer.selector.last.scores
        assert torch.is_autocast_enabled("cpu") is False
    assert not torch.equal(scores[False], scores[True])
    assert torch.corrcoef(torch.stack(list(scores.values())))[0, 1] > 0.99
    ids = torch.ones(1, 4, dtype=torch.long)
    prepared = trainer.model_wrapped(input_ids=ids).logits  # training itself goes on under autocast
    assert not torch.equal(prepared, llama_like(trainer.model)(input_ids=ids).logits)


def llama_like(model):
    """The same weights in a model that no trainer has prepared."""
    plain = llama()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_target_that_is_not_there(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer._target = "clean"
    with pytest.raises(
        ValueError, match=r"target must be a dataset or the name.*got 'clean'.*\[\]"
    ):
        trainer.train()


def test_an_optimizer_that_is_not_modelled(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer must be one of torch.optim.AdamW.*Adafactor"):
        trainer_for(tmp_path, optim="adafactor").train()


def test_a_last_pool_that_is_too_small(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train_dataset = dataset(texts(POOL + KEEP - 1, 1))
    with pytest.raises(ValueError, match="at least keep = 3 examples, got 2"):
        trainer.train()


# None is transformers' choice. The embedding gets a hook that torch.func does not take.
CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trainer that keeps its activations, after its training."""
    trainer = trainer_for(tmp_path_factory.mktemp("plain"), max_steps=6)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kwargs", CHECKPOINTING)
def test_activations_that_are_recomputed_change_nothing(tmp_path, plain, kwargs):
    recomputed = trainer_for(
        tmp_path, max_steps=6, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    )
    assert recomputed.train().metrics["train_loss"] > 0
    assert recomputed.trained_on == plain.trained_on
    assert torch.equal(weights(recomputed.model), weights(plain.model))
    assert recomputed.model.is_gradient_checkpointing
    embedding = recomputed.model.get_input_embeddings()
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():  # the hook is there again, for whoever trains on
        assert embedding(ids).requires_grad


def test_steps_that_are_not_selected_for_train_on_as_many_of_any(tmp_path):
    trainer = trainer_for(tmp_path, select_options={"score_every": 2}, max_steps=4, logging_steps=2)
    trainer.train()
    assert [len(batch) for batch in trainer.trained_on] == [KEEP] * 4
    for line in trainer.state.log_history[:2]:
        assert line["select/kept_fraction"] == KEEP / POOL
        assert line["select/share_of_steps"] == 0.5


def test_while_nothing_is_selected_each_pool_gives_one_batch(tmp_path):
    """The Trainer counts on as many batches as pools: a random part of each, also when resumed."""
    off = {"horizon": AutoHorizon(gap=3000, largest=0, costs={0: 2.0}), "interval": 1}
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    whole = trainer_for(tmp_path / "whole", select_options=off, **options)
    whole.train()
    pools = texts(NUM, 1).split(POOL)
    assert len(whole.trained_on) == 12
    for batch, pool in zip(whole.trained_on, pools, strict=False):
        assert len(batch) == POOL // (POOL // KEEP)
        assert all(row in pool.tolist() for row in batch)
    assert whole.selector.last.scores is None
    assert whole.selector.num_steps == 12
    resumed = trainer_for(tmp_path / "resumed", select_options=off, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.trained_on == whole.trained_on[5:]
    assert torch.equal(weights(resumed.model), weights(whole.model))
