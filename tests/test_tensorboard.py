"""TensorBoard's events, read back by TensorBoard's own reader: those of metrics.jsonl."""

import io
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    TENSORS,
    EventAccumulator,
)
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.util.tensor_util import make_ndarray

from selectflow.run import tensorboard
from selectflow.run.log import Tracker
from selectflow.run.metrics import STEP, from_json

ROOT = Path(__file__).parents[1]


def events(run_dir):
    found = EventAccumulator(str(run_dir / "tensorboard"), {TENSORS: 0})  # 0: all of them
    return found.Reload()


def scalars(found):
    """(tag, step) -> value, in the order of the events; a step that is there twice fails."""
    values = {}
    for tag in found.Tags()["tensors"]:
        if found.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            for event in found.Tensors(tag):
                assert (tag, event.step) not in values
                # its fast reader passes over scalars of another type
                assert event.tensor_proto.dtype == DT_FLOAT
                values[tag, event.step] = float(make_ndarray(event.tensor_proto))
    return values


def logged(run_dir):
    text = (run_dir / "metrics.jsonl").read_text()
    lines = [from_json(json.loads(line)) for line in text.splitlines()]
    return {
        (name, line[STEP]): float(np.float32(value))
        for line in lines
        for name, value in line.items()
        if name != STEP
    }


def same(ours, recorded):
    return ours.keys() == recorded.keys() and all(
        ours[key] == recorded[key] or (math.isnan(ours[key]) and math.isnan(recorded[key]))
        for key in ours
    )


def trainer(root, *overrides):
    main = runpy.run_path(str(ROOT / "trainers" / "vision.py"))["main"]
    options = {
        "root": root, "name": "a", "steps": 8, "eval_every": 2, "checkpoint_every": 3,
        "data.root": root / "data", "num_threads": 1, "track.wandb": "disabled",
        "track.tensorboard": "true", "track.samples": 2,
    }  # fmt: skip
    given = [f"{key}={value}" for key, value in options.items()]
    return main([str(ROOT / "configs" / "digits_online.yaml"), *given, *overrides])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run of the vision trainer."""
    root = tmp_path_factory.mktemp("run")
    assert trainer(root) == 0
    return root / "a"


def test_the_events_are_the_lines_of_the_metrics(run_dir):
    found = scalars(events(run_dir))
    assert len({step for _, step in found}) == 5  # 0, 2, 4, 6 and 8
    assert same(found, logged(run_dir))


def test_values_are_those_of_float32_and_not_finite_ones_kept(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a", with_tensorboard=True)
    tracker.log(1, {"a": 1 / 3, "b": math.nan, "data/samples_seen": 2**40 + 1})
    tracker.log(7, {"a": math.inf, "c": 1e-30})
    assert same(scalars(events(tmp_path)), logged(tmp_path))  # before it is closed
    tracker.finish({"status": "finished"})
    assert same(scalars(events(tmp_path)), logged(tmp_path))


def test_what_a_resumed_run_does_again_is_there_once(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a", with_tensorboard=True)
    for step in (1, 2):
        tracker.log(step, {"a": step})
    saved = tracker.state_dict()
    tracker.log(3, {"a": 30})
    tracker.log(4, {"a": 40})
    again = Tracker(tmp_path, {}, name="a", with_tensorboard=True)
    again.load_state_dict(saved)
    again.log(3, {"a": 3})
    again.finish({"status": "finished"})
    found = scalars(events(tmp_path))
    assert found == {("a", step): step for step in (1, 2, 3)}
    assert found == logged(tmp_path)


def test_samples_are_pictures_and_a_table(run_dir):
    from PIL import Image  # noqa: PLC0415

    found = events(run_dir)
    (picture,) = found.Tensors("samples/highest")
    width, height, png = make_ndarray(picture.tensor_proto)
    assert (int(width), int(height)) == (8 * 66, 2 * 66)
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (8 * 66, 2 * 66)  # 16 in two rows
    recent = found.Tensors("recent/table/text_summary")
    assert [event.step for event in recent] == [2, 4, 6, 8]
    (table,) = make_ndarray(recent[-1].tensor_proto)
    head, _, *rows = table.decode().splitlines()
    assert head == "| end | score | origin | step | key | text |"
    assert [row.split()[1] for row in rows] == ["highest"] * 2 + ["lowest"] * 2


def test_nothing_of_the_data_is_markup_in_a_table(tmp_path):
    tracker = Tracker(tmp_path, {}, name="a", with_tensorboard=True)
    tracker.log(1, {"a": 1.0})
    tracker.show(lambda: [{"end": "highest", "text": "<b>|\n`x` [a](b)\x00", "score": 0.123456}])
    (event,) = events(tmp_path).Tensors("samples/table/text_summary")
    row = make_ndarray(event.tensor_proto)[0].decode().splitlines()[2]
    assert row.count("|") == 4
    assert not set("<>`[]()*_\n\x00") & set(row)
    assert "&#60;b&#62;&#124; &#96;x&#96;" in row


def test_one_that_fails_is_switched_off_with_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder is to be")
    tracker = Tracker(tmp_path, {}, name="a", with_tensorboard=True)
    with pytest.warns(UserWarning, match="TensorBoard failed and is switched off"):
        tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 2.0})
    assert logged(tmp_path) == {("a", 1): 1.0, ("a", 2): 2.0}


def test_a_run_that_asks_for_it_without_the_package_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    assert trainer(tmp_path) == 2
    assert "pip install 'selectflow[tensorboard]'" in capsys.readouterr().err


def test_a_run_without_it_does_not_import_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from selectflow.run.log import Tracker;"
        "t = Tracker(Path(sys.argv[1]), {}, name='a'); t.log(1, {'a': 1.0}); t.finish({});"
        "print([m for m in sys.modules if 'tensorboard' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "['selectflow.run.tensorboard']"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]
