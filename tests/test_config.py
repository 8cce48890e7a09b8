"""Configuration: what is accepted, what is refused, and that everything wrong is said at once."""

import json
import math
import re
from pathlib import Path

import pytest

from selectflow.cli import main
from selectflow.run.config import ConfigError, RunConfig, json_schema, load, to_yaml

CONFIGS = sorted(
    path
    for path in Path(__file__).parent.parent.joinpath("configs").glob("*.yaml")
    if not path.name.startswith(("audit_", "sweep_"))  # of other kinds, tested elsewhere
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(f"{path}: {len(lines)} error")
    return [line.strip() for line in lines]


def test_everything_wrong_is_reported_at_once(tmp_path):
    path = write(
        tmp_path,
        """
        name: a/b
        steps: "800"
        horizon: 2
        optimizer: {lr: 0, betas: [0.9, 1.5], lr_rate: 1, eps: .inf}
        model: {name: mpl, hidden: [64, "64"], lr: 1}
        select: {keep: 65, horizn: 1}
        data: {label_noise: 1.0, name: shards}
        track: 3
        """,
    )
    assert sorted(problems(path, "seed=true", "eval_every", "shedule.name=cosine")) == sorted(
        [
            "name must be a directory name of letters, digits, '.', '_' and '-'; "
            "{seed} stands for the seed, got 'a/b'",
            "steps must be an integer >= 1, got '800'",
            "seed must be an integer, got True",
            "horizon must be a known key, got 2; did you mean select.horizon?",
            "optimizer.lr must be greater than 0, got 0",
            "optimizer.betas.1 must be less than 1, got 1.5",
            "optimizer.lr_rate must be a known key, got 1; did you mean optimizer.lr?",
            "model.lr must be a known key, got 1; did you mean select.lr?",
            "optimizer.eps must be finite, got inf",
            "model.name must be one of mlp, cnn, resnet18, gpt2, llama, got 'mpl'; did you mean "
            "mlp?",
            "model.hidden.1 must be an integer >= 1, got '64'",
            "select.keep must be <= data.pool (64), got 65; keep fewer or enlarge it",
            "select.horizn must be a known key, got 1; did you mean select.horizon?",
            "data.label_noise must be less than 1, got 1.0",
            "data.root must be a directory when data.name is 'shards', got None; set data.root",
            "track must be a mapping of its fields, got 3",
            "'eval_every' must be key=value, as in select.horizon=2",
            "shedule.name must be a known key, got 'cosine'; did you mean schedule.name?",
        ]
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "1.0e-3"])
def test_every_way_to_write_a_thousandth_is_a_number(tmp_path, text):
    path = write(tmp_path, f"name: a\noptimizer: {{lr: {text}}}")
    assert load(path).optimizer.lr == 0.001
    assert load(write(tmp_path, "name: a"), [f"optimizer.lr={text}"]).optimizer.lr == 0.001


def test_an_integer_serves_as_a_float_but_not_the_reverse(tmp_path):
    path = write(tmp_path, "name: a\noptimizer: {lr: 1}")
    assert load(path).optimizer.lr == 1.0
    assert problems(path, "steps=8e2") == ["steps must be an integer >= 1, got 800.0"]


@pytest.mark.parametrize(("text", "keep"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("64", 64)])
def test_keep_is_a_count_or_a_fraction_by_its_type(tmp_path, text, keep):
    found = load(write(tmp_path, "name: a"), [f"select.keep={text}"]).select.keep
    assert (found, type(found)) == (keep, type(keep))


@pytest.mark.parametrize("text", ["0", "-1", "0.0", "1.5", "true", "'16'", "null"])
def test_other_values_of_keep_are_refused_once(tmp_path, text):
    (line,) = problems(write(tmp_path, "name: a"), f"select.keep={text}")
    assert line.startswith("select.keep must be an integer >= 1 or a fraction in (0, 1]")


