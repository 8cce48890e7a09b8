"""One score for each sample of a run, and the chosen samples as a dataset of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from selectflow.core.files import atomic_file
from selectflow.data import Layout, Manifest, Sources, write_subset
from selectflow.offline.score import SampleScores
from selectflow.run.ledger import read_ledger

_DEFAULT_LAYOUT = Layout()


def mean_scores(run_dir: str | Path) -> SampleScores:
    """The mean score of every candidate over all pools of a run that held it.

    Args:
        run_dir: a run directory with a ledger.

    Raises:
        LedgerError: there is none, or it cannot be read.
    """
    table = read_ledger(run_dir, ["key", "score"])
    keys, rows = _numbered(table["key"])
    occurrences, total = np.bincount(rows), np.bincount(rows, table["score"].to_numpy())
    score = torch.from_numpy(total / occurrences)
    return SampleScores(keys, score, torch.from_numpy(occurrences))


def kept_keys(run_dir: str | Path) -> list[str]:
    """Keys of the candidates that a run trained on, once each, in the order of the first time.

    Raises:
        LedgerError: the run has no ledger, or it cannot be read.
    """
    table = read_ledger(run_dir, ["key", "kept"])
    keys: list[str] = table.filter(table["kept"])["key"].unique().to_pylist()
    return keys


def _numbered(column: Any) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The distinct values of a column in the order of their first row, and the number of each row.

    `Table.group_by` keeps no order, and adds up in none.
    """
    encoded = column.dictionary_encode().combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy()


def write_scores(folder: str | Path, scores: SampleScores, kept: Iterable[str]) -> Path:
    """Write `scores.parquet`: a row `key, score, occurrences, kept` for each sample, best first.

    Args:
        folder: where it goes.
        scores: of the samples.
        kept: keys of those that are kept.

    Returns:
        The file, which is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    order, chosen = scores.ranking(), set(kept)
    columns = {
        "key": [scores.keys[row] for row in order],
        "score": scores.score[order].numpy(),
        "occurrences": scores.occurrences[order].numpy(),
        "kept": [scores.keys[row] in chosen for row in order],
    }
    path = Path(folder, "scores.parquet")
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return path


def write_selected(
    root: str | Path,
    scores: SampleScores,
    kept: Iterable[str],
    source: Sources,
    made_from: Mapping[str, Any],
    *,
    seed: int,
    split: str = "train",
    copied: Iterable[str] = (),
    layout: Layout = _DEFAULT_LAYOUT,
) -> Manifest:
    """Write the chosen samples of a dataset as shards, with the scores of all beside them.

    The manifest says from what they came: `source`, the fingerprint of the dataset, `split`,
    `made_from`, and `scores_sha256`, a digest of the scores.

    Args:
        root: dataset directory, made if missing; it gets `scores.parquet` too.
        scores: of samples of the source.
        kept: keys of those to write.
        source: the dataset, anything that `PoolStream` takes.
        made_from: how they were chosen, as JSON can hold it.
        seed: of the run that was scored, for the manifest.
        split: name of the split that they are of, in both.
        copied: splits of the source that are copied whole.
        layout: how to lay them out.

    Returns:
        The manifest; samples are in the stored order of the source.

    Raises:
        DataError: the source cannot be read or lacks a sample; root holds another dataset.
        OSError: a file cannot be written.
    """
    kept = list(kept)
    listed = zip(scores.keys, scores.score.tolist(), strict=True)
    digest = hashlib.sha256("\n".join(f"{key} {score!r}" for key, score in listed).encode())
    manifest = write_subset(
        root,
        source,
        split,
        kept,
        {**made_from, "scores_sha256": digest.hexdigest()},
        seed=seed,
        copied=copied,
        layout=layout,
    )
    write_scores(root, scores, kept)
    return manifest
