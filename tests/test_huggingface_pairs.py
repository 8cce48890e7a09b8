"""Examples of several rows in a Trainer: scored together, kept together or not at all."""

import peft
import pytest
import torch
import torch.nn.functional as F
from test_huggingface import KEEP, POOL, arguments, llama, texts, weights
from test_huggingface_parallel import as_torchrun
from test_huggingface_trl import conversations, trainer_of
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from selectflow.core.batches import take
from selectflow.integrations.example_rows import Grouped, RowsChecked, collated, grouped
from selectflow.integrations.huggingface import SelectTrainerMixin
from selectflow.models.language import token_window

# between the three libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def pairs(num):
    """One prompt each, and answers of unlike lengths."""
    rows = conversations(num, 1).rename_column("completion", "chosen")
    return rows.add_column("rejected", conversations(num, 2)["completion"])


def reward_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**{**llama().config.to_dict(), "num_labels": 1, "pad_token_id": 0})
    config.id2label = {0: "reward"}
    return LlamaForSequenceClassification(config)


def watched(trainer):
    """Lets a trainer remember the rows that it trains on."""
    step, trainer.trained_on = trainer.training_step, []

    def stepped(model, inputs, *args, **kwargs):
        trainer.trained_on.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = stepped
    return trainer


def pair_trainer(name, folder, args=None, **options):
    made = {"DPO": llama, "Reward": reward_model}[name]
    if name == "DPO":
        options = {"ref_model": llama(seed=4)} | options
    options = {"rows": pairs(24)} | options
    return watched(trainer_of(name, folder, model=made(), settings=args, **options))


