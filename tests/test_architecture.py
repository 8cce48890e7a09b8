"""Who may import whom, and that importing selectflow stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selectflow"

# Lowest first: a file imports only from rooms before its own, and from its own.
ROOMS = (
    "distributed < core < fields < control < strategies < options < selector < data < models"
    " < offline < run < audit, report < tune < integrations < cli"
)
ONLY_IN = {  # a library -> the only places that may import it
    "torch.distributed": ("distributed.py", "run/spread.py"),
    "webdataset": ("data/",),
    "wandb": ("run/wandb.py", "tune/wandb.py"),
    "torch.utils.tensorboard": ("run/tensorboard.py",),
}

FLOOR = {room: i for i, rooms in enumerate(ROOMS.split(" < ")) for room in rooms.split(", ")}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path):
    """Names of all modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own.startswith("__"):  # the public names, and the command
        return
    used = {name.split(".")[1] for name in imported(path) if name.startswith("selectflow.")}
    above = {room for room in used - {own} if not FLOOR[room] < FLOOR[own]}
    assert not above, f"{own} must not import {above}: {ROOMS}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_some_libraries_are_imported_in_one_place_each(library):
    found = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(f"{name}.".startswith(f"{library}.") for name in imported(path))
    }
    assert found
    assert all(name.startswith(ONLY_IN[library]) for name in found)


def test_trainers_are_never_imported():
    for path in [*FILES, *(ROOT / "trainers").glob("*.py")]:
        assert not any(name.split(".")[0] == "trainers" for name in imported(path))


def imported_with(statement, names):
    """Which of the modules a new process has after a statement."""
    code = f"import sys; {statement}; print(*(m for m in {names.split()} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_importing_the_selector_is_light():
    """Neither the data and tracking libraries nor heavy integrations come with the import."""
    heavy = (
        "wandb tensorboard webdataset torchvision matplotlib transformers peft trl accelerate "
        "tokenizers datasets lightning optuna sklearn safetensors pyarrow scipy typer"
    )
    assert imported_with("from selectflow import Selector", heavy) == []


def test_the_command_line_starts_without_torch():
    """Help and completion are quick: a command imports what it needs when it runs."""
    assert imported_with("import selectflow.cli", "torch numpy pydantic rich yaml") == []
    assert imported_with("from selectflow import Selector", "torch") == ["torch"]
