"""Configuration: what is accepted, what is refused, and that everything wrong is said at once."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from selectflow.cli import main
from selectflow.run.config import ConfigError, RunConfig, json_schema, load, to_yaml
from selectflow.run.yaml import dump_yaml, parse_yaml

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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("08", 8), ("-007", -7), ("0o10", 8), ("0x1F", 31), ("0b11", 3),
        ("1_000", 1000), ("1e3", 1000.0), ("1e-3", 0.001), ("-.5e+1", -5.0),
        (".inf", math.inf), ("1.", 1.0),
        ("2024-01-31", "2024-01-31"), ("1:30", "1:30"), ("12:30:45.5", "12:30:45.5"), ("=", "="),
        ("0o8", "0o8"), ("1e", "1e"), ("yes", True), ("~", None),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))
    if isinstance(value, str):
        assert parse_yaml(dump_yaml({"a": value})) == {"a": value}


def test_what_any_version_of_yaml_takes_for_another_type_is_quoted():
    """config.yaml is read by others, too: PyYAML reads 1.1."""
    texts = ["010", "08", "0o10", "1:30", "2024-01-31", "yes", "1e3", "1_000", "=", "<<", "null"]
    assert yaml.safe_load(dump_yaml({"a": texts})) == {"a": texts}


def test_merged_keys_are_not_keys_given_twice():
    text = """
base: &b {lr: 1, eps: 2}
x: {inner: &i {<<: *b, lr: 3}}
z: {<<: *i, wd: 4}
first: {<<: [*b, *i], wd: 4}
second: {wd: 4, <<: [*i, *b], eps: 5}
again: {<<: *i}
"""
    found = parse_yaml(text)
    assert found["x"] == {"inner": {"lr": 3, "eps": 2}}
    assert found["z"] == {"lr": 3, "eps": 2, "wd": 4}
    # of several that are merged the first wins, and the mapping's own key before them all
    assert found["first"] == {"lr": 1, "eps": 2, "wd": 4}
    assert found["second"] == {"lr": 3, "eps": 5, "wd": 4}
    assert found["again"] == {"lr": 3, "eps": 2}
    assert parse_yaml("{1: a, '1': b}") == {1: "a", "1": "b"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x: &b {a: 1}\ny: {<<: *b, a: 1, a: 2}", "key 'a' given twice in line 2, column 19"),
        ("x: &b {a: 1}\ny: {<<: *b, <<: *b}", "key '<<' given twice; merge several by <<: [*a"),
        ("{a: {b: 1, 'b': 2}}", "key 'b' given twice"),
        ("{1: a, 0x1: b}", "key '0x1' given twice"),
        ("{<<: 3}", "<< must be a mapping, or a list of mappings in line 1"),
        ("!!int a", "must be YAML: invalid literal for int"),
    ],
)
def test_keys_that_are_given_twice(text, rule):
    with pytest.raises(ConfigError, match=re.escape(rule)):
        parse_yaml(text)


@pytest.mark.parametrize("name", ["123", "007", "1e3", "yes"])
def test_a_name_that_reads_as_a_number_is_to_be_quoted(tmp_path, name):
    (problem,) = problems(write(tmp_path, f"name: {name}"))
    assert problem.startswith("name must be a string, got ")
    assert "; put it in quotes, on a command line as 'name=" in problem
    assert load(write(tmp_path, f"name: '{name}'")).run_name == name
    assert load(write(tmp_path, "name: a"), [f'name="{name}"']).run_name == name


def test_a_date_is_a_name_and_a_number_with_zeros_a_seed(tmp_path):
    config = load(write(tmp_path, "name: 2024-01-31\nseed: 010"), ["data.seed=009"])
    assert (config.run_name, config.seed, config.data.seed) == ("2024-01-31", 10, 9)


def test_a_dotted_key_in_a_file_is_to_be_nested(tmp_path):
    assert problems(write(tmp_path, "name: a\nselect.horizon: 2\nselect.horizn: 2")) == [
        "select.horizon must be nested, got 2; write select: {horizon: ...}",
        "select.horizn must be a known key, got 2; did you mean select.horizon?",
    ]


def test_paths_are_expanded_as_by_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    path = write(tmp_path, "name: a\nroot: ~/runs\ndata: {root: '${SCRATCH}/d'}")
    config = load(path, ["select.replay=$SCRATCH/other", "model.pretrained=~/weights"])
    assert config.run_dir == tmp_path / "runs" / "a"
    assert config.data.directory == Path("/scratch/me/d")
    assert config.select.replay == Path("/scratch/me/other")
    assert config.model.pretrained == f"{tmp_path}/weights"
    assert load(write(tmp_path, to_yaml(config))) == config
    text = load(path, ["data.text.source=files:~/t", "data.text.tokenizer=$SCRATCH/tok"]).data.text
    assert (text.source, text.tokenizer) == (f"files:{tmp_path}/t", "/scratch/me/tok")
    assert load(path, ["data.root=s3://$SCRATCH/a$b"]).data.root == "s3:///scratch/me/a$b"
    assert load(path, ["root=a~b"]).root == Path("a~b")
    assert problems(path, "root=$NOWHERE/runs", "data.root=~nobody-here/x") == [
        "root must be a path whose variables are set, got '$NOWHERE/runs'; $NOWHERE is not, set it "
        "or write it out",
        "data.root must be a path whose variables are set, got '~nobody-here/x'; ~nobody is not, "
        "set it or write it out",
    ]


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


def test_costs_of_horizons_come_back_from_the_file_of_a_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "name: run\nselect: {horizon: auto, largest_horizon: 1, costs: {0: 2.0, 1: 3}}\n"
    )
    made = load(path)
    assert made.select.costs == {0: 2.0, 1: 3.0}
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    assert load(path) == made