def texts_of(batch, half):
    """Token ids of the chosen (0) or rejected (1) rows of a batch of TRL, without padding."""
    rows = zip(*(batch[k].chunk(2)[half] for k in ("input_ids", "attention_mask")), strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


SETTINGS = {
    "sigmoid": ("DPO", {"loss_type": ["sigmoid"]}),
    "hinge": ("DPO", {"loss_type": ["hinge"], "beta": 0.5}),
    "ipo and sigmoid": ("DPO", {"loss_type": ["ipo", "sigmoid"], "loss_weights": [0.3, 2.0]}),
    "precomputed": ("DPO", {"precompute_ref_log_probs": True}),
    "reward": ("Reward", {}),
    "centered": ("Reward", {"center_rewards_coefficient": 0.1}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pairs_are_scored_by_the_trainers_loss_and_kept_whole(tmp_path, name):
    """The score of a pair is -gamma . gradient of the Trainer's loss of this pair alone."""
    kind, args = SETTINGS[name]
    # the first step of Adam takes the sign of a gradient, whose size then says nothing
    trainer = pair_trainer(kind, tmp_path, {"learning_rate": 1e-2, "optim": "sgd"} | args)
    trainer._select_options |= {"horizon": 1}
    model = {"DPO": llama, "Reward": reward_model}[kind]()  # as it is at the first step
    model.config.pad_token_id = trainer.model.config.pad_token_id
    trainer.train()
    selection, (gamma, *_) = trainer.selector.last, trainer.selector.state.ahead.sensitivities
    pool, named = selection.pool, dict(trainer.model.named_parameters())
    for param, before in zip(named.values(), model.parameters(), strict=True):
        param.data.copy_(before)
    scores = []
    for at in range(POOL):
        pair = collated(take(pool, torch.tensor([at])))
        assert len(pair["input_ids"]) == 2
        grads = torch.autograd.grad(
            trainer.compute_loss(trainer.model, pair), list(named.values()), allow_unused=True
        )
        scores.append(
            -sum((g * gamma[k]).sum() for k, g in zip(named, grads, strict=True) if g is not None)
        )
    scores = torch.stack(scores)
    assert (selection.scores - scores).abs().max() < 1e-2 * scores.abs().max()

    (trained,) = trainer.trained_on
    whole = collated(pool)
    pairs_of_pool = list(zip(texts_of(whole, 0), texts_of(whole, 1), strict=True))
    kept = list(zip(texts_of(trained, 0), texts_of(trained, 1), strict=True))
    assert kept == [pairs_of_pool[at] for at in selection.indices.tolist()]
    assert len(kept) == KEEP
    assert selection.indices.tolist() == selection.scores.argsort(descending=True)[:KEEP].tolist()


def test_margins_go_with_their_pairs(tmp_path):
    rows = pairs(24).add_column("margin", [0.25 * at for at in range(24)])
    trainer = pair_trainer("Reward", tmp_path, rows=rows)
    trainer.train()
    (trained,), selection = trainer.trained_on, trainer.selector.last
    assert torch.equal(trained["margin"], selection.pool.rest["margin"][selection.indices])


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path):
    """Constants, so that neither scores nor the look-ahead move it; found with dropout off."""
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trainer = pair_trainer("DPO", tmp_path, {"max_steps": 2}, ref_model=None, peft_config=config)
    trainer.train()
    pool = trainer.selector.last.pool
    rows, plain = collated(pool), llama()
    with torch.no_grad():
        logits = plain(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, rows["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (logps * rows["completion_mask"][:, 1:]).sum(1).chunk(2)
    torch.testing.assert_close(pool.constants["ref_chosen_logps"], chosen)
    torch.testing.assert_close(pool.constants["ref_rejected_logps"], rejected)


@pytest.mark.parametrize("name", ["DPO", "Reward"])
def test_resumes_with_pairs(tmp_path, name):
    args = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer = pair_trainer(name, tmp_path, args)
        trainer._select_options |= {"horizon": 2, "interval": 2, "lr": "auto"}
        trainer.train(checkpoint)
        found.append((trainer.trained_on, weights(trainer.model)))
    (whole, ours), (rest, theirs) = found
    for expected, batch in zip(whole[2:], rest, strict=True):
        assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"loss_type": ["aot"]}, "loss_type must be one of .*aot"),
        ({"ld_alpha": 0.5}, "ld_alpha must be None, got 0.5"),
        ({"f_divergence_type": "js_divergence"}, "must be 'reverse_kl', got 'js_divergence'"),
        ({"use_weighting": True}, "use_weighting must be False"),
    ],
)
def test_other_losses_of_pairs_are_refused(tmp_path, args, says):
    with pytest.raises(ValueError, match=f"that of DPO pairs, must .*{says}.*; pass loss_fn, as"):
        pair_trainer("DPO", tmp_path, args).train()


def test_a_view_of_rows_is_refused(tmp_path):
    trainer = pair_trainer("DPO", tmp_path)
    trainer._select_options |= {"score_view": token_window(4)}
    with pytest.raises(ValueError, match="score_view must be None where an example has several"):
        trainer.train()


# --- rows of any collator -------------------------------------------------------------------------


def completions(num):
    """Three answers to a prompt, of which the first is right."""
    return [{"rows": [texts(3, at)[:, : 4 + at % 5]]} for at in range(num)]


def padded(rows):
    longest = max(len(row) for row in rows)
    fill = [F.pad(row, (0, longest - len(row))) for row in rows]
    mask = [(torch.arange(longest) < len(row)).long() for row in rows]
    return {"input_ids": torch.stack(fill), "attention_mask": torch.stack(mask)}


def interleaved(examples):
    return padded([row for each in examples for row in each["rows"][0]])


def in_blocks(examples):
    return padded([each["rows"][0][at] for at in range(3) for each in examples])


def reversed_blocks(examples):
    return padded([each["rows"][0][at] for at in range(3) for each in examples[::-1]])


def by_likelihood(model, batch):
    """Loss of each prompt, of the rows as the collator has them; first rows answer best."""
    num = len(batch["input_ids"]) // 3
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    means = logits.mean((1, 2))
    of = means.view(num, 3) if order["now"] is interleaved else means.view(3, num).T
    return F.cross_entropy(of, torch.zeros(num, dtype=torch.long), reduction="none")


order = {}


