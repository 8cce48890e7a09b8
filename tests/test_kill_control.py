"""SIGKILL around a step that is taken back and a change of the horizon, resumed to the end."""

import os
import signal
from functools import partial

import pytest
from test_kill import finish, start
from test_resume import assert_same, outcome
from test_run import config, digits, read_lines, task

import selectflow.run.build
from selectflow import AutoHorizon, AutoRate
from selectflow.core.torch_optim import OptimizerReader
from selectflow.run.directory import Checkpoints
from selectflow.run.log import DECISIONS, DecisionLog
from selectflow.run.loop import train

__all__ = ["digits"]  # the fixture

SETTINGS = {
    "build_horizon": AutoHorizon(
        largest=1,
        gap=3,
        longest_gap=3,
        contest_steps=2,
        share=1.0,
        early_share=1e6,
        late_share=1e6,
        costs={0: 1.5, 1: 2.0},
    ),
    "build_rate": AutoRate(window=3, longest_gap=6, rise=0.001),
}


def options(folder, every):
    """Of a run whose rate soon is too high."""
    return config(
        folder, name="run", steps=20, eval_every=5, checkpoint_every=every, resume="auto",
        select={"horizon": "auto", "lr": "auto"}, optimizer={"lr": 0.03},
    )  # fmt: skip


def restless(patch=setattr):
    """Let the controller move often."""
    for name, made in SETTINGS.items():
        patch(selectflow.run.build, name, lambda *_, made=made: made)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def after_writing(step):
    """When parameters and moments were replaced, and nothing else yet."""
    real = OptimizerReader.write

    def write(self, *args):
        real(self, *args)
        if self.num_steps() == step:
            kill()

    OptimizerReader.write = write


def after_deciding(step):
    """When the decision is in its file, and nothing was trained on it."""
    real = DecisionLog.add

    def add(self, decision):
        real(self, decision)
        if decision.step == step and decision.moved:
            kill()

    DecisionLog.add = add


def around_saving(step, *, is_after):
    """Before or after the checkpoint of a step."""
    real = Checkpoints.save

    def save(self, at, state):
        if at == step and not is_after:
            kill()
        real(self, at, state)
        if at == step:
            kill()

    Checkpoints.save = save


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The directory of a run that nothing happened to, and the steps of its decisions."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:  # here: children then start with all imported
        restless(patch.setattr)
        run(digits, options(folder, 100))
    lines = read_lines(folder / "run" / DECISIONS)
    moved = [line for line in lines if line["before"] != line["after"]]
    taken_back = [line["step"] for line in moved if "taken back" in line["reason"]]
    horizons = [line["step"] for line in moved if line["what"] == "horizon"]
    assert taken_back
    assert horizons
    return folder / "run", {"taken back": taken_back[0], "horizon": horizons[0]}


def run(digits, made):
    train(made, task(digits))
    return 0


SAVING = {
    f"{when} checkpoint {later:+d}": (later, is_after)
    for later in (0, 1)
    for when, is_after in (("before", False), ("after", True))
}


def check(whole, digits, tmp_path, every, prepare):
    made = options(tmp_path, every)

    def killed():
        restless()
        prepare()

    _, status = os.waitpid(start(partial(run, digits), made, killed), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    finish(partial(run, digits), made, restless)
    assert_same(outcome(whole), outcome(tmp_path / "run"))


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize(
    ("event", "moment"),
    [("taken back", after_writing), ("taken back", after_deciding), ("horizon", after_deciding)],
)
def test_a_run_killed_in_a_change_ends_as_if_it_never_was(
    whole, digits, tmp_path, event, moment, every
):
    expected, steps = whole
    check(expected, digits, tmp_path, every, partial(moment, steps[event]))


@pytest.mark.parametrize(("later", "is_after"), SAVING.values(), ids=SAVING)
@pytest.mark.parametrize("event", ["taken back", "horizon"])
def test_a_run_killed_beside_a_change_ends_as_if_it_never_was(
    whole, digits, tmp_path, event, later, is_after
):
    """The checkpoint that is resumed is the last before the change, or the first after it."""
    expected, steps = whole
    prepare = partial(around_saving, steps[event] + later, is_after=is_after)
    check(expected, digits, tmp_path, 1, prepare)
