"""trainers/language.py: it runs, resumes bit for bit, and refuses what misfits."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_resume import Killed, assert_same, killed_at, outcome

from selectflow.data import DataError, TextOptions, make_text, read_metadata
from selectflow.run.config import ConfigError, RunConfig
from selectflow.run.directory import Checkpoints
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import train

ROOT = Path(__file__).parents[1]
TRAINER = runpy.run_path(str(ROOT / "trainers/language.py"))
TEXT = {
    "block": 16, "num_train": 160, "num_target": 8, "num_test": 8,
    "mixture": {"code": 0.4, "prose": 0.3, "shuffled": 0.3},
}  # fmt: skip
KINDS = {
    "gpt2": {"name": "gpt2", "layers": 1, "width": 16, "heads": 2},
    "llama": {"name": "llama", "layers": 1, "width": 16, "heads": 2, "lora_rank": 2},
}
both = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Built-in text, written once."""
    root = tmp_path_factory.mktemp("text")
    make_text(root, TextOptions(**TEXT))
    return {"name": "text", "root": root, "text": TEXT, "pool": 16, "target_batch": 8}


def configured(tmp_path, data, model, **options):
    values = {
        "name": "trial", "root": tmp_path, "steps": 8, "eval_every": 4, "checkpoint_every": 3,
        "resume": "auto", "device": "cpu", "data": data, "model": model,
        "select": {"keep": 8, "horizon": 1},
    }  # fmt: skip
    return RunConfig.model_validate(values | options)


def run(config):
    return train(config, TRAINER["build_task"](config))


@both
def test_a_run_from_text_to_metrics(tmp_path, data, kind):
    """The model comes nearer to the target; what is logged is what the ledger says was kept."""
    config = configured(tmp_path, data, KINDS[kind], optimizer={"lr": 0.02})
    run_dir = run(config)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["test/loss"] == pytest.approx(math.log(256), rel=0.05)
    assert lines[-1]["test/loss"] < lines[0]["test/loss"]
    assert lines[-1]["data/tokens_seen"] == 8 * 8 * 16
    metadata = read_metadata(data["root"], "train")
    rows = read_ledger(run_dir).to_pylist()
    kept = [row["key"] for row in rows if row["kept"] and row["step"] > 4]
    for origin in TEXT["mixture"]:
        share = sum(metadata[key]["origin"] == origin for key in kept) / len(kept)
        assert lines[-1][f"select/kept_{origin}"] == pytest.approx(share)
    assert lines[-1]["select/kept_altered"] == pytest.approx(lines[-1]["select/kept_shuffled"])


def test_target_blocks_are_mixed_in_and_counted(tmp_path, data):
    mixed = data | {"target_share": 0.2, "target_held_out": 0.25}  # 2 of 6 beside 8
    run_dir = run(configured(tmp_path, mixed, KINDS["gpt2"]))
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/tokens_seen"] == 8 * (8 + 2) * 16
    assert last["data/target_samples_seen"] == 8 * 2


@both
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, data, kind):
    whole = configured(tmp_path / "whole", data, KINDS[kind])
    run(whole)
    broken = configured(tmp_path / "broken", data, KINDS[kind])
    with pytest.raises(Killed):
        train(broken, killed_at(6, TRAINER["build_task"](broken)))
    run(broken)
    assert_same(outcome(whole.run_dir), outcome(broken.run_dir))


def test_the_optimizer_and_the_sensitivities_hold_adapters_alone(tmp_path, data):
    config = configured(
        tmp_path, data, KINDS["llama"], select={"keep": 8, "horizon": 1, "interval": 9}
    )
    task = TRAINER["build_task"](config)
    before = {name: param.detach().clone() for name, param in task.model.named_parameters()}
    train(config, task)
    adapters = {name: param for name, param in task.model.named_parameters() if "lora_" in name}
    assert {n for n, p in task.model.named_parameters() if p.requires_grad} == adapters.keys()
    assert all(
        torch.equal(p, before[n]) for n, p in task.model.named_parameters() if n not in adapters
    )
    assert any(not torch.equal(param, before[name]) for name, param in adapters.items())
    saved = Checkpoints(config.run_dir / "checkpoints").newest()
    shapes = [param.shape for param in adapters.values()]
    assert [s["exp_avg"].shape for s in saved["optimizer"]["state"].values()] == shapes
    largest = max(param.numel() for name, param in before.items() if name not in adapters)
    assert 0 < max(leaf.numel() for leaf in leaves(saved["selector"])) < largest


