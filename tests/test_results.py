"""What the results are read from, by hand: `make results`."""

from collections import Counter
from dataclasses import replace

import pytest
import results
import results_tasks
from synthetic_runs import make_run

from selectflow.data import read_metadata
from selectflow.run.config import load
from selectflow.run.metrics import TARGET_LOSS, TEST_ACCURACY, TEST_LOSS

ONLINE = str(results_tasks.ROOT / "configs" / "digits_online.yaml")


@pytest.fixture
def found(tmp_path):
    """Two seeds of uniform, 0.1 s a step, and of offline, 0.2 s a step after 3 s of recording."""
    uniform = [[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4, 0.9, 1.0, 0.8, 0.7]]
    offline = [[0.5, 0.9], [0.6, 0.8]]
    return {
        "uniform": [
            make_run(tmp_path / f"u{seed}", values, strategy="uniform", seed=seed)
            for seed, values in enumerate(uniform)
        ],
        "offline": [
            make_run(tmp_path / f"o{seed}", values, seed=seed, step_s=0.2, upfront_s=3)
            for seed, values in enumerate(offline)
        ],
    }


def with_target(run, losses):
    lines = zip(run.metrics, losses, strict=True)
    return replace(run, metrics=[line | {TARGET_LOSS: loss} for line, loss in lines])


def test_equal_time_counts_what_was_spent_before_the_first_step(found):
    comparison = results.compare(found, TEST_ACCURACY)
    uniform, offline = comparison.rows
    assert comparison.step == 20
    # offline ends at 3 + 20 * 0.2 = 7 s, when uniform has done 70 steps; at equal steps it has 20
    assert offline.stats["baseline_in_same_time"].mean == pytest.approx((0.7 + 0.8) / 2)
    assert offline.tests["in_same_time"].mean == pytest.approx((0.2 + 0.0) / 2)
    assert uniform.stats["quality_at_step"].mean == pytest.approx((0.4 + 0.2) / 2)
    assert offline.tests["at_equal_steps"].mean == pytest.approx((0.5 + 0.6) / 2)


def test_the_table_has_every_method_at_equal_steps_and_in_the_same_time(found):
    grid = results.headline([results.compare(found, m) for m in (TEST_LOSS, TEST_ACCURACY)], True)
    # seconds of uniform are those at step 20, not at its end; sd of 0.4 and 0.2 is 0.1 sqrt 2
    assert grid.cells == [
        ["uniform", "2.0 ± 0.0", "0.700 ± 0.141", "30.0 ± 14.1", *"----", "45.0 ± 0.0"],
        [
            "offline", "7.0 ± 0.0", "0.150 ± 0.071", "85.0 ± 7.1", "0.250 ± 0.071", "75.0 ± 7.1",
            # 0.5 and 0.6: t = 11 on one degree of freedom, p = 0.06; 0.2 and 0: p = 0.5
            "no difference seen", "no difference seen", "15.0 ± 0.0",
        ],
    ]  # fmt: skip
    lines = results.markdown(grid).splitlines()
    assert {line.count("|") for line in lines} == {len(grid.head) + 1}


def test_loss_and_accuracy_are_named_apart_only_where_they_disagree():
    assert results.said(["better", "better"]) == "better"
    assert results.said(["worse", "no difference seen"]) == "worse, no difference seen"


def test_early_stopping_reads_the_test_set_where_the_target_loss_was_lowest(found):
    run = with_target(found["uniform"][0], [5, 4, 4, 3, 6, 2.5, 1, 1.5])
    stopped = results.best_by_target(run)
    read = [line[TEST_ACCURACY] for line in stopped.metrics]
    # a tie changes nothing, the higher accuracy of 0.8 is not known, the later 0.7 is kept
    assert read == [0.3, 0.4, 0.4, 0.6, 0.6, 0.8, 0.7, 0.7]
    assert [line["perf/wall_s"] for line in stopped.metrics] == [
        line["perf/wall_s"] for line in run.metrics
    ]
    # in the same 7 s uniform may have stopped before, at a target loss that is lower
    late = with_target(found["uniform"][0], [5, 4, 4, 3, 6, 1, 2, 2])
    runs = {"uniform": [late], "offline": [with_target(found["offline"][0], [2, 1])]}
    runs = {name: [*map(results.best_by_target, each)] for name, each in runs.items()}
    assert results.compare(runs, TEST_ACCURACY).rows[1].stats["baseline_in_same_time"].mean == 0.8


