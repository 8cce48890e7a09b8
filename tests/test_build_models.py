"""What a run does with the model itself: checkpointing, a window of the tokens, compilation."""

import functools
import runpy
from pathlib import Path

import pytest
import torch
from problems import PROBLEMS
from test_build import kept, made, metrics, trained
from test_run import config, digits, task
from torch import nn

from selectflow import Selector
from selectflow.data import TextOptions, make_text
from selectflow.run.config import ConfigError, RunConfig, load
from selectflow.run.ledger import read_ledger
from selectflow.run.loop import RunError, train

__all__ = ["digits"]  # the fixture

TRAINER = runpy.run_path(str(Path(__file__).parents[1] / "trainers/language.py"))
CPU = torch.device("cpu")
MLP, _, TRANSFORMER = PROBLEMS

TEXT = {"block": 16, "num_train": 160, "num_target": 8, "num_test": 8, "source": "python"}
LAYERS = {"layers": 2, "width": 16, "heads": 2}
KINDS = {
    "gpt2": {"name": "gpt2", **LAYERS},
    "llama": {"name": "llama", **LAYERS, "lora_rank": 2},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    make_text(root, TextOptions(**TEXT))
    return {"name": "text", "root": root, "text": TEXT, "pool": 16, "target_batch": 8}


def language(tmp_path, text, name, kind, **options):
    values = {
        "name": name, "root": tmp_path, "steps": 4, "eval_every": 4, "device": "cpu", "data": text,
        "model": KINDS[kind], "select": {"keep": 8, "horizon": 2, "derivative": "exact"},
    }  # fmt: skip
    config = RunConfig.model_validate(values | options)
    return config, TRAINER["build_task"](config)


def blocks(model):
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpointing_recomputes_in_training_alone_and_changes_nothing(tmp_path, text, kind):
    """Two passes through a block for a training step, and no more than one of any scoring pass.

    The exact derivatives are forward mode over the same layers, which checkpoints would not take.
    """
    weights, ledgers, passes = {}, {}, {}
    for name in ("off", "on"):
        count = {True: 0, False: 0}

        def counted(module, *_, count=count):
            count[module.training] += 1

        options, made = language(tmp_path, text, name, kind, train={"checkpointing": name == "on"})
        layer = blocks(made.model)[0]
        (layer.ln_1 if kind == "gpt2" else layer.input_layernorm).register_forward_hook(counted)
        ledgers[name] = read_ledger(train(options, made))
        weights[name], passes[name] = made.model.state_dict(), count
    assert passes["off"][True] == 4
    assert passes["on"] == {True: 8, False: passes["off"][False]}
    assert ledgers["on"].equals(ledgers["off"])
    for name, value in weights["off"].items():
        assert torch.equal(value, weights["on"][name]), name


def test_checkpointing_goes_with_autocast_and_micro_batches(tmp_path, text):
    weights = []
    for name, checkpointing in (("off", False), ("on", True)):
        options = {"checkpointing": checkpointing, "autocast": "bf16", "accumulate": 2}
        settings, made = language(tmp_path, text, name, "gpt2", train=options)
        train(settings, made)
        weights.append(made.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_model_without_checkpoints_is_refused(digits, tmp_path):
    with pytest.raises(RunError, match=r"train.checkpointing must be false .* Sequential; split"):
        train(config(tmp_path, train={"checkpointing": True}), task(digits))


def test_fp16_is_refused_with_its_reason(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntrain: {autocast: fp16}\n")
    with pytest.raises(ConfigError, match=r"train.autocast must be bf16 or null \(not fp16: its"):
        load(path)


@pytest.mark.parametrize("separate", [False, True])
def test_a_run_scores_a_window_of_the_tokens(tmp_path, text, separate):
    """The scores of the first pool are those of its blocks cut short; training is on them whole."""
    data = text | {"separate_documents": separate}
    settings, made = language(tmp_path, data, "cut", "gpt2", select=VIEWED | {"score_view": 7})
    _, plain = language(tmp_path, data, "whole", "gpt2")
    pool = next(iter(plain.pools))
    optimizer = torch.optim.AdamW(plain.model.parameters(), 3e-3)
    target = [short(batch) for batch in plain.target]
    selector = Selector(plain.model, optimizer, plain.loss_fn, target, keep=8, horizon=0)
    selector.select(short(pool))
    run_dir = train(settings, made)
    first = read_ledger(run_dir, ["key", "score"]).slice(0, 16).to_pydict()
    assert first["key"] == pool["key"]
    assert torch.allclose(torch.tensor(first["score"]).float(), selector.last.scores, rtol=1e-3)
    assert metrics(run_dir)["data/tokens_seen"] == 4 * 8 * 16


VIEWED = {"keep": 8, "horizon": 0}


def short(batch):
    return batch | {"tokens": batch["tokens"][:, :7]}


def test_a_window_of_what_is_no_sequence_is_refused(digits, tmp_path):
    with pytest.raises(RunError, match=r"select.score_view must be null for a task .* got 5"):
        train(config(tmp_path, select={"score_view": 5}), task(digits))


# --- torch.compile --------------------------------------------------------------------------


def test_the_compiled_model_trains_and_the_plain_one_is_scored(tmp_path, text, monkeypatch):
    """With a backend that only traces, which is what is quick and exact enough to compare."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ends, calls = [], []
    for name, compiled in (("off", False), ("on", True)):
        options = {"compile": compiled, "accumulate": 2}
        settings, made = language(tmp_path, text, name, "gpt2", train=options)
        inner = made.loss_fn

        def loss_fn(model, batch, inner=inner):
            calls.append((hasattr(model, "_orig_mod"), torch.is_grad_enabled() and model.training))
            return inner(model, batch)

        ends.append(train(settings, type(made)(**{**vars(made), "loss_fn": loss_fn})))
        assert set(calls) == {(compiled, True), (False, False)}
        calls.clear()
    assert kept(ends[0]) == kept(ends[1])
    assert metrics(ends[1])["train/loss"] == pytest.approx(metrics(ends[0])["train/loss"], rel=1e-5)
    assert set(weights_in(ends[0])) == set(weights_in(ends[1]))


def weights_in(run_dir):
    return torch.load(run_dir / "checkpoints/step-00000004.pt")["model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of a compiler's first use
def test_compiled_training_has_the_same_losses(tmp_path, text):
    found = []
    for name, compiled in (("off", False), ("on", True)):
        torch.compiler.reset()
        settings, made = language(tmp_path, text, name, "gpt2", train={"compile": compiled})
        found.append(metrics(train(settings, made)))
    assert found[1]["train/loss"] == pytest.approx(found[0]["train/loss"], rel=1e-5)
    assert found[1]["test/loss"] == pytest.approx(found[0]["test/loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own, of a compiler's first use
def test_no_compiler_is_an_error_that_says_so(monkeypatch, tmp_path):
    from torch._inductor import config as inductor  # noqa: PLC0415

    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "none")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, batches, _ = made()
    with pytest.raises(RunError, match=r"train.compile must be false where .*; install a C\+\+"):
        trained(model, batches, compile=True)