def leaves(value):
    """All tensors of floating point in nested containers."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return leaves(list(value.values()))
    return [leaf for each in value for leaf in leaves(each)] if isinstance(value, list) else []


def test_padding_does_not_count_but_the_end_of_a_document_does(data, tmp_path):
    model = TRAINER["build_task"](configured(tmp_path, data, KINDS["gpt2"])).model.eval()
    tokens = torch.tensor([[7, 8, 255, 255, 255]])
    found = TRAINER["loss_fn"](255)(model, {"tokens": tokens, "key": ["a"]})
    logits = model(input_ids=tokens).logits[0]
    expected = F.cross_entropy(logits[:2], torch.tensor([8, 255]))
    assert found.tolist() == pytest.approx([float(expected.detach())], rel=1e-6)


# what is refused


def refused(config, message):
    with pytest.raises(ConfigError, match=message):
        TRAINER["build_task"](config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"positions": 8}, "data.text.block must be at most the model's 8 positions, got .* 16"),
        ({"width": 15}, "model.width must be a multiple of model.heads .2., got 15"),
        ({"name": "mlp"}, "model.name must be one of gpt2, llama for this trainer, got 'mlp'"),
        ({"pretrained": "/nowhere/none"}, "model.pretrained must be a folder .*none.*hf download"),
    ],
)
def test_models_that_cannot_be(tmp_path, data, monkeypatch, model, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(configured(tmp_path, data, KINDS["gpt2"] | model), message)


def test_pretrained_weights_want_their_own_tokens(tmp_path, data):
    """A folder with weights and tokenizer: taken with its own shards, refused with other ones."""
    source = tmp_path / "text.jsonl"
    texts = [f"document {n}: " + f"word{n % 7} " * 40 for n in range(200)]
    source.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    made = {
        **TEXT,
        "mixture": None,
        "source": f"jsonl:{source}",
        "tokenizer": "bpe:300",
        "target_domain": None,
    }
    own = data | {"root": tmp_path / "own", "text": made}
    task, folder = TRAINER["build_task"](configured(tmp_path, own, KINDS["gpt2"])), tmp_path / "w"
    model = task.model
    task.save(folder, model.state_dict())
    pretrained = {"name": "gpt2", "pretrained": str(folder)}
    loaded = TRAINER["build_task"](configured(tmp_path, own, pretrained)).model
    for param, other in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(param, other)
    refused(
        configured(tmp_path, data, pretrained), "data.text.tokenizer must be that of model.pret"
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_of_bytes_leaves_weights_that_another_begins_with(tmp_path, data, rank):
    """Bytes have no tokenizer to store; the ids of the model say that they are what it reads."""
    kind = KINDS["llama"] | {"lora_rank": 0}
    config = configured(tmp_path, data, kind)
    task = TRAINER["build_task"](config)
    folder = train(config, task) / "model"
    pretrained = {"name": "llama", "pretrained": str(folder), "lora_rank": rank}
    options = {"name": "tuned", "optimizer": {"lr": 0.05}}
    tuned = TRAINER["build_task"](configured(tmp_path, data, pretrained, **options))
    loaded = tuned.model.get_base_model() if rank else tuned.model
    ours = {
        n.replace(".base_layer", ""): p for n, p in loaded.named_parameters() if "lora" not in n
    }
    before = {name: param.detach().clone() for name, param in task.model.named_parameters()}
    assert ours.keys() == before.keys()
    assert all(torch.equal(param, before[name]) for name, param in ours.items())

    saved = train(configured(tmp_path, data, pretrained, **options), tuned) / "model"
    assert (saved / "adapter_model.safetensors").exists() == bool(rank)
    assert (saved / "model.safetensors").exists() != bool(rank)  # with adapters, they alone
    # other ids than those of bytes, without a tokenizer
    task.model.config.eos_token_id = 254
    task.model.save_pretrained(folder)
    with pytest.raises(DataError, match="tokenizer must be bytes"):
        TRAINER["build_task"](configured(tmp_path, data, pretrained))


def test_the_vision_trainer_says_that_it_trains_no_language_model(tmp_path):
    vision = runpy.run_path(str(ROOT / "trainers/vision.py"))
    config = RunConfig(name="a", root=tmp_path, model={"name": "gpt2"})
    with pytest.raises(ConfigError, match=r"one of mlp, cnn, resnet18 for this"):
        vision["build_task"](config)