def test_methods_of_one_strategy_on_other_data_are_compared_as_named(tmp_path):
    data = {"name": "text", "seed": 0, "text": {"mixture": {"code": 0.2, "prose": 0.8}}}
    clean = data | {"text": {"mixture": {"code": 1.0}}}
    runs = {
        "uniform": [make_run(tmp_path / "u", [0.1, 0.2], strategy="uniform", data=data)],
        "oracle": [make_run(tmp_path / "o", [0.3, 0.5], strategy="uniform", data=clean)],
    }
    rows = results.compare(runs, TEST_ACCURACY).rows
    assert [(row.label, row.stats["quality_at_step"].mean) for row in rows] == [
        ("uniform", 0.2),
        ("oracle", 0.5),
    ]
    assert results.until(runs["oracle"][0], 10).last_step == 10


def test_uniform_goes_on_until_the_slowest_has_ended(found):
    longer = results.longer(load(ONLINE), found["offline"])
    # they end at 7 s and step 20, where an evaluation every 50 steps would miss it
    assert longer == ["steps=20000", "max_wall_s=8", "eval_every=10"]
    cosine = load(ONLINE, ["schedule.name=cosine"])
    assert results.longer(cosine, found["offline"]) == []  # its rate would be another throughout


def test_a_schedule_is_stretched_over_the_seconds_of_the_slowest(found):
    cosine = load(ONLINE, ["schedule.name=cosine", "steps=20", "seed=1"])
    uniform = results.until(found["uniform"][1], 20)  # 2 s, the slowest 7 s
    name = "name=uniform-schedule-stretched-s1"
    assert results.stretched(cosine, uniform, found["offline"]) == ["steps=70", name]
    assert results.stretched(cosine, found["offline"][1], [uniform]) == []
    assert results.stretched(load(ONLINE), uniform, found["offline"]) == []  # `longer` does it
    said = results.as_long(found["uniform"], (TEST_ACCURACY,))
    assert said == (
        "uniform, schedule stretched: 80, 80 steps, 8.0 ± 0.0 s: test/accuracy 0.650 ± 0.071."
    )


def test_a_run_is_repeated_where_its_configuration_is_another(tmp_path, capsys):
    task = results_tasks.TASKS["clean"]
    common = {"steps": 20, "eval_every": 10, "data.root": tmp_path / "digits"}
    arguments = results.configure(task, "influence, H = 4", 3, tmp_path, common)
    assert not results.is_there(load(arguments[0], arguments[1:]))
    first = results.run(task, "influence, H = 4", arguments, tmp_path / "runs.jsonl")
    assert first.seed == (3, 3)
    assert first.where == str(tmp_path / "influence-H-4-s3")
    assert results.run(task, "influence, H = 4", arguments, tmp_path / "runs.jsonl") == first
    record = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(record) == 1  # the second was read
    for option, there in {
        "steps=20": True,
        "max_wall_s=9": True,  # the stored one had no limit
        "optimizer.lr=0.1": False,
        "select.horizon=.inf": False,
    }.items():
        assert results.is_there(load(arguments[0], [*arguments[1:], option])) is there
    assert "1 runs from" in results.origin(tmp_path / "runs.jsonl", "make results")


