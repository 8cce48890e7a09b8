"""What a comparison draws and tabulates: names of metrics, with title, unit and direction."""

from __future__ import annotations

from dataclasses import dataclass

STEP = "train/step"
SEEN = "data/samples_seen"
SCORED = "data/samples_scored"
TOKENS = "data/tokens_seen"
WALL = "perf/wall_s"  # seconds of training and selecting so far, evaluation not counted
SELECT = "perf/select_s"  # seconds of them spent on choosing
ACCURACY = "test/accuracy"
TEST_LOSS = "test/loss"
TARGET_LOSS = "target/loss"
KEPT = "select/kept_"  # shares of a kind among the kept, as select/kept_altered
KEPT_ALTERED = "select/kept_altered"
HORIZON = "select/horizon"
LR_MULTIPLIER = "select/lr_multiplier"

COUNTS = (SEEN, SCORED, TOKENS)  # 0 before the first step, where they are not logged


@dataclass(frozen=True)
class Quantity:
    """How a metric is shown.

    Attributes:
        metric: its name in metrics.jsonl.
        title: what a reader calls it.
        unit: of the shown value.
        scale: shown value = scale * logged value.
    """

    metric: str
    title: str
    unit: str
    scale: float = 1.0

    @property
    def label(self) -> str:
        """Title and unit, as on an axis."""
        return f"{self.title} ({self.unit})"


AXES = (
    Quantity(STEP, "optimizer steps", "count"),
    Quantity(SEEN, "samples trained on", "count"),
    Quantity(SCORED, "samples scored", "count"),
    Quantity(TOKENS, "tokens trained on", "count"),
    Quantity(WALL, "training and selection time", "s"),
)

_KNOWN = {
    known.metric: known
    for known in (
        *AXES,
        Quantity(KEPT_ALTERED, "altered samples among the kept", "%", 100.0),
        Quantity(HORIZON, "horizon H", "optimizer updates"),
        Quantity(LR_MULTIPLIER, "learning rate over its schedule", "factor"),
        Quantity("train/lr", "learning rate", "per update"),
        Quantity("select/relative_error", "relative error by the proxy", "ratio"),
        Quantity("select/trust_ratio", "trust ratio, real over predicted change", "ratio"),
    )
}


def quantity(metric: str) -> Quantity:
    """How a metric of any name is shown; a loss of the trainers is a cross-entropy, in nats."""
    if metric in _KNOWN:
        return _KNOWN[metric]
    split, _, name = metric.partition("/")
    title = f"{split} {name.replace('_', ' ')}" if name else metric
    if metric.startswith(KEPT):
        kind = metric.removeprefix(KEPT).replace("_", " ").replace("/", " ")
        return Quantity(metric, f"{kind} among the kept", "%", 100.0)
    if name == "accuracy":
        return Quantity(metric, title, "%", 100.0)
    return Quantity(metric, title, "nats" if name == "loss" else "as logged")


def is_higher_better(metric: str) -> bool:
    """Whether more of a metric is better: of an accuracy or a score, not of a loss or an error."""
    name = metric.rpartition("/")[2]
    return any(word in name for word in ("accuracy", "f1", "recall", "precision", "bleu", "auc"))
