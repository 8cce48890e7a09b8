"""Selection inside TRL's SFTTrainer, with LoRA and without."""

import datasets
import peft
import pytest
import torch
import trl
from test_huggingface import CHECKPOINTING, KEEP, POOL, VOCABULARY, llama, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
)

from selectflow.core.lookahead import Policy
from selectflow.core.update import Update
from selectflow.integrations.huggingface import SelectTrainerMixin

# between the three libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]


def tokenizer():
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def conversations(num, seed):
    """Prompts of 2 to 5 words and completions of 3 to 7."""
    torch.manual_seed(seed)

    def some(least, most):
        num = int(torch.randint(least, most + 1, ()))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (num,)))

    rows = [{"prompt": some(2, 5) + " ", "completion": some(3, 7)} for _ in range(num)]
    return datasets.Dataset.from_list(rows)


class SelectSFTTrainer(SelectTrainerMixin, trl.SFTTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.trained_on = [*getattr(self, "trained_on", []), inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def sft_trainer(folder, lora=False, **options):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": POOL, "max_steps": 6,
        "per_device_eval_batch_size": 10, "learning_rate": 3e-3, "report_to": "none",
        "save_strategy": "steps", "save_steps": 4, "disable_tqdm": True, "use_cpu": True,
        "max_length": 16, "dataset_num_proc": None, "logging_steps": 2, "seed": 3,
        "dataloader_pin_memory": False, "bf16": False, "gradient_checkpointing": None,
    }  # fmt: skip
    return SelectSFTTrainer(
        llama(),
        trl.SFTConfig(**(settings | options)),
        train_dataset=conversations(80, 1),
        eval_dataset={"target": conversations(20, 2)},
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        target="target",
        keep=KEEP,
        select_options={"horizon": 2},
    )


@pytest.mark.parametrize("lora", [False, True])
def test_sft_trainer_selects_and_resumes(tmp_path, lora):
    whole = sft_trainer(tmp_path, lora)
    whole.train()
    assert all(len(batch) == KEEP for batch in whole.trained_on)
    rest = sft_trainer(tmp_path, lora)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert rest.trained_on == whole.trained_on[4:]
    assert torch.equal(weights(rest.model), weights(whole.model))
    line = next(line for line in whole.state.log_history if "loss" in line)
    assert {"select/score_mean", "num_tokens"} <= line.keys()  # ours and theirs


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def plain(tmp_path_factory, request):
    """A trainer that keeps its activations, after its training; whether with LoRA."""
    trainer = sft_trainer(tmp_path_factory.mktemp("plain"), request.param)
    trainer.train()
    return trainer, request.param


@pytest.mark.parametrize("kwargs", CHECKPOINTING)
def test_activations_that_are_recomputed_change_nothing(tmp_path, plain, kwargs):
    """SFTConfig recomputes them unless told otherwise; under LoRA peft sets a hook, too."""
    plain, lora = plain
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    recomputed = sft_trainer(tmp_path, lora, **options)
    recomputed.train()
    assert recomputed.trained_on == plain.trained_on
    assert torch.equal(weights(recomputed.model), weights(plain.model))
    assert any(
        getattr(part, "gradient_checkpointing", False) for part in recomputed.model.modules()
    )


def test_sft_scores_are_of_the_completions(tmp_path):
    """Scores follow from the tokens that SFTTrainer trains on, each with padding of its own."""
    trainer = sft_trainer(tmp_path, max_steps=1)
    trainer.train()
    selection, (gamma, *_) = (
        trainer.selector.last,
        trainer.selector.state.ahead.sensitivities,
    )
    model = llama()  # as it was at the first step
    named = dict(model.named_parameters())
    mean = (selection.pool["labels"][:, 1:] != -100).sum() / POOL
    for at in range(POOL):
        row = {k: v[at] for k, v in selection.pool.items()}
        ids, labels = (row[k][row["attention_mask"].bool()][None] for k in ("input_ids", "labels"))
        counted = int((labels != -100).sum())
        assert 3 < counted < ids.shape[1]  # some are the prompt's; the end of the text is another
        loss = model(input_ids=ids, labels=labels).loss
        grads = torch.autograd.grad(loss, list(named.values()))
        score = -sum((g * gamma[name]).sum() for name, g in zip(named, grads, strict=True))
        score *= counted / mean  # as it weighs in training
        assert selection.scores[at].item() == pytest.approx(score.item(), rel=2e-2, abs=1e-5)


def test_lora_leaves_nothing_outside_the_adapters(tmp_path):
    """Neither the states of a look-ahead, its adjoints and sensitivities, nor the optimizer's."""
    trainer = sft_trainer(tmp_path, lora=True)
    states, adjoints = [], []
    look_ahead, adjoint = Policy.look_ahead, Update.adjoint

    def watched(self, horizon, outlook, *args):
        states.extend(outlook.state)
        return look_ahead(self, horizon, outlook, *args)

    def swept(self, after, *args, **options):
        gamma, before = adjoint(self, after, *args, **options)
        adjoints.extend([gamma, *after, *before])
        return gamma, before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "look_ahead", watched)
        patch.setattr(Update, "adjoint", swept)
        trainer.train()
    for held in (states, adjoints, trainer.selector.state.ahead.sensitivities):
        names = [name for params in held for name in params]
        assert names
        assert all("lora_" in name for name in names)
    states = trainer.optimizer.optimizer.state
    adapters = {p for n, p in trainer.model.named_parameters() if "lora_" in n}
    assert set(states) == adapters
    assert len(adapters) == 8