@pytest.mark.parametrize("text", ["-1", "1.0", "-.inf", ".nan", "true", "'inf'", "null"])
def test_a_horizon_is_a_count_or_infinite(tmp_path, text):
    path = write(tmp_path, "name: a")
    (line,) = problems(path, f"select.horizon={text}")
    assert line.startswith("select.horizon must be an integer >= 0, auto or .inf, got ")
    offline = load(path, ["select.horizon=.inf"])
    assert (offline.select.horizon, offline.select.is_offline) == (math.inf, True)
    assert load(write(tmp_path, to_yaml(offline))) == offline
    assert problems(path, "select.horizon=.inf", "select.strategy=loss") == [
        "select.strategy must be influence when select.horizon is .inf, got 'loss'; "
        "give a finite horizon"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.milestones=[5, 3]", "schedule.milestones must be in rising order of step, got"),
        ("schedule.name=step", "schedule.milestones must be given when name is step, got ()"),
        ("schedule.name=steps", "schedule.name must be one of constant, cosine, linear, step, got"),
        ("select.horizon_schedule.milestones=[[4, 1], [4, 0]]", "in rising order of step, got"),
        ("select.horizon_schedule.milestones=[4]", "milestones.0 must be a pair [step, horizon]"),
        ("select.horizon_schedule.milestones=[[0, 1]]", "milestones.0.0 must be an integer >= 1"),
        ("select.horizon_schedule.final=-1", "final must be greater than or equal to 0, got -1"),
        ("select.horizon_schedule.finl=1", "did you mean select.horizon_schedule.final?"),
    ],
)
def test_schedules_that_cannot_be(tmp_path, override, message):
    (line,) = problems(write(tmp_path, "name: a"), override)
    assert message in line


def test_a_horizon_schedule_begins_at_a_finite_horizon(tmp_path):
    path = write(tmp_path, "name: a\nselect: {horizon_schedule: {name: linear}}")
    assert load(path).select.horizon == 1
    assert problems(path, "select.horizon=.inf") == [
        "select.horizon must be an integer, the first horizon, when "
        "select.horizon_schedule.name is linear, got inf"
    ]


@pytest.mark.parametrize("text", ["0", "1.01", "-0.5", ".inf"])
def test_the_share_of_kept_samples_is_in_its_range(tmp_path, text):
    (line,) = problems(write(tmp_path, "name: a"), f"select.keep_samples={text}")
    assert line.startswith("select.keep_samples must be ")


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path):
    path = write(tmp_path, "name: a\nsteps: 10\nselect: {horizon: 4, interval: 2}")
    config = load(path, ["steps=20", "steps=30", "select.horizon=2", "model.hidden=[64, 32]"])
    assert (config.steps, config.select.horizon, config.select.interval) == (30, 2, 2)
    assert config.model.hidden == (64, 32)


