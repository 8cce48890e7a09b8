"""Auditing language models of transformers: their derivatives, and whence their weights."""

import subprocess
import sys

import pytest
import torch

from selectflow.audit.budget import RecordedRun
from selectflow.audit.influence import influence, leave_one_out
from selectflow.audit.problems import PROBLEMS, AuditedRun, spoiled
from selectflow.audit.study import AuditConfig, GPT2Model, LlamaModel
from selectflow.core.batches import take
from selectflow.fields import ConfigError

SECTIONS = {"gpt2": GPT2Model(block=8), "llama": LlamaModel(block=8, lora_rank=2)}


def small(kind, **changes):
    options = {"steps": 4, "batch": 3, "num_queries": 2, "warm_steps": 3, "horizons": ()}
    return AuditConfig(name="small", model=SECTIONS[kind], **options | changes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_leave_one_out_is_what_a_plain_loop_makes_of_the_rest(kind):
    """Through masks, rotary embeddings and adapters: `vmap` of the model against torch.optim."""
    run = AuditedRun(small(kind, schedule="constant"), 0)
    trajectory, queries = run.record(1e-3), run.queries()
    loss_fn = PROBLEMS[kind].loss_fn

    def retrained(removed):
        model = run.model().double().eval()
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), 1e-8, 0.01)
        for step in range(4):
            batch = run.batch(step)
            if step == removed:
                batch = take(batch, torch.tensor([0, 2]))
            optimizer.zero_grad()
            loss_fn(model, batch).mean().backward()
            optimizer.step()
        return loss_fn(model, queries).detach()

    truth = leave_one_out(trajectory, queries, [(1, 1), (3, 1)])
    before = retrained(None)
    for row, step in enumerate((1, 3)):
        expected = retrained(step) - before
        assert float((truth[row] - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_first_and_second_order_are_those_of_a_reweighted_run(kind):
    """Against central differences in the weight of one example, in float64."""
    run = AuditedRun(small(kind, schedule="constant", eps=1e-3), 0)
    trajectory, queries = run.record(1e-3), run.queries()
    loss_fn = PROBLEMS[kind].loss_fn

    def phi(alpha):
        model = run.model().double().eval()
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), 1e-3, 0.01)
        for step in range(4):
            weights = torch.full((3,), 1 / 3, dtype=torch.float64)
            if step == 1:
                weights += alpha * torch.tensor([1 / 6, -1 / 3, 1 / 6], dtype=torch.float64)
            optimizer.zero_grad()
            (loss_fn(model, run.batch(step)) * weights).sum().backward()
            optimizer.step()
        return loss_fn(model, queries).detach()

    e = 2e-3
    ahead, behind, here = phi(e), phi(-e), phi(0)
    first = influence(trajectory, queries, [(1, 1)])[0]
    second = influence(trajectory, queries, [(1, 1)], order=2)[0] - first
    slope, bend = (ahead - behind) / (2 * e), (ahead + behind - 2 * here) / (2 * e * e)
    assert float((first - slope).norm() / slope.norm()) < 1e-4
    assert float((second - bend).norm() / bend.norm()) < 1e-4


def test_adapters_alone_are_trained_on_the_warmed_weights():
    run = AuditedRun(small("llama"), 0)
    trained = run.record(1e-3).state(0).params
    assert all("lora_" in name for name in trained)
    # new adapters add nothing: the model begins as the plain training left it
    adapted = run.model().eval()
    queries = run.queries()
    with torch.no_grad():
        losses = PROBLEMS["llama"].loss_fn(adapted, queries)
        with adapted.disable_adapter():
            assert torch.equal(PROBLEMS["llama"].loss_fn(adapted, queries), losses)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_models_compute_in_the_precision_of_their_weights(kind):
    """A change of 1e-10 in the weights shows; through float32 it would not."""
    run = AuditedRun(small(kind), 0)
    model, queries = run.model().double().eval(), run.queries()
    loss_fn = PROBLEMS[kind].loss_fn
    param = next(param for param in model.parameters() if param.requires_grad)
    with torch.no_grad():
        before = loss_fn(model, queries)
        if kind == "llama":  # B of new adapters is 0, which hides A
            for name, other in model.named_parameters():
                if "lora_B" in name:
                    other.fill_(0.1)
            before = loss_fn(model, queries)
        param += 1e-10 * param.sign()
        small_change = loss_fn(model, queries) - before
        param += 1e-6 * param.sign()
        large_change = loss_fn(model, queries) - before
    ratio = float(large_change.norm() / small_change.norm())
    assert ratio == pytest.approx(10001, rel=0.01)


def test_pretrained_weights_from_a_folder(tmp_path):
    """The folder's weights and tokenizer are those that are audited."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    model = PROBLEMS["gpt2"].build(GPT2Model(block=8))
    model.save_pretrained(tmp_path)
    letters = {chr(code): code for code in range(256)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = small("gpt2").model_copy(
        update={"model": GPT2Model(block=8, pretrained=str(tmp_path)), "warm_steps": 0}
    )
    run = AuditedRun(config, 5)
    assert config.precision == torch.float32
    loaded = run.model()
    assert all(
        torch.equal(param, other)
        for param, other in zip(model.parameters(), loaded.parameters(), strict=True)
    )
    assert run.queries()["input_ids"].shape == (2, 8)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_weights_that_are_not_there(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    section = type(SECTIONS[kind])(pretrained=str(tmp_path / "none"))
    message = "model.pretrained must be a folder that save_pretrained wrote.*none.*hf download"
    for made in (PROBLEMS[kind].build, PROBLEMS[kind].examples):
        with pytest.raises(ConfigError, match=message):
            made(section)


def test_a_large_model_is_measured_a_few_reruns_at_a_time():
    config = small("gpt2", memory_gib=0.02)
    recorded = RecordedRun.of(AuditedRun(config, 0), 1e-3)
    size = sum(part.num_bytes() for part in recorded.trajectory.state(0))
    assert recorded.limits["num_parallel"] == int(0.02 * 2**30 / (8 * size)) < 64
    pairs = [(0, 1), (1, 2), (3, 0)]
    at_once = influence(recorded.trajectory, recorded.queries, pairs)
    one_by_one = influence(recorded.trajectory, recorded.queries, pairs, num_parallel=1)
    assert float((at_once - one_by_one).norm() / at_once.norm()) < 1e-10


def test_auditing_images_does_not_import_transformers():
    code = (
        "import sys, selectflow.audit.budget, selectflow.audit.proxy; "
        "print([m for m in ('transformers', 'peft', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["label", "input_ids"])
def test_spoiling(name):
    generator = torch.Generator().manual_seed(0)
    values = torch.arange(500) % 10
    if name == "input_ids":
        values = torch.arange(500 * 12).reshape(500, 12)
    found = spoiled({name: values}, 0.4, generator)[name]
    changed = found != values
    rows = changed if name == "label" else changed.any(1)
    assert int(rows.sum()) == 200
    if name == "label":
        assert set(found.tolist()) == set(range(10))
    else:
        assert torch.equal(found.sort(1).values, values)