def test_batches_without_rows_are_refused(tmp_path):
    trainer = sft_trainer(tmp_path)

    def flattened(examples):
        ids = torch.tensor([[token for row in examples for token in row["input_ids"]]])
        return {"input_ids": ids, "labels": ids}

    trainer.data_collator = flattened
    with pytest.raises(ValueError, match="got a single row; switch padding_free off"):
        trainer.train()


def pairs(num):
    rows = conversations(num, 1)
    return rows.rename_column("completion", "chosen").add_column("rejected", rows["completion"])


def trainer_of(name, folder, rows=None, model=None, settings=None, **options):
    module = trl
    if not hasattr(trl, f"{name}Trainer"):
        module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    kind = type(f"Select{name}", (SelectTrainerMixin, getattr(module, f"{name}Trainer")), {})
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": POOL, "max_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "dataloader_pin_memory": False,
    } | (settings or {})  # fmt: skip
    rows = pairs(24) if rows is None else rows
    trainer = kind(
        llama() if model is None else model,
        args=getattr(module, f"{name}Config")(**settings),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tokenizer(),
        target=None,
        keep=KEEP,
        select_options={"horizon": 0},
        **options,
    )
    trainer._target = trainer.eval_dataset  # with its columns
    return trainer


@pytest.mark.parametrize("name", ["CPO", "ORPO", "KTO"])
def test_trainers_whose_examples_have_no_one_text(tmp_path, name):
    """A row is an example, but the default loss is not theirs."""
    rows = pairs(24)
    if name == "KTO":
        rows = conversations(24, 1).add_column("label", [True, False] * 12)
    references = {"ref_model": llama()} if name == "KTO" else {}
    trainer = trainer_of(name, tmp_path, rows=rows, **references)
    says = (
        "where SelectKTO trains LlamaForCausalLM by 0.5; pass loss_fn"
        if name == "KTO"
        else f"batches of Select{name}, got LlamaForCausalLM with .*chosen_input_ids.*pass loss_fn"
    )
    with pytest.raises(ValueError, match=says):
        trainer.train()


def test_texts_without_padding_are_one_row(tmp_path):
    """As SFTTrainer's own collator makes them."""
    trainer = sft_trainer(tmp_path)
    trainer.data_collator.padding_free = True
    trainer._target_batches = lambda: [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
    with pytest.raises(ValueError, match=r"SFTTrainer has not: all .* Switch padding_free off"):
        trainer.train()


def test_packed_texts_are_selected(tmp_path):
    trainer = sft_trainer(
        tmp_path, packing=True, packing_strategy="wrapped", max_length=8, max_steps=2
    )
    trainer.train()
    assert all(len(batch) == KEEP for batch in trainer.trained_on)


def test_the_comparison_of_losses_leaves_no_metrics(tmp_path):
    trainer = sft_trainer(tmp_path, max_steps=1)
    seen = []
    start = trainer.start_selecting

    def started():
        start()
        trainer._metrics["eval"]["entropy"].append(7.0)

    trainer.start_selecting = started
    training_step = trainer.training_step

    def stepped(*args, **kwargs):
        seen.append({k: list(v) for k, v in trainer._metrics["eval"].items()})
        return training_step(*args, **kwargs)

    trainer.training_step = stepped
    trainer.train()
    assert seen == [{"entropy": [7.0]}]


def test_another_loss_of_sft_is_refused(tmp_path):
    """The one that weighs tokens by their probability."""
    with pytest.raises(ValueError, match="SelectSFTTrainer trains LlamaForCausalLM by"):
        sft_trainer(tmp_path, loss_type="dft").train()
