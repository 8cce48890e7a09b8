"""The command line of the trainers: what it runs, refuses in one message, and prints anywhere."""

import contextlib
import io
import json
import subprocess
import sys
from itertools import islice

import pytest
from small_datasets import sample
from test_run import ROOT, run_trainer

from selectflow.cli import main
from selectflow.data import Manifest, PoolStream, write_manifest, write_split
from selectflow.run.loop import trainer_main


def run_alone(tmp_path, path, *overrides):
    """In a new Python, which has nothing imported: as users start it."""
    command = [sys.executable, "-W", "ignore", ROOT / "trainers/vision.py", ROOT / path]
    return subprocess.run(
        [*command, *overrides], cwd=tmp_path, capture_output=True, text=True, check=False
    )


SMALL = ["steps=2", "data.pool=12", "select.keep=4", "track.wandb=disabled"]


def write_few(root):
    """Some examples of four classes, two of them in the target set."""
    samples = {
        "train": [sample(f"s{i}", i % 4) for i in range(24)],
        "target": [sample("a", 0), sample("b", 1)],
        "test": [sample("c", 1)],
    }
    splits = {name: tuple(write_split(root, name, of, 9)) for name, of in samples.items()}
    write_manifest(root, Manifest(splits, ("cls", "json", "npy"), {}, 0))
    return ["data.name=shards", f"data.root={root}"]


def test_the_vision_trainer(tmp_path):
    check_run(run_alone(tmp_path, "configs/digits_online.yaml", *SMALL), tmp_path)


@pytest.mark.parametrize("model", ["cnn", "resnet18"])
def test_the_other_models_of_the_vision_trainer(model, tmp_path):
    few = write_few(tmp_path)
    done = run_trainer(tmp_path, "configs/digits_online.yaml", f"model.name={model}", *SMALL, *few)
    check_run(done, tmp_path)


def check_run(done, tmp_path):
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "digits_online-s0" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["test/accuracy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/digits_online.yaml", "select.horizn=2"], "select.horizon"),
        (["configs/none.yaml"], "none.yaml"),
        (["configs/digits_online.yaml", "data.name=shards", "data.root=nowhere"], "nowhere"),
    ],
)
def test_the_trainer_answers_bad_input_in_one_message(arguments, message, tmp_path):
    done = run_trainer(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_target_may_be_of_some_of_the_classes(tmp_path):
    shards = [*write_few(tmp_path), "data.pool=8", "select.keep=2"]
    done = run_trainer(tmp_path, "configs/digits_uniform.yaml", *shards, "steps=4", "eval_every=4")
    assert done.returncode == 0, done.stderr
    few = run_trainer(tmp_path, "configs/digits_uniform.yaml", *shards, "model.num_classes=1")
    assert few.returncode == 2
    assert (
        "model.num_classes must be at least 2, as target and test labels go up to 1" in few.stderr
    )


def test_a_run_need_not_read_all_shards_before_its_first_step(tmp_path):
    train = [sample(f"s{i}", i % 4) for i in range(64)]
    splits = {"train": tuple(write_split(tmp_path, "train", train, 8))}
    for name in ("target", "test"):
        splits[name] = tuple(write_split(tmp_path, name, [sample(name, 1)], 8))
    write_manifest(tmp_path, Manifest(splits, ("cls", "json", "npy"), {}, 0))
    pools = list(islice(PoolStream(tmp_path, pool=8, seed=0, buffer=8, memory_gib=0), 8))
    last = int(pools[-1]["key"][0][1:]) // 8
    (tmp_path / splits["train"][last].name).unlink()
    arguments = [
        "configs/digits_uniform.yaml", "data.name=shards", f"data.root={tmp_path}", "data.pool=8",
        "data.buffer=8", "data.memory_gib=0", "select.keep=2", "steps=2", "eval_every=2",
    ]  # fmt: skip
    assert splits["train"][last].name in run_trainer(tmp_path, *arguments).stderr
    done = run_trainer(tmp_path, *arguments, "track.kinds=false", "model.num_classes=4")
    assert done.returncode == 0, done.stderr


# --- a terminal without a character of the output ---------------------------------------------


def written(run):
    """What a terminal in ASCII gets."""
    file = io.BytesIO()
    with io.TextIOWrapper(file, "ascii") as terminal, contextlib.redirect_stdout(terminal):
        assert run() == 0
        print("± …")
        terminal.flush()
        return file.getvalue().decode()


def test_every_program_prints_every_character():
    usage = written(lambda: trainer_main(["-h"], None, "usage: 1 ± 2"))
    assert usage == "usage: 1 \\xb1 2\n\\xb1 \\u2026\n"
    assert written(lambda: main(["schema"])).endswith("}\n\\xb1 \\u2026\n")