def test_a_run_that_was_stopped_ends_the_study(tmp_path, monkeypatch):
    def stopped(arguments):
        run_dir = load(arguments[0], arguments[1:]).run_dir
        make_run(run_dir, [0.5], status="stopped by SIGTERM")
        return 0  # as the trainers do

    monkeypatch.setattr(results, "trainer", lambda name: stopped)
    task, record = results_tasks.TASKS["clean"], tmp_path / "runs.jsonl"
    arguments = results.configure(task, "uniform", 0, tmp_path, {})
    with pytest.raises(SystemExit, match="uniform-s0: stopped at step 10; start again"):
        results.run(task, "uniform", arguments, record)
    assert not record.exists()


def test_imbalanced_digits_are_drawn_by_seed_and_judged_by_all_classes_alike(tmp_path):
    def classes(seed, split):
        root = results_tasks.imbalanced(tmp_path, seed)["data.root"]
        return Counter(made["true_label"] for made in read_metadata(root, split).values())

    whole = classes(0, "train")
    assert whole != classes(1, "train")
    labels = read_metadata(tmp_path / "whole", "train").values()
    counts = Counter(made["true_label"] for made in labels)
    assert whole[0] == counts[0]  # probability 1
    for label in range(1, 10):
        share = 0.05 ** (label / 9)
        spread = (counts[label] * share * (1 - share)) ** 0.5
        assert abs(whole[label] - counts[label] * share) < 3.5 * spread + 1
    assert min(classes(0, "target").values()) >= 19


def test_the_oracle_has_the_code_of_the_mixture_and_nothing_else():
    for task, size in {"text": 3600, "lora": 3600, "finetune": 1280}.items():
        config, options = results_tasks.TASKS[task].methods["oracle"]
        overrides = [f"{key}={value}" for key, value in options.items()]
        text = load(results_tasks.CONFIGS / f"{config}.yaml", overrides).data.text
        assert text.mixture == {"code": 1.0}
        assert text.num_train == size  # a fifth


def test_one_base_is_trained_for_all_seeds(tmp_path, monkeypatch):
    calls, data = [], results_tasks.from_base("text_lora_base")

    def trained(arguments):
        calls.append(arguments)
        make_run(load(arguments[0], arguments[1:]).run_dir, [0.5])
        return 0

    monkeypatch.setattr(results_tasks, "trainer", lambda name: trained)
    bases = {data(tmp_path, seed)["model.pretrained"] for seed in range(3)}
    assert bases == {tmp_path / "text_lora_base-s0" / "model"}
    assert len(calls) == 1
    monkeypatch.setattr(results_tasks, "trainer", lambda name: lambda arguments: 2)
    with pytest.raises(SystemExit, match="the base was not trained"):
        data(tmp_path / "other", 0)


def test_origins_of_the_kept_are_means_over_the_steps_that_all_have(tmp_path):
    def with_code(run, shares):
        lines = zip(run.metrics, shares, strict=True)
        return replace(run, metrics=[line | {"select/kept_code": x} for line, x in lines])

    runs = {
        "uniform": [with_code(make_run(tmp_path / "u", [0.1] * 3), [0.2, 0.3, 0.9])],
        "oracle": [
            with_code(make_run(tmp_path / f"o{seed}", [0.2] * 2, seed=seed), [1, share])
            for seed, share in enumerate([0.9, 0.7])
        ],
    }
    grid = results.kept_origins(runs)
    assert grid.head == ["", "code"]
    # in %: uniform's third evaluation is beyond the others' end; 95 and 85 have sd 7.07
    assert grid.cells == [["uniform", "25.0"], ["oracle", "90.0 ± 7.1"]]
    plain = {"uniform": [make_run(tmp_path / "plain", [0.1])]}
    assert results.kept_origins(plain).cells == []


def test_some_of_the_methods_are_run_beside_uniform():
    task = results.only(results.TASKS["noised"], ["offline"])
    assert [*task.methods] == ["uniform", "offline"]
    assert results.only(results.TASKS["noised"], None) is results.TASKS["noised"]
    with pytest.raises(SystemExit, match="got ofline"):
        results.only(results.TASKS["noised"], ["ofline"])