def test_an_override_mends_a_wrong_value_of_the_file(tmp_path):
    assert load(write(tmp_path, "name: a\nsteps: none"), ["steps=5"]).steps == 5


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must not be empty"),
        ("# only a comment\n", "must not be empty"),
        ("- name\n- steps\n", "must be a mapping, got ['name', 'steps']"),
        ("name: a\nsteps: 1\nsteps: 2\n", "key 'steps' given twice in line 3"),
        ("name: a\ndata: {seed: 1, pool: 2, seed: 3}\n", "key 'seed' given twice in line 2"),
        ("name: [a\n", "must be YAML"),
        ("name: !!python/object:os.system a\n", "must be YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, rule):
    with pytest.raises(ConfigError, match=re.escape(rule)):
        load(write(tmp_path, text))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    path = write(tmp_path, "name: a")
    with pytest.raises(ConfigError, match=rf"did you mean {re.escape(str(path))}\?"):
        load(tmp_path / "confg.yaml")
    with pytest.raises(ConfigError, match=r"must be an existing file$"):
        load(tmp_path / "nowhere" / "config.yaml")
    with pytest.raises(ConfigError, match="must be a readable text file"):
        load(tmp_path)


def test_a_missing_name_is_reported(tmp_path):
    assert problems(write(tmp_path, "steps: 3")) == ["name must be given"]


def test_resolved_yaml_reads_back_equal(tmp_path):
    # Strings that look like numbers, booleans and null are the ones that do not survive by luck.
    overrides = ["name='1e3'", "track.tags=['1e-3', 'yes', 'null', '010', é]", "track.group='5'"]
    overrides += ["optimizer.eps=1e-8", "data.root=some where", "optimizer.betas=[0.5, 0]"]
    overrides += ["select.horizon_schedule={name: step, milestones: [[3, 1], [6, 0]]}"]
    config = load(write(tmp_path, "name: a"), overrides)
    assert config.track.tags == ("1e-3", "yes", "null", "010", "é")
    assert load(write(tmp_path, to_yaml(config))) == config


def test_a_name_says_what_its_keys_are(tmp_path):
    path = write(tmp_path, "name: lr{optimizer.lr}-H{select.horizon}-{model.hidden}-s{seed}")
    config = load(path, ["select.horizon=.inf", "optimizer.lr=3e-5", "seed=4"])
    assert config.run_name == "lr3e-05-Hinf--128-128--s4"
    assert load(write(tmp_path, to_yaml(config))).run_name == config.run_name
    assert problems(path, "name=a-{optimzer.lr}-{select.horizon}") == [
        "name must have known keys in braces, got {optimzer.lr}; did you mean optimizer.lr?"
    ]


def test_a_configuration_cannot_be_changed(tmp_path):
    config = load(write(tmp_path, "name: a"))
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3  # type: ignore[misc]


def test_built_in_python_the_same_rules_hold():
    assert RunConfig(name="a", root="elsewhere").run_dir == Path("elsewhere/a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"select\.keep must be <= data\.pool \(8\), got 16"):
        RunConfig(name="a", data={"pool": 8})  # type: ignore[arg-type]


def test_digits_directory_says_what_is_in_it(tmp_path):
    path = write(tmp_path, "name: a\ndata: {label_noise: 0.4, seed: 3}")
    assert load(path).data.directory == Path("data/digits-noise0.4-seed3")
    assert load(path, ["data.root=here"]).data.directory == Path("here")
    remote = load(path, ["data.root=s3://bucket/digits"])
    assert remote.data.directory == "s3://bucket/digits"
    (tmp_path / "again.yaml").write_text(to_yaml(remote))
    assert load(tmp_path / "again.yaml") == remote


@pytest.mark.parametrize("root", ["d/train-{000000..000004}.tar", "d/a.tar", "pipe:cat a.tar"])
def test_shards_that_would_be_every_split_are_refused(tmp_path, root):
    """They would be trained on, the target and the test set at once."""
    path = write(tmp_path, "name: a\ndata: {name: shards}")
    assert problems(path, f"data.root={json.dumps(root)}") == [
        "data.root must be a directory with the splits train, target and test, or its URL, got "
        f"{root!r}"
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_how_to_run_it(path):
    config = load(path, ["seed=1"])
    assert config.run_name == f"{path.stem}-s1"
    trainer = "language" if config.data.name == "text" else "vision"
    assert f"python trainers/{trainer}.py configs/{path.name}" in path.read_text()


def test_the_demo_pair_trains_on_batches_of_one_size():
    folder = Path(__file__).parent.parent / "configs"
    online, uniform = load(folder / "digits_online.yaml"), load(folder / "digits_uniform.yaml")
    assert online.select.keep == uniform.select.keep == uniform.data.pool == 16
    assert online.data.pool == 64
    for section in ("model", "optimizer", "schedule"):
        assert getattr(online, section) == getattr(uniform, section)
    assert online.data.directory == uniform.data.directory


def test_schema_describes_every_field_with_its_range(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json_schema())
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            assert field.get("description"), name
    keep = schema["$defs"]["SelectConfig"]["properties"]["keep"]
    assert {"type": "integer", "minimum": 1} in keep["anyOf"]
    assert {"type": "number", "exclusiveMinimum": 0, "maximum": 1} in keep["anyOf"]
    assert schema["required"] == ["name"]
