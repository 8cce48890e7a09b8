"""Offline selection, horizon = infinity: sweep back over a recorded run, rank, write the kept.

It is the look-ahead whose nominal future is what really came: one adjoint of the target loss at
the end of a recorded run is carried back to its first update, and gives every example a score at
each update that it took part in.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from selectflow.atomic import atomic_file
from selectflow.batches import Batch, num_examples
from selectflow.data import Sources, write_subset
from selectflow.derivatives import Curvature
from selectflow.dynamics import Adjoint
from selectflow.lookahead import Visit
from selectflow.params import Params
from selectflow.trajectory import Trajectory


@dataclass(frozen=True)
class SampleScores:
    """What each sample of a recorded run did for the target.

    Attributes:
        keys: of the N samples, in the order in which the run met them first.
        score: target loss, shape (N,), float64: predicted rise of the final target loss if the
            sample had been left out of the run. Positive = it helps.
        occurrences: how often the run trained on each, shape (N,), int64.
    """

    keys: list[str]
    score: Tensor
    occurrences: Tensor

    def ranking(self) -> list[int]:
        """Positions of the samples, best first; of equal scores the one met first."""
        return self.score.argsort(descending=True, stable=True).tolist()

    def top(self, share: float) -> list[str]:
        """Keys of the best round(share * N) samples, at least one, best first.

        Raises:
            ValueError: share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(
                f"share must be in (0, 1], got {share}; 0.5 keeps the better half of the samples"
            )
        num = max(1, round(share * len(self.keys)))
        return [self.keys[row] for row in self.ranking()[:num]]


def score_samples(
    trajectory: Trajectory,
    target: Iterable[Batch],
    *,
    curvature: Curvature = "exact",
    memory_gib: float = 1.0,
) -> SampleScores:
    """Scores of all samples of a recorded run, for the target loss at its end.

        score(z) = sum over the updates n that z took part in of  - gamma_n . grad loss_z / B_n

    gamma_n = d target / d (batch gradient of update n), through all later updates. Leaving z out
    takes its term grad loss_z / B_n from each batch mean and leaves the weights 1 / B_n of the
    others, so that occurrences add up to first order. In one batch TSLOO, which divides by B - 1
    after a removal, is predicted by (B score(z) - sum of the batch's scores) / (B - 1).

    Args:
        trajectory: of batches that are mappings with a list "key" of sample ids.
        target: batches; the target loss is the mean over all their examples.
        curvature: "exact", "fisher" (empirical Fisher) or "none".
        memory_gib: limit for the states between two snapshots, in GiB.

    Returns:
        The scores, positive where a sample helps.

    Raises:
        ValueError: a batch without keys; an empty target; the limit is too small.
        FloatingPointError: a loss or derivative is not finite; names the examples.
        RuntimeError: the replay leaves the recording.
    """
    batches, end = trajectory.batches, len(trajectory)
    row = _rows(batches)
    score = torch.zeros(len(row), dtype=torch.float64)
    occurrences = torch.zeros(len(row), dtype=torch.int64)

    def add(visit: Visit) -> None:
        batch = batches[visit.index]
        _, slopes = trajectory.derivatives.along(visit.state.params, visit.gamma, batch)
        rows = torch.tensor([row[key] for key in batch["key"]])
        score.index_add_(0, rows, -slopes.cpu().double() / len(rows))
        occurrences.index_add_(0, rows, torch.ones_like(rows))

    params = trajectory.state(end).params
    with trajectory.derivatives.objective.scoring():
        grad = _mean_gradient(trajectory, params, target)
    adjoint = Adjoint(grad, *(part.zeros_like() for part in trajectory.state(end)[1:]))
    trajectory.sweep(trajectory.window(curvature=curvature), end, adjoint, add, memory_gib)
    return SampleScores(list(row), score, occurrences)


def _rows(batches: Sequence[Batch]) -> dict[str, int]:
    """Sample keys, numbered through in the order of their first occurrence."""
    rows: dict[str, int] = {}
    for index, batch in enumerate(batches):
        keys = batch.get("key") if isinstance(batch, Mapping) else None
        if not isinstance(keys, list) or len(keys) != num_examples(batch):
            raise ValueError(
                f"batches must be mappings with a list 'key' of one sample id per example, got "
                f"{type(batch).__name__ if keys is None else type(keys).__name__} at update "
                f"{index}; selectflow.data.PoolStream yields such batches"
            )
        for key in keys:
            rows.setdefault(key, len(rows))
    return rows


def _mean_gradient(trajectory: Trajectory, params: Params, target: Iterable[Batch]) -> Params:
    total, size = params.zeros_like(), 0
    for batch in target:
        num = num_examples(batch)
        total = total.add(trajectory.derivatives.gradient(params, batch)[1], num)
        size += num
    if size == 0:
        raise ValueError("target must yield at least one batch, got none; pass a list of batches")
    return total / size


# --- what is left on disk -------------------------------------------------------------------


def write_scores(folder: str | Path, scores: SampleScores, kept: Iterable[str]) -> Path:
    """Write a row `key, score, occurrences, kept` for each sample, best first.

    Args:
        folder: takes `scores.parquet` where pyarrow is installed, else `scores.csv`.
        scores: of the samples.
        kept: keys of those that are kept.

    Returns:
        The file, which is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    order, chosen = scores.ranking(), set(kept)
    columns = {
        "key": [scores.keys[row] for row in order],
        "score": scores.score[order].tolist(),
        "occurrences": scores.occurrences[order].tolist(),
        "kept": [scores.keys[row] in chosen for row in order],
    }
    if find_spec("pyarrow"):
        path, content = Path(folder, "scores.parquet"), _parquet(columns)
    else:
        path, content = Path(folder, "scores.csv"), _csv(columns)
    with atomic_file(path) as file:
        file.write(content)
    return path


def write_selected(
    folder: str | Path, scores: SampleScores, share: float, source: Sources, seed: int
) -> Path:
    """Write the scores and, as shards of split "train", the best share of the samples.

    The shards are in `folder/selected`. Their manifest, which is written last, says from what
    they came: the fingerprint of the source, the share, and a digest of the scores.

    Args:
        folder: an existing directory.
        scores: of samples of the source; those that were not scored are not kept.
        share: of the scored samples that is kept, in (0, 1].
        source: the dataset, anything that `PoolStream` takes; its split "train" is read.
        seed: of the run that was recorded, for the manifest.

    Returns:
        The dataset directory; its samples are in the stored order of the source.

    Raises:
        ValueError: share outside (0, 1].
        DataError: the source cannot be read or lacks a kept sample.
        OSError: a file cannot be written.
    """
    kept = scores.top(share)
    write_scores(folder, scores, kept)
    listed = zip(scores.keys, scores.score.tolist(), strict=True)
    digest = hashlib.sha256("\n".join(f"{key} {score!r}" for key, score in listed).encode())
    root = Path(folder, "selected")
    made_from = {"share": float(share), "scores_sha256": digest.hexdigest()}
    write_subset(root, source, "train", kept, made_from, seed=seed)
    return root


def _csv(columns: Mapping[str, Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for key, score, occurrences, kept in zip(*columns.values(), strict=True):
        writer.writerow([key, repr(score), occurrences, str(kept).lower()])
    return text.getvalue().encode()


def _parquet(columns: Mapping[str, Sequence[object]]) -> bytes:
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), sink)
    return sink.getvalue()
