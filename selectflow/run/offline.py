"""Offline selection as the first stage of a run, whose task is then the kept samples."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow.parquet import write_table

from selectflow.core.batches import Batch, chunks, num_examples, num_kept, to_device
from selectflow.core.files import atomic_file
from selectflow.data import (
    DataError,
    Layout,
    Manifest,
    PoolStream,
    Sources,
    find_splits,
    open_catalog,
    write_subset,
)
from selectflow.distributed import ALONE, Group
from selectflow.offline.record import record
from selectflow.offline.score import SampleScores, score_samples
from selectflow.offline.trajectory import Trajectory
from selectflow.run.build import build_optimizer, build_schedule, resolve_device
from selectflow.run.config import RunConfig, load
from selectflow.run.ledger import kept_keys, last_step, mean_scores, read_stream
from selectflow.run.task import RunError, Task

_DEFAULT_LAYOUT = Layout()


def check_selected(config: RunConfig, group: Group) -> None:
    """Refuse to select in several processes: the sweep needs the whole recorded run in one.

    Raises:
        RunError: select.horizon is .inf, and nothing was selected in the run directory yet.
    """
    is_there = (config.run_dir / "offline.json").exists() and not config.overwrite
    if config.select.is_offline and group.size > 1 and not is_there:
        raise RunError(
            f"select.horizon must be finite in {group.size} processes until samples are selected, "
            "got .inf; start the run in one process with steps as they are, stop it when it trains "
            "(Ctrl-C), and go on by torchrun with resume=auto"
        )


def select_offline(config: RunConfig, task: Task, group: Group = ALONE) -> tuple[Task, float]:
    """The task on the samples that offline selection keeps, and the seconds that finding them took.

    What an earlier process selected in this run directory is used again.

    Args:
        config: of a run with `select.horizon: .inf`.
        task: its model stays as it is: a copy is trained for the recording.
        group: the processes that train on what was selected.

    Returns:
        The task with pools of kept samples, each a whole batch, and the seconds of recording,
        sweeping and writing.

    Raises:
        RunError: the task has no source.
        ValueError: pools without keys, or smaller than `select.keep`; `select.memory_gib` is too
            small.
        DataError: the source cannot be read or is not that of the pools.
        FloatingPointError: a loss or derivative is not finite; names the examples.
        RuntimeError: the recorded training is not deterministic.
    """
    if task.source is None:
        raise RunError(
            "source of the task must be the dataset of its pools when select.horizon is .inf, "
            "got None; pass the directory that PoolStream reads"
        )
    report = config.run_dir / "offline.json"
    if not report.exists():  # it is written last, after the shards
        found = _select(config, task, task.source)
        with atomic_file(report) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())
    found = json.loads(report.read_text("utf-8"))
    root, size = config.run_dir / "selected", int(found["batch_size"])
    reading = config.data.reading | {"rank": group.rank, "world_size": group.size}
    pools = PoolStream(root, pool=size, seed=config.seed, **reading)
    return replace(task, pools=pools), found["upfront_s"]


def _select(config: RunConfig, task: Task, source: Sources) -> dict[str, float]:
    """Record, sweep, rank and write; returns counts of samples and the seconds of each stage."""
    began, select = time.perf_counter(), config.select
    trajectory = _record(config, task)
    recorded_s = time.perf_counter() - began
    device = resolve_device(config.device)
    target = [to_device(batch, device) for batch in task.target]
    scores = score_samples(
        trajectory,
        target,
        curvature=select.curvature,
        derivative=select.derivative,
        memory_gib=select.memory_gib,
    )
    scored_s = time.perf_counter() - began
    root, kept = config.run_dir / "selected", scores.top(select.keep_samples)
    shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
    made_from = {"share": float(select.keep_samples)}
    write_selected(root, scores, kept, source, made_from, seed=config.seed)
    return {
        "record_steps": len(trajectory),
        "batch_size": num_examples(trajectory.batches[0]),
        "samples_scored": len(scores.keys),
        "samples_kept": len(kept),
        "record_s": recorded_s,
        "sweep_s": scored_s - recorded_s,
        "upfront_s": time.perf_counter() - began,
    }


def _record(config: RunConfig, task: Task) -> Trajectory:
    """Train a copy of the model on all samples, in the order of the pools."""
    select, device = config.select, resolve_device(config.device)
    num_steps = select.record_steps or config.steps
    model = copy.deepcopy(task.model).to(device)
    lr = select.record_lr or config.optimizer.lr
    optimizer = build_optimizer(model, config.optimizer.model_copy(update={"lr": lr}))
    return record(
        model,
        optimizer,
        task.loss_fn,
        islice(_batches(config, task, device), num_steps),
        build_schedule(optimizer, config.schedule, num_steps),
        config.optimizer.max_grad_norm,
        limit_gib=select.memory_gib,
        chunk_size=select.chunk_size,
    )


def _batches(config: RunConfig, task: Task, device: torch.device) -> Iterator[Batch]:
    """All examples of the pools in batches of the size that a selection keeps."""
    for pool in task.pools:
        size = num_kept(config.select.keep, num_examples(pool))
        yield from chunks(to_device(pool, device), size)


# --- chosen samples as a dataset of their own -----------------------------------------------------


def write_scores(folder: str | Path, scores: SampleScores, kept: Iterable[str]) -> Path:
    """Write `scores.parquet`: a row `key, score, occurrences, kept` for each sample, best first.

    Returns:
        The file, which is there whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    order, chosen = scores.ranking(), set(kept)
    columns = {
        "key": [scores.keys[row] for row in order],
        "score": scores.score[order].numpy(),
        "occurrences": scores.occurrences[order].numpy(),
        "kept": [scores.keys[row] in chosen for row in order],
    }
    path = Path(folder, "scores.parquet")
    with atomic_file(path) as file:
        write_table(pa.table(columns), file)
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


def write_kept(
    run_dir: Path,
    root: Path,
    top: float | None = None,
    source: str | Path | None = None,
    layout: Layout = _DEFAULT_LAYOUT,
) -> tuple[Manifest, int]:
    """Write what a run with a ledger kept as a dataset; returns its manifest, and of how many.

    Args:
        root: dataset directory, made if missing.
        top: the best share of the candidates by mean score is written, not those kept.
        source: the run's dataset; None: where it was.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
        DataError: as `write_selected`; source is another dataset.
    """
    stream, config = read_stream(run_dir), load(run_dir / "config.yaml")
    trained_on = source or config.data.trained_on
    split = stream.get("split", "train")
    fingerprint = open_catalog(trained_on, split).fingerprint
    known = stream.get("fingerprint", fingerprint)  # custom pools need not say
    if known != fingerprint:
        raise DataError(
            f"source must be the dataset of the run, with fingerprint {known}, got {trained_on} "
            f"with {fingerprint}; pass it by --source"
        )
    scores = mean_scores(run_dir)
    kept = kept_keys(run_dir) if top is None else scores.top(top)
    made_from: dict[str, Any] = {"run": config.run_name, "steps": last_step(run_dir)}
    made_from |= {"chosen": "kept"} if top is None else {"chosen": "top", "share": top}
    copied: set[str] = set()  # of several sources the train split alone: the others are not theirs
    if not isinstance(trained_on, dict):
        copied = set(find_splits(trained_on)) - {split}
    manifest = write_selected(
        root, scores, kept, trained_on, made_from,
        seed=config.seed, split=split, copied=copied, layout=layout,
    )  # fmt: skip
    return manifest, len(scores.keys)
