"""Sweep files: what W&B's format becomes, and what is refused and why."""

import math
import re
from pathlib import Path

import pytest

from selectflow.cli import main
from selectflow.run.config import ConfigError, load
from selectflow.run.yaml import as_override, dump_yaml, set_key
from selectflow.tune.domains import encode
from selectflow.tune.space import Choice, Range, load_sweep
from selectflow.tune.wandb import wandb_spec

ROOT = Path(__file__).parents[1]
COMMAND = ["${env}", "${interpreter}", "${program}", "base.yaml", "${args_no_hyphens}"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("name: base\nsteps: 8\nselect: {keep: 4}\n")
    Path("trainer.py").touch()


def sweep(parameters, **keys):
    values = {
        "program": "trainer.py",
        "command": COMMAND,
        "method": "grid",
        "metric": {"name": "target/loss", "goal": "minimize"},
        "parameters": parameters,
    } | keys
    values = {key: value for key, value in values.items() if value is not None}
    Path("sweep.yaml").write_text(dump_yaml(values))
    return load_sweep("sweep.yaml")


def refused(parameters, **keys):
    with pytest.raises(ConfigError) as caught:
        sweep(parameters, **keys)
    return str(caught.value)


def test_a_grid_is_every_combination_but_of_the_seeds():
    found = sweep(
        {
            "optimizer": {"parameters": {"lr": {"values": [1e-3, 1e-2]}}},
            "select.horizon": {"min": 0, "max": 2},
            "select.keep": {"distribution": "q_uniform", "min": 0.25, "max": 0.75, "q": 0.25},
            "seed": {"values": [3, 4]},
            "steps": {"value": 5},
        }
    )
    assert found.seeds == (3, 4)
    assert found.grid() == [
        {"optimizer.lr": lr, "select.horizon": horizon, "select.keep": keep, "steps": 5}
        for lr in (1e-3, 1e-2)
        for horizon in (0, 1, 2)
        for keep in (0.25, 0.5, 0.75)
    ]


def test_ranges_are_those_of_wandb():
    found = sweep(
        {
            "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
            "optimizer.eps": {"distribution": "log_uniform", "min": -18, "max": -12},
            "optimizer.weight_decay": {"min": 0, "max": 0.1},
            "select.interval": {"min": 1, "max": 8},
            "select.horizon": {"values": [0, 1, math.inf]},
        },
        method="bayes",
        run_cap=10,
    )
    assert found.domains == {
        "optimizer.lr": Range(1e-4, 1e-2, is_log=True),
        "optimizer.eps": Range(math.exp(-18), math.exp(-12), is_log=True),
        "optimizer.weight_decay": Range(0, 0.1),
        "select.interval": Range(1, 8, step=1),
        "select.horizon": Choice((0, 1, math.inf)),
    }


def test_brackets_are_those_of_wandb():
    one = {"type": "hyperband", "min_iter": 3}
    assert sweep({"steps": {"value": 5}}, early_terminate=one).keys.early_terminate.first == 3
    counted_back = {"type": "hyperband", "max_iter": 27, "s": 2}  # brackets 27/9 and 27/3
    found = sweep({"steps": {"value": 5}}, early_terminate=counted_back)
    assert (found.keys.early_terminate.first, found.keys.early_terminate.eta) == (3, 3)


def test_the_settings_reach_the_configuration():
    found = sweep(
        {
            "model.hidden": {"values": [[64], [32, 16]]},
            "select.horizon": {"values": [math.inf]},
            "optimizer.max_grad_norm": {"values": [None, 0.5]},
            "seed": {"values": [1]},
        },
        command=[*COMMAND[:4], "steps=6", COMMAND[4]],
    )
    config = found.load(found.grid()[1], found.local_overrides(Path("out"), 1))
    assert (config.model.hidden, config.optimizer.max_grad_norm) == ((64,), 0.5)
    assert (config.select.horizon, config.steps, config.seed) == (math.inf, 6, 1)
    assert config.run_dir == Path("out/runs/hidden-64--max-grad-norm0.5-s1")


def test_every_run_has_a_directory_of_its_own():
    found = sweep({"optimizer.lr": {"values": [1e-3, 1e-2]}, "select.keep": {"values": [1, 1.0]}})
    overrides = found.local_overrides(Path("out"), None)
    assert len({found.load(each, overrides).run_dir for each in found.grid()}) == 4


@pytest.mark.parametrize(
    ("key", "values", "kept"),
    [
        ("select.keep", [1, 1.0], [1, 1.0]),
        ("select.horizon", [0, 1, math.inf, 1, math.inf], [0, 1, math.inf]),
        ("optimizer.lr", [1e-3, 0.001, 1, 1.0], [1e-3, 1]),  # a rate of 1 is one of 1.0
        ("model.hidden", [[8], [8], [8, 8]], [[8], [8, 8]]),
        ("optimizer.max_grad_norm", [None, 1.0, None], [None, 1.0]),
        ("seed", [0, 1, 0], None),
    ],
)
def test_a_value_is_a_cell_once_and_values_that_python_calls_equal_are_two(key, values, kept):
    found = sweep({key: {"values": values}, "steps": {"value": 5}}, method="random", run_cap=9)
    if kept is None:
        assert found.seeds == (0, 1)
        return
    assert [(type(x), x) for x in found.domains[key].values] == [(type(x), x) for x in kept]


def test_optuna_tells_values_apart():
    assert encode([1, 1.0, True, "1", None]) == ["1", "1.0", "true", '"1"', "null"]
    assert encode([[1], "[1]"]) == ["[1]", '"[1]"']
    assert encode([1, 2.5, "a", None, False, [3]]) == [1, 2.5, "a", None, False, "[3]"]


@pytest.mark.parametrize(
    "parameters",
    [
        {"select.params": {"values": [["!*bias*"], ["*bias*"], None]}},
        {"select.horizon_schedule.milestones": {"values": [[[1, 2]], [[1, 2], [3, 2]]]}},
        {"schedule.milestones": {"values": [[1, 2], [12], [1], []]}},
        {"model.pretrained": {"values": [None, "None", "none", "a/b", "a-b", "a b", "1", "1.0"]}},
        # the end of one value and the name of the next parameter
        {
            "model.pretrained": {"values": ["a-project1", "a"]},
            "track.project": {"values": ["b", "1-projectb", "2"]},
        },
        {"model.pretrained": {"values": ["x" * 300 + "a", "x" * 300 + "b"]}},
        {"data.text.mixture": {"values": [{"code": 0.5, "prose": 0.5}, {"code": 0.5}]}},
    ],
)
def test_two_cells_never_share_a_directory(parameters):
    Path("base.yaml").write_text("name: base\ndata: {text: {num_train: 100}}\n")
    found = sweep(parameters)
    cells = found.grid()
    dirs = [found.load(each, found.local_overrides(Path("out"), None)).run_dir for each in cells]
    assert len({str(path) for path in dirs}) == len(cells)
    assert all(len(path.name) < 220 for path in dirs)


@pytest.mark.parametrize(
    "name", ["Test Wandb", "Sweep: lr", "{lr}", "été", "..", "a/b", "- x", "a\nsteps: 3", "'\"#"]
)
def test_a_sweep_may_have_any_name(name):
    found = sweep({"steps": {"values": [5, 6]}}, name=name)
    assert found.name == name
    spec = wandb_spec(found)
    assert spec["name"] == name
    config = load("base.yaml", [*spec["command"][4:-1], "steps=5"])
    assert re.fullmatch(r"[A-Za-z0-9][\w.-]*-steps5-s0", config.run_name, re.ASCII)
    assert found.plain_name != sweep({"steps": {"value": 5}}, name=f"{name}?").plain_name


def test_the_paths_of_a_sweep_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    command = [*COMMAND[:3], "~/base.yaml", COMMAND[4]]
    found = sweep({"steps": {"value": 5}}, program="$HOME/trainer.py", command=command)
    assert (found.keys.program, found.config) == (f"{tmp_path}/trainer.py", tmp_path / "base.yaml")
    assert wandb_spec(found)["command"][3:5] == ["~/base.yaml", "name='sweep-s{seed}'"]
    monkeypatch.delenv("NOWHERE", raising=False)
    command[3] = "$NOWHERE/base.yaml"
    assert "command must be a path whose variables are set, got '$NOWHERE/base.yaml'" in refused(
        {"steps": {"value": 5}}, command=command
    )


def test_a_plain_name_stays_as_it_is():
    assert sweep({"steps": {"value": 5}}, name="lr_sweep-2.b").plain_name == "lr_sweep-2.b"


@pytest.mark.parametrize(
    "value",
    [
        "a: b", "- a", "#x", "a #b", "yes", "010", "1e3", "null", "~", "", " a", "été 😀", "a\nb",
        "\t\x85\u2028", "'\"", "[a, b]", "2024-01-31", "1:30", "<<", "=", 1, 1.0, True, None,
        math.inf, -math.inf, 1e-5, [1, [2.0, None]], {"a": [1, "b: c"]}, [math.inf],
    ],
)  # fmt: skip
def test_an_override_says_the_value_whatever_it_is(value):
    values = {}
    assert set_key(values, as_override("a", value), ["a"], "a=1") is None
    assert values == {"a": value}
    assert type(values["a"]) is type(value)


def test_the_shipped_sweep_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = load_sweep("configs/sweep_digits.yaml")
    assert (len(found.grid()), found.seeds) == (25, (0, 1, 2))


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"select.horizn": {"values": [1]}}, "select.horizn must be a known key"),
        ({"select.horizn": {"values": [1]}}, "did you mean select.horizon?"),
        ({"horizon": {"values": [1]}}, "did you mean select.horizon?"),
        ({"select.horizon": {"values": [0, -1]}}, "select.horizon must be an integer >= 0"),
        ({"select.keep": {"values": [65]}}, "select.keep must be <= data.pool (64), got 65"),
        ({"steps": 5}, "parameters.steps must be a mapping with value, values, or min and max"),
        ({"steps": {"values": []}}, "parameters.steps.values must be a list that is not empty"),
        ({"steps": {"min": 1}}, "parameters.steps must have min and max (uniform), got ['min']"),
        ({"optimizer.lr": {"min": 0.1, "max": 0.2}}, "optimizer.lr must have values in a grid"),
        ({"num_threads": {"values": [1, 2]}}, "parameters.num_threads must have one value"),
        ({"name": {"values": ["a", "b"]}}, "parameters.name must have one value: each run of a"),
        ({"seed": {"values": [0.5]}, "steps": {"value": 1}}, "seed must have integer values"),
        (
            {"optimizer.lr": {"distribution": "log_uniform_value", "min": 1, "max": 2}},
            "distribution must be one of constant, categorical, int_uniform, uniform, q_uniform, "
            "log_uniform, log_uniform_values, got 'log_uniform_value'; did you mean",
        ),
        (
            {"optimizer.lr": {"distribution": "beta", "a": 1, "b": 2}},
            "parameters.optimizer.lr must be left to W&B's server: 'beta' is not supported here",
        ),
        (
            {"steps": {"values": [1, 2], "probabilities": [0.5, 0.5]}},
            "parameters.steps must be left to W&B's server: 'probabilities' is not supported here",
        ),
    ],
)
def test_parameters_that_cannot_be(parameters, message):
    assert message in refused(parameters)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": {"name": "test/accuracy", "goal": "maximize"}}, "must not be the test set"),
        ({"metric": {"name": "train/loss"}}, "metric.name must be measured on the target set"),
        ({"metric": {"name": "target/loss", "target": 0.1}}, "metric.target must be left to W&B"),
        ({"method": "custom"}, "method must be left to W&B's server: 'custom'"),
        ({"method": "gird"}, "method must be one of grid, random, bayes, got 'gird'; did you mean"),
        ({"method": "random"}, "run_cap must be given when method is random"),
        ({"controller": {"type": "local"}}, "controller must be left to W&B's server"),
        ({"metod": "grid"}, "metod must be a known key, got 'grid'; did you mean method?"),
        ({"program": None}, "program must be given"),
        ({"program": "train.py"}, "program must be an existing file, got 'train.py'"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate must be a mapping with min"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate.type must be left to W&B"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "strict": True}}, "strict"),
        ({"command": ["accelerate", "launch", *COMMAND[2:]]}, "got 'accelerate' in it"),
        ({"command": COMMAND[:3]}, "command must be [${env}"),
        ({"command": COMMAND[:4]}, "command must hold ${args_no_hyphens}"),
    ],
)
def test_files_that_cannot_be_run(keys, message):
    assert message in refused({"steps": {"value": 5}}, **keys)


