"""The notebooks run as they are committed, and what is committed of their outputs is small."""

import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_KIB = 250
TIMEOUT_S = 300  # of one cell, on a machine that does other things too


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_one_whole_run_with_small_outputs(path):
    notebook = nbformat.read(path, 4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert pictures(notebook) >= 2
    assert path.stat().st_size < MAX_KIB * 1024
    assert not [output for output in outputs(notebook) if output.output_type in ("error", "stream")]
    assert not re.search(r"/(tmp|home|root|work|Users)/", json.dumps(outputs(notebook)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path):
    cells = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    imports = re.findall(r"^from selectflow.*$", "\n".join(cells), re.MULTILINE)
    assert imports
    exec("\n".join(imports), {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_one_will_see_and_needs_the_package_alone(path):
    first, *cells = nbformat.read(path, 4).cells
    assert first.cell_type == "markdown"
    assert "**What you will see:**" in first.source
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert not re.search(r"\.\./|\b(configs|trainers|tests|to_pandas)\b", code)
    needed = {"sklearn" if name == "scikit-learn" else name for name in required()}
    used = {name.partition(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", code, re.M)}
    assert used <= needed | set(sys.stdlib_module_names) | {"selectflow"}


def required():
    """Names of the packages that come with selectflow, without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [re.match(r"[\w-]+", each)[0] for each in project["dependencies"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws_what_it_shows(path, tmp_path):
    notebook = nbformat.read(path, 4)
    shown = pictures(notebook)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    assert pictures(notebook) == shown
    assert not [output for output in outputs(notebook) if output.output_type in ("error", "stream")]
