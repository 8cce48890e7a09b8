"""A small model that scores inside transformers' Trainer, against our own loop."""

import pytest
import torch
import transformers
from test_huggingface import VOCABULARY, own_loop, trainer_for, weights

from selectflow import Scorer
from selectflow.models.language import causal_lm_losses

# between the libraries, each at its own pace
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def small():
    """A GPT-2 beside the Llama that is trained."""
    torch.manual_seed(9)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=8, n_layer=1, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def beside(model, loss_fn=None):
    return Scorer(model, torch.optim.AdamW(model.parameters(), 1e-2), loss_fn, max_grad_norm=1.0)


def by_tokens(model, batch):
    return causal_lm_losses(model, {"input_ids": batch["tokens"]})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_keeps_and_learns_what_our_own_loop_does(tmp_path, accumulation):
    """The scorer's loss is that of the Trainer's task: dropout comes from the selector's seed."""
    own, theirs = small(), small()
    model, expected = own_loop(20, accumulation, scorer=beside(own, by_tokens))
    trainer = trainer_for(
        tmp_path,
        select_options={"scorer": beside(theirs)},
        gradient_accumulation_steps=accumulation,
        max_steps=20,
    )
    trainer.train()
    assert trainer.trained_on == expected
    assert torch.equal(weights(trainer.model), weights(model))
    assert torch.allclose(weights(theirs), weights(own), atol=1e-6)
    losses = [line["select/scorer_loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_it_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    saving = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    scorers = [small() for _ in range(2)]
    whole = trainer_for(tmp_path, select_options={"scorer": beside(scorers[0])}, **saving)
    whole.train()
    rest = trainer_for(tmp_path, select_options={"scorer": beside(scorers[1])}, **saving)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert rest.trained_on == whole.trained_on[6:]
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert torch.equal(weights(scorers[1]), weights(scorers[0]))
