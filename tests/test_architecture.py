"""Who may import whom, and that importing selectflow stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "selectflow"

# module -> the modules of selectflow that it may import; packages stand for all inside them
MAY_IMPORT = {
    "memory": set(),
    "params": set(),
    "batches": set(),
    "dynamics": {"params"},
    "optimizers": {"dynamics", "params"},
    "objective": {"batches"},
    "chunking": {"batches", "memory", "objective", "params"},
    "directions": {"params"},
    "derivatives": {"chunking", "directions", "objective", "batches", "params"},
    "horizons": set(),
    "lookahead": {"batches", "derivatives", "dynamics", "memory", "offload", "params"},
    "offload": {"dynamics", "params", "snapshots"},
    "strategies": {"batches"},
    "language": {"batches"},
    "huggingface": {"atomic", "batches", "language", "objective", "selection", "selector"},
    "selection": {"batches", "controller"},
    "controller": set(),
    "update_state": {"dynamics"},
    "peeking": {"batches"},
    "policy": {
        "batches", "derivatives", "dynamics", "lookahead", "nominal", "offload", "params",
        "selection",
    },
    "horizon_control": {
        "batches", "controller", "nominal", "optimizers", "perturbations", "policy", "proxy",
        "selection",
    },
    "rate_control": {
        "batches", "controller", "derivatives", "dynamics", "optimizers", "params", "update_state",
    },
    "sensitivities": {
        "batches", "lookahead", "lookahead_state", "optimizers", "params", "policy",
    },
    "selector": {
        "arguments", "batches", "chunking", "controller", "derivatives", "horizon_control",
        "horizons", "lookahead_state", "objective", "offload", "optimizers", "peeking", "policy",
        "rate_control", "scored_params", "selection", "sensitivities", "strategies",
    },
    "arguments": set(),
    "lookahead_state": {"lookahead", "params"},
    "nominal": {"batches", "derivatives", "dynamics", "lookahead", "selection"},
    "scored_params": set(),
    "snapshots": {"atomic", "dynamics", "memory", "params"},
    "trajectory": {"batches", "derivatives", "dynamics", "lookahead", "snapshots"},
    "recording": {
        "batches", "chunking", "derivatives", "dynamics", "objective", "optimizers", "snapshots",
        "trajectory", "update_state",
    },
    "tangents": {"objective", "batches", "derivatives", "dynamics", "params"},
    "perturbations": {"batches", "derivatives", "dynamics", "params", "tangents"},
    "proxy": {"batches", "derivatives", "dynamics", "perturbations", "tangents"},
    "reruns": {
        "batches", "derivatives", "dynamics", "objective", "params", "perturbations", "tangents",
        "trajectory",
    },
    "assumptions": {"dynamics"},
    "audit": {
        "assumptions", "batches", "derivatives", "dynamics", "lookahead", "params", "recording",
        "reruns", "trajectory",
    },
    "sample_scores": {"atomic", "data", "ledger"},
    "offline": {
        "batches", "derivatives", "dynamics", "lookahead", "params", "sample_scores", "trajectory",
    },
    "sparse": {"derivatives", "dynamics", "lookahead", "params", "trajectory"},
    "audit_config": {"config_errors", "yaml_io"},
    "audit_images": {"audit_config", "batches"},
    "audit_text": {"audit_config", "batches", "data", "text_models"},
    "text_models": {"config_errors"},
    "audit_settings": {
        "audit_config", "audit_images", "audit_text", "batches", "config_errors", "language",
        "objective", "recording", "trajectory",
    },
    "audit_rows": {"audit", "audit_settings", "batches", "memory", "sparse", "trajectory"},
    "audit_proxy": {
        "audit_config", "audit_settings", "batches", "config_errors", "derivatives", "dynamics",
        "lookahead", "objective", "optimizers", "perturbations", "proxy", "reruns",
    },
    "audit_proxy_report": {
        "atomic", "audit_config", "audit_proxy", "audit_report", "config_errors", "controller",
        "proxy", "report",
    },
    "audit_report": {
        "atomic", "audit_config", "audit_rows", "audit_settings", "config_errors", "report",
    },
    "config_errors": set(),
    "yaml_io": {"config_errors"},
    "config_fields": set(),
    "config_data": {"config_fields"},
    "config_training": {"config_fields"},
    "config_schedules": {"config_fields"},
    "config_select": {"config_fields", "config_schedules"},
    "config": {
        "config_data", "config_errors", "config_fields", "config_schedules", "config_select",
        "config_training", "yaml_io",
    },
    "tracking": {"atomic", "tracking"},
    "atomic": set(),
    "ledger": {"atomic", "selection"},
    "replay": {"decision_log", "batches", "ledger", "selection"},
    "data": {"atomic", "data"},
    "checkpoints": {"batches"},
    "run_dir": {"decision_log", "checkpoints", "config", "ledger"},
    "run_log": {"batches", "decision_log", "ledger", "selection", "tracking"},
    "sample_table": {"batches", "selection"},
    "sample_display": {"config", "report", "sample_table", "selection", "task", "tracking"},
    "task": {"batches", "data", "objective"},
    "training": {
        "controller", "batches", "config_schedules", "config_select", "config_training", "horizons",
        "objective", "run_dir", "task",
    },
    "offline_run": {
        "atomic", "batches", "config", "data", "derivatives", "offline", "recording", "run_dir",
        "sample_scores", "selection", "task", "training", "trajectory",
    },
    "run": {
        "decision_log",
        "batches", "checkpoints", "config", "ledger", "offline_run", "replay", "run_dir",
        "run_log", "sample_display", "selection", "selector", "task", "tracking", "training",
    },
    "terminal": set(),
    "trainer": {"config", "config_errors", "run", "task", "terminal"},
    "report": {
        "config_data", "controller", "data", "ledger", "report", "run_dir", "tracking", "yaml_io",
    },
    "sweep_space": {"config_errors"},
    "sweep": {"config", "config_errors", "config_fields", "sweep_space", "yaml_io"},
    "tune_runs": {"run_dir"},
    "tune_cells": {"config", "report", "sweep", "sweep_space", "yaml_io"},
    "tune_record": {"report", "sweep", "sweep_space", "tune_cells", "yaml_io"},
    "tune": {"run_dir", "sweep", "sweep_space", "tune_record", "tune_runs"},
    "tune_wandb": {"config", "sweep", "tune_record"},
    "cli_tune": {"report", "sweep", "tune", "tune_cells", "tune_record", "tune_wandb"},
    "cli_compare": {"report", "tracking"},
    "cli_shards": {"data"},
    "cli_select": {"cli_shards", "config", "data", "ledger", "sample_scores"},
    "cli": {
        "audit_config", "audit_proxy_report", "audit_report", "cli_compare", "cli_select",
        "cli_shards", "cli_tune", "config", "report", "terminal",
    },
    "__main__": {"cli"},
    "decision_log": {"atomic", "controller"},
    "__init__": {"controller", "horizons", "selection", "selector", "strategies"},
}  # fmt: skip
ONLY_IN = {  # a library -> the only files that may import it
    "webdataset": {"data/shards.py"},
    "wandb": {
        "tracking/comparison.py", "tracking/remote.py", "tracking/sink.py", "tune_wandb.py",
    },
}  # fmt: skip


def imported(path):
    """Names of all modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name.split(".")[1] for name in imported(path) if name.startswith("selectflow.")}
    assert used <= MAY_IMPORT[own], f"{own} must not import {used - MAY_IMPORT[own]}"


def test_webdataset_and_wandb_are_imported_in_one_place_each():
    for library, places in ONLY_IN.items():
        found = {
            str(path.relative_to(PACKAGE))
            for path in FILES
            if library in {name.split(".")[0] for name in imported(path)}
        }
        assert found == places


def test_trainers_are_never_imported():
    for path in [*FILES, *(ROOT / "trainers").glob("*.py")]:
        assert not any(name.split(".")[0] == "trainers" for name in imported(path))


def test_importing_selectflow_is_light():
    """Neither the data and tracking libraries nor heavy integrations come with the import."""
    heavy = (
        "wandb webdataset torchvision matplotlib transformers peft trl accelerate tokenizers "
        "datasets lightning optuna sklearn safetensors pyarrow"
    )
    code = f"import sys, selectflow; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