def test_everything_wrong_with_a_file_is_said_at_once():
    text = refused(
        {"optimizer.lr": {"min": 2, "max": 1}, "steps": 3},
        metric={"name": "test/loss"},
        command=["x", *COMMAND],
    )
    assert text.startswith("sweep.yaml: 4 errors in the sweep")


def test_a_missing_base_is_named():
    assert "other.yaml: config must be an existing file" in refused(
        {"steps": {"value": 5}}, command=[*COMMAND[:3], "other.yaml", COMMAND[4]]
    )


def test_the_command_line_says_it_in_one_message(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "sweep.yaml", "--jobs", "0"])
    assert "must be an integer >= 1, got '0'" in capsys.readouterr().err
    refused({"select.horizn": {"values": [1]}})
    assert main(["tune", "sweep.yaml"]) == 2
    assert "did you mean select.horizon?" in capsys.readouterr().err


# --- on W&B ---------------------------------------------------------------------------------


def test_wandb_gives_the_trainer_what_it_is_to_run():
    """The arguments as W&B's own agent writes them, from the file and the values it chose."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args  # noqa: PLC0415 - takes seconds

    found = sweep(
        {"select.horizon": {"values": [1, math.inf]}, "model.hidden": {"values": [[64], [32]]}}
    )
    spec = wandb_spec(found)
    assert spec["parameters"]["select.horizon"] == {"values": [1, ".inf"]}  # JSON has no infinity
    chosen = {"select.horizon": {"value": ".inf"}, "model.hidden": {"value": [32]}}
    given = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    config = load(spec["command"][3], [*spec["command"][4:-1], *given])
    assert (config.select.horizon, config.model.hidden) == (math.inf, (32,))
    assert config.run_name == "sweep-horizoninf-hidden-32--s0"
    assert config.track.wandb == "online"
