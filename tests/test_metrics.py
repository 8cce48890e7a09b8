"""Means of metrics: each over the steps that have it, and gone on with after a stop."""

import json

from selectflow.run.metrics import Means


def test_a_mean_is_over_the_values_there_are():
    means = Means()
    means.add({"a": 1.0, "b": None})
    means.add({"a": 4.0, "b": 8.0})
    means.add({"a": 1.0}, weight=4.0)
    assert means.pop() == {"a": 1.5, "b": 8.0}
    assert means.pop() == {}


def test_means_go_on_after_a_stop():
    before, after = Means(), Means()
    before.add({"a": 1.0, "b": 2.0}, weight=0.5)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for means in (before, after):
        means.add({"a": 2.0})
    assert before.pop() == after.pop() == {"a": 2.5 / 1.5, "b": 2.0}
