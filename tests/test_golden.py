"""Golden runs and public names, recorded before the code was rearranged."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    spec = importlib.util.spec_from_file_location(f"golden_{name}", GOLDEN / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record, public = load("record"), load("public")


@pytest.fixture(scope="module")
def found():
    return record.record_apart()


@pytest.mark.parametrize("name", record.SETTINGS)
@pytest.mark.parametrize("section", ["metrics", "decisions", "kept", "scores"])
def test_runs_are_as_recorded(found, name, section):
    golden = json.loads(record.RUNS.read_text(encoding="utf-8"))
    ours, recorded = found[name][section], golden["runs"][name][section]
    if golden["versions"] == record.versions():
        assert ours == recorded  # to the bit
    else:  # another torch may sum in another order
        assert close(ours, recorded)


def close(ours, recorded):
    if isinstance(recorded, dict):
        return ours.keys() == recorded.keys() and all(close(ours[k], recorded[k]) for k in ours)
    if isinstance(recorded, list):
        return len(ours) == len(recorded) and all(map(close, ours, recorded))
    if isinstance(recorded, float):
        return math.isclose(ours, recorded, rel_tol=1e-3, abs_tol=1e-5)
    return ours == recorded


def test_public_names_are_as_recorded():
    """Whoever changes one says why in CHANGELOG.md, and records them anew."""
    assert public.names() == json.loads(public.PUBLIC.read_text(encoding="utf-8"))
