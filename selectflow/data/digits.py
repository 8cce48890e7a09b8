"""scikit-learn's handwritten digits as shards, with label noise of a chosen share."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from selectflow.data.build import Layout, build
from selectflow.data.fields import Sample
from selectflow.data.labelled import Labelled, check_noise, samples_of, split_evenly
from selectflow.data.manifest import Manifest

_HELD_OUT = {"target": 200, "test": 400}


def make_digits(
    root: str | Path,
    *,
    label_noise: float = 0.0,
    seed: int = 0,
    per_shard: int = 256,
    pack: int = 1,
    max_bytes: int | None = None,
) -> Manifest:
    """Write the digits as the splits train (1197), target (200) and test (400), or reuse them.

    Images are float32 (1, 8, 8) in [0, 1]. The splits are disjoint, stratified by class and the
    same for every option and seed. Target and test are clean. In train, exactly
    `round(label_noise * 1197)` labels are replaced, each by one of the nine other classes
    uniformly; what is altered at a lower share is altered in the same way at a higher one. Each
    sample's json, `{"altered": bool, "true_label": int}`, records it.

    Args:
        root: Dataset directory, made if missing.
        label_noise: Share of the train labels to replace, in [0, 1].
        seed: Chooses which labels are replaced and by what, >= 0.
        per_shard: Samples that close a shard, >= 1.
        pack: Samples of a record, >= 1; above 1 a sample's key is "<shard>/<record>/<row>".
        max_bytes: Bytes of contents that close a shard, >= 1; None: no limit.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, or the directory holds another dataset.
    """
    check_noise(label_noise, seed)

    def make_splits() -> dict[str, Iterable[Sample]]:
        # imported here because it takes a second, which a reused dataset need not wait for
        from sklearn.datasets import load_digits  # noqa: PLC0415

        bunch = load_digits()
        images = (bunch.images[:, None] / 16).astype(np.float32)  # (1797, 1, 8, 8)
        digits = Labelled(
            labels=bunch.target.astype(np.int64),
            image=images.__getitem__,
            key=lambda index: f"digit-{index:04d}",  # the position in scikit-learn's own order
            num_classes=10,
        )
        return samples_of(digits, split_evenly(digits.labels, _HELD_OUT), label_noise, seed)

    options = {"name": "digits", "label_noise": float(label_noise)}
    return build(root, make_splits, options, seed, Layout(per_shard, pack, max_bytes))