class Ranks(SelectTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return by_likelihood(model, inputs).mean()


@pytest.mark.parametrize("collator", [interleaved, in_blocks])
def test_completions_of_a_prompt_in_either_order(tmp_path, collator):
    """What is kept is the same, in the collator's order."""
    order["now"] = collator
    trainer = Ranks(
        llama(), arguments(tmp_path, max_steps=4, remove_unused_columns=False),
        train_dataset=completions(48), target=completions(6), keep=KEEP, loss_fn=by_likelihood,
        data_collator=collator, select_options={"horizon": 1},
    )  # fmt: skip
    watched(trainer).train()
    pool, last = trainer.selector.last.pool, trainer.selector.last
    assert isinstance(pool, Grouped)
    assert pool.is_blocks == (collator is in_blocks)
    chosen = take(pool, last.indices).rows["input_ids"]  # (KEEP, 3, L)
    rows = trainer.trained_on[-1]["input_ids"]
    expected = chosen.transpose(0, 1) if collator is in_blocks else chosen
    assert torch.equal(rows, expected.reshape(3 * KEEP, -1))
    best = sorted(zip(last.scores.tolist(), pool.rows["input_ids"].tolist(), strict=True))[-KEEP:]
    assert sorted(ids for _, ids in best) == sorted(chosen.tolist())


def test_both_orders_keep_the_same(tmp_path):
    found = []
    for collator in (interleaved, in_blocks):
        order["now"] = collator
        trainer = Ranks(
            llama(), arguments(tmp_path, max_steps=4, remove_unused_columns=False),
            train_dataset=completions(48), target=completions(6), keep=KEEP,
            loss_fn=by_likelihood, data_collator=collator, select_options={"horizon": 1},
        )  # fmt: skip
        trainer.train()
        found.append((trainer.selector.last.indices, weights(trainer.model)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


def test_rows_in_no_order_are_refused():
    checked = RowsChecked(reversed_blocks, "Ranks")
    with pytest.raises(ValueError, match="reversed_blocks in Ranks has another order; pass a data"):
        checked(completions(4))


@pytest.mark.parametrize("collator", [interleaved, in_blocks])
def test_groups_are_put_back_as_they_were(collator):
    batch = RowsChecked(collator, "Ranks")(completions(5))
    pool = grouped(batch, "Ranks")
    assert pool.rows["input_ids"].shape[:2] == (5, 3)
    for at, example in enumerate(completions(5)):
        length = example["rows"][0].shape[1]
        assert torch.equal(pool.rows["input_ids"][at, :, :length], example["rows"][0])
    again, plain = collated(pool), collator(completions(5))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_rows_that_went_astray_are_refused():
    batch = RowsChecked(in_blocks, "Ranks")(completions(5))
    half = {name: value[:6] for name, value in batch.items()}
    with pytest.raises(ValueError, match="switch dispatch_batches and split_batches"):
        grouped(half, "Ranks")


# --- processes ------------------------------------------------------------------------------------


def in_group(folder, port):
    as_torchrun(port)
    options = {"max_steps": 3, "learning_rate": 1e-2}
    options |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trainer = pair_trainer("DPO", folder, options, rows=pairs(48))
    trainer._select_options |= {"horizon": 2}
    trainer.train()
    kept = [
        list(zip(texts_of(batch, 0), texts_of(batch, 1), strict=True))
        for batch in trainer.trained_on
    ]
    stream = trainer.train_dataset
    given = [
        (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"])
        for row in stream
    ]
    return kept, given, weights(trainer.model)


@pytest.mark.slow
def test_pairs_in_two_processes(two, tmp_path):
    first, second = two.run(in_group, str(tmp_path), 29500)
    assert torch.equal(first[2], second[2])
    seen = [pair for kept, _, _ in (first, second) for batch in kept for pair in batch]
    assert len(seen) == 2 * 3 * KEEP
    assert all(pair in first[1] for pair in seen)
    assert len({str(pair) for pair in seen}) == len(seen)  # each pool is one process's alone
