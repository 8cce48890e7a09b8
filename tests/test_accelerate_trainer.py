"""trainers/with_accelerate.py: it learns, and resumes bit for bit in one process and in two."""

import os
import re
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

PROGRAM = str(Path(__file__).parents[1] / "trainers/with_accelerate.py")


def train(folder, *options):
    main = runpy.run_path(PROGRAM)["main"]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # one to a process, and here are several programs in one
    main(["--cpu", "--folder", str(folder), *map(str, options)])


def train_in_group(*arguments):
    rank = torch.distributed.get_rank()
    environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": 29500}
    os.environ |= {name: str(value) for name, value in environ.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    train(*arguments)


def checkpoint(folder, num_processes):
    """Weights and sensitivities; keys of the peeked pools, and the position behind them."""
    tensors, places = [load_file(folder / "model.safetensors")], []
    for rank in range(num_processes):
        own = torch.load(folder / f"selection-{rank}.pt")
        tensors.append(own["selector"]["ahead"]["sensitivities"])
        places.append(([pool["key"] for pool in own["selector"]["peeked"]], own["pools"]))
    return tensors, places


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_resumes_bit_for_bit(request, tmp_path, num_processes):
    def run(*options):
        arguments = (str(tmp_path), "--steps", 9, "--horizon", 2, "--accumulate", 2, *options)
        if num_processes == 1:
            train(*arguments)
        else:
            request.getfixturevalue("two").run(train_in_group, *arguments)

    run("--save_every", 4)
    whole, places = checkpoint(tmp_path / "checkpoint-9", num_processes)
    assert all(len(keys) == 2 for keys, _ in places)
    run("--save_every", 100, "--resume", tmp_path / "checkpoint-4")
    rest, others = checkpoint(tmp_path / "checkpoint-9", num_processes)
    torch.testing.assert_close(rest, whole, rtol=0, atol=0)
    assert others == places


def test_it_learns_the_digits(tmp_path, capsys):
    train(tmp_path, "--steps", 100, "--save_every", 1000)
    found = re.search(r"accuracy on the test set: ([0-9.]+)", capsys.readouterr().out)
    assert float(found[1]) > 0.7
