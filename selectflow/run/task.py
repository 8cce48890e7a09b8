"""What a run trains, on what, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from selectflow.core.batches import Batch
from selectflow.core.passes import LossFn
from selectflow.data import Sources


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and how it is judged.

    Attributes:
        model: the module, initialised.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,).
        evaluate: `evaluate(model, batches)` -> means by name, such as loss and accuracy.
        pools: the stream of candidate pools: mappings with a list "key" of sample ids.
        target: batches that define the goal; never trained on.
        test: batches that only evaluation sees.
        kinds: ids of training samples by what they are, as "altered" or a domain. For reports:
            selection never sees them.
        source: the dataset whose split "train" the pools come from, as `PoolStream` takes it;
            offline selection reads the kept samples there.
        show: `show(batch, index)` -> an example as text, for tables of samples.
        score_view: `score_view(num_tokens)` -> the `score_view` of a `Selector`, a window of that
            many tokens of each example; None: the examples have none.
        save: `save(folder)` writes the trained model in its library's own form.
    """

    model: nn.Module
    loss_fn: LossFn
    evaluate: Callable[[nn.Module, Sequence[Batch]], dict[str, float]]
    pools: Iterable[Batch]
    target: Sequence[Batch]
    test: Sequence[Batch]
    kinds: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: Sources | None = None
    show: Callable[[Batch, int], str] | None = None
    score_view: Callable[[int], Callable[[Batch], Batch]] | None = None
    save: Callable[[Path], None] | None = None
