"""The metrics of a run: their names, their numbers as JSON, and means over a stretch of steps."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from selectflow.core.batches import num_examples
from selectflow.strategies import Selection

STEP = "train/step"
TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/lr"
TARGET_LOSS = "target/loss"
TEST_LOSS = "test/loss"
TEST_ACCURACY = "test/accuracy"
SCORE_MEAN = "select/score_mean"
"""Mean score of the kept examples."""
KEPT_FRACTION = "select/kept_fraction"
SELECTED = "select/share_of_steps"
"""Share of the steps that were selected for; in the others, control found, plain training gains
more."""
POSITIVE_WEIGHTS = "select/positive_weights"
"""Share of the kept examples whose weight is not 0 (select.weighting)."""
EFFECTIVE_SIZE = "select/effective_size"
"""Kept examples that count, (sum w)^2 / sum w^2 (select.weighting)."""
HORIZON = "select/horizon"
INTERVAL = "select/interval"
"""Optimizer steps between two look-aheads, where that is under control."""
LR_MULTIPLIER = "select/lr_multiplier"
LOOKAHEAD_TARGET_LOSS = "select/target_loss"
"""Target loss at the end of the look-ahead."""
SCORER_LOSS = "select/scorer_loss"
"""Mean loss of the scorer over what was kept."""
SCORER_GAIN = "select/scorer_gain"
"""How much lower, relative, the target loss ends a few steps on by the scorer's choice than by
chance; where that was measured."""
SAMPLES_SEEN = "data/samples_seen"
SOURCE_SHARE = "data/share/"
"""Before a source's name: its share of the pools, the newest."""
SOURCE_KEPT = "select/source_kept/"
"""Before a source's name: kept part of its candidates."""
TARGET_SAMPLES_SEEN = "data/target_samples_seen"
"""Of the samples seen those that were mixed in from the target set."""
SAMPLES_SCORED = "data/samples_scored"
TOKENS_SEEN = "data/tokens_seen"
DATA_ERRORS = "data/errors"
WALL_S = "perf/wall_s"
"""Seconds of training so far: data, selection and updates, without evaluation."""
DATA_S = "perf/data_s"
SELECT_S = "perf/select_s"
STEP_S = "perf/step_s"
UPFRONT_S = "perf/upfront_s"
"""Seconds of offline selection before the first step."""
LOWEST_AT = "lowest_target_loss_at"
"""In summary.json of a run with early stopping: the step whose weights it ends with."""
DIVERGED_AT = "diverged_at"
"""In summary.json: the step that ended the run, by a loss, gradient or score that is not finite."""

CONTROLLED = {
    name: f"select/{name}"
    for name in ("lead", "proxy_first_order", "proxy_second_order", "relative_error", "trust_ratio")
}
"""Measure of a controller's decision -> its metric, the last value."""


def kept_share(kind: str) -> str:
    """The metric for the share of a kind of sample, as "altered", among the kept, by weight."""
    return f"select/kept_{kind}"


def evaluated(split: str, name: str) -> str:
    """The metric for a mean over a split, as over "test" the "accuracy"."""
    return f"{split}/{name}"


def kept_by_source(selection: Selection) -> Iterator[tuple[str, float, int]]:
    """Of each source of a pool the name, the kept part of its candidates, and how many these are.

    None where the pool has no "source".
    """
    sources = selection.pool.get("source", ())
    kept = Counter(sources[place] for place in selection.indices.tolist()) if sources else {}
    for name, num in Counter(sources).items():
        yield name, kept[name] / num, num


# --- numbers as JSON ------------------------------------------------------------------------------

# JSON has no number for them. A metric that was not measured has no entry at all.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def number(name: str, value: Any) -> float | int:
    """A metric as a plain number of Python, from a number of torch or numpy too.

    Raises:
        TypeError: it is not a number; names the metric.
    """
    if isinstance(value, int):
        return value
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name} must be a number, got {value!r}") from error


def to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: a number that is not finite as "NaN", "Infinity" or "-Infinity"."""
    return {name: _to_json(value) for name, value in values.items()}


def _to_json(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_json` was given; null, which earlier versions wrote for all three, is NaN."""
    return {
        name: _NOT_FINITE.get(x, x) if isinstance(x, str) else math.nan if x is None else x
        for name, x in values.items()
    }


# --- means ----------------------------------------------------------------------------------------


class Means:
    """Means of metrics over a stretch of steps; each over the steps that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    @classmethod
    def over(cls, states: Iterable[Mapping[str, Any]]) -> Means:
        """Means over all that several have added, from their states."""
        found = cls()
        for state in states:
            for name, total in state["sums"].items():
                found._sums[name] += total
                found._weights[name] += state["weights"][name]
        return found

    def add(self, values: Mapping[str, float | None], weight: float = 1.0) -> None:
        """Add a value of each metric; None: there is none."""
        for name, value in values.items():
            if value is not None:
                self._sums[name] += weight * value
                self._weights[name] += weight

    def pop(self) -> dict[str, float]:
        """The means since the last call, by metric name."""
        means = {name: total / self._weights[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._weights.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """What the next means depend on."""
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`."""
        self._sums.update(state["sums"])
        self._weights.update(state["weights"])


def of_selection(selection: Selection) -> dict[str, float | None]:
    """The metrics of one selection that are reported as means over the selections."""
    scores = selection.scores
    if scores is None:
        num = num_examples(selection.pool)
        return {SELECTED: 0.0, KEPT_FRACTION: len(selection.indices) / num}
    kept = scores[selection.indices]
    return {
        SELECTED: 1.0,
        SCORE_MEAN: float(kept.mean()) if len(kept) else None,  # others may have kept all of theirs
        KEPT_FRACTION: len(selection.indices) / len(scores),
        HORIZON: selection.horizon,
        INTERVAL: selection.interval,
        SCORER_LOSS: selection.scorer_loss,
        SCORER_GAIN: selection.scorer_gain,
    } | _of_weights(selection.weights)


def _of_weights(weights: Tensor | None) -> dict[str, float | None]:
    if weights is None or not len(weights):
        return {}
    effective = weights.sum().square() / weights.square().sum()
    return {POSITIVE_WEIGHTS: float((weights > 0).float().mean()), EFFECTIVE_SIZE: float(effective)}


def of_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the shares of sources, by source."""
    return {SOURCE_SHARE + name: share for name, share in shares.items()}
