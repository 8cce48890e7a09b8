"""What the README claims of selection on noised digits, over seeds: `make test-slow`."""

import json
import runpy
import statistics
from pathlib import Path

import pytest

from selectflow.data import read_metadata
from selectflow.run.ledger import read_ledger

ROOT = Path(__file__).parents[1]
SEEDS = range(5)


@pytest.fixture(scope="module")
def train():
    """The vision trainer, executed once; a function (config, seed, overrides) -> summary."""
    main = runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"]

    def run(root, config, seed, **overrides):
        options = {
            "seed": seed,
            "data.seed": seed,
            "root": root,
            "name": "run",
            "overwrite": "true",
        }
        options |= {"data.root": root / f"data-{seed}", "track.wandb": "disabled"} | overrides
        arguments = [f"{key}={value}" for key, value in options.items()]
        assert main([str(ROOT / "configs" / f"{config}.yaml"), *arguments]) == 0
        return json.loads((root / "run" / "summary.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [0, 1])
def test_influence_beats_uniform_on_noised_digits_at_equal_steps(train, tmp_path, horizon):
    gains, altered = [], []
    lookahead = {"select.horizon": horizon, "select.interval": 1}
    for seed in SEEDS:
        uniform = train(tmp_path, "digits_uniform", seed, steps=800)
        chosen = train(tmp_path, "digits_online", seed, steps=800, **lookahead)
        gains.append(chosen["test/accuracy"] - uniform["test/accuracy"])
        altered.append(kept_altered(tmp_path / f"data-{seed}", read_ledger(tmp_path / "run")))
    assert statistics.mean(gains) > 0.015
    assert statistics.mean(altered) < 0.22
    if horizon == 0:
        assert statistics.mean(altered) < 0.2  # half of the share in the stream


def kept_altered(root, ledger):
    metadata = read_metadata(root, "train")
    kept = ledger.filter(ledger["kept"])["key"].to_pylist()
    return statistics.mean(metadata[key]["altered"] for key in kept)


@pytest.mark.slow
def test_selection_does_no_harm_on_clean_digits(train, tmp_path):
    differences = []
    for seed in SEEDS:
        clean = {"steps": 800, "data.label_noise": 0.0}
        uniform = train(tmp_path, "digits_uniform", seed, **clean)
        chosen = train(tmp_path, "digits_online", seed, **clean)
        differences.append(chosen["test/accuracy"] - uniform["test/accuracy"])
    assert statistics.mean(differences) > -statistics.stdev(differences)
