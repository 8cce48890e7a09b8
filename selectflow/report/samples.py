"""What a run selected, from its ledger: scores of kinds of candidates, domains, best and worst."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selectflow.report.groups import Groups, strategy
from selectflow.report.runs import Points, Run
from selectflow.run.ledger import rank_samples, read_scored, sum_samples
from selectflow.run.samples import Shown, extremes

EDGES: npt.NDArray[np.float64] = np.linspace(-4, 4, 41)
"""Edges of the bins of standardised scores; the outermost also count what lies beyond."""

_STRETCHES = 40  # of a run, for shares over steps

Metadata = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Selected:
    """What a run selected.

    Attributes:
        ranked: an Arrow table of its samples, highest mean score first; see `rank_samples`.
        histograms: kind of candidate -> counts in the bins of `EDGES`: kept and rejected, and
            where it is known altered and clean.
        domains: domain -> (step, share among the kept), a point for each stretch of the run.
    """

    ranked: Any
    histograms: dict[str, npt.NDArray[np.int64]]
    domains: dict[str, Points] = field(default_factory=dict)


@dataclass(frozen=True)
class Examined:
    """What one run selected, and its extremes.

    Attributes:
        label: its group.
        run: the run.
        selected: from its ledger.
        best: samples of the highest mean score, highest first; empty where the data are gone.
        worst: of the lowest, lowest first.
        note: why no samples are shown; "" where they are.
    """

    label: str
    run: Run
    selected: Selected
    best: list[Shown]
    worst: list[Shown]
    note: str = ""


def examine_groups(groups: Groups) -> list[Examined]:
    """What the first run of each group selected, of those that keep a ledger; not of uniform."""
    firsts = {label: runs[0] for label, runs in groups.items()}
    scoring = {label: run for label, run in firsts.items() if strategy(run) != "uniform"}
    found = [examine(label, run) for label, run in scoring.items()]
    return [examined for examined in found if examined]


def examine(label: str, run: Run, num: int = 8) -> Examined | None:
    """What a run selected, with its highest- and lowest-scored samples.

    Args:
        label: its group.
        run: the run.
        num: samples at each end.

    Returns:
        None for a run without a ledger, as one at W&B.
    """
    from selectflow.data import DataError, read_metadata  # noqa: PLC0415

    if run.folder is None:
        return None
    root, metadata = _dataset_of(run), {}
    best: list[Shown] = []
    worst: list[Shown] = []
    note = "samples are not shown: the configuration names no data that can be read here"
    try:
        if root is not None:
            metadata = read_metadata(root, "train", max_errors=math.inf)
        selected = read_selected(run.folder, metadata)
        if selected is not None and root is not None:
            best, worst = extremes(selected.ranked, root, metadata, num)
            note = "" if best else f"samples are not shown: {root} holds other ones"
    except DataError as error:
        selected = read_selected(run.folder, {})
        note = f"samples are not shown: {error}"
    return Examined(label, run, selected, best, worst, note) if selected else None


def _dataset_of(run: Run) -> Path | str | None:
    """Directory or URL of the shards that a run read; None where its configuration is of others."""
    from pydantic import ValidationError  # noqa: PLC0415

    from selectflow.run.sections import DataConfig  # noqa: PLC0415

    try:
        return DataConfig.model_validate(run.config.get("data", {})).directory
    except ValidationError:
        return None


def read_selected(run_dir: Path, metadata: Metadata) -> Selected | None:
    """What a run selected; None where it recorded nothing.

    Args:
        run_dir: its directory.
        metadata: sample key -> what the writer of the data recorded: "altered", "domain".
    """
    from pyarrow import array, string  # noqa: PLC0415
    from pyarrow.compute import index_in  # noqa: PLC0415

    keys = array(list(metadata), string())
    # one more, the last, of candidates that the metadata do not name: place -1
    altered = np.array([*(bool(made.get("altered")) for made in metadata.values()), False])
    named = [str(made.get("domain", "")) for made in metadata.values()]
    domains, codes = np.unique([*named, ""], return_inverse=True)
    counts: dict[str, npt.NDArray[np.int64]] = {}
    sums, kept_domains = [], []
    tells_altered = any("altered" in made for made in metadata.values())
    for table in read_scored(run_dir):
        sums.append(sum_samples(table))
        place = index_in(table["key"], value_set=keys).fill_null(-1).to_numpy()
        kept = table["kept"].to_numpy()
        kinds = {"kept": kept, "rejected": ~kept}
        if tells_altered:
            kinds |= {"altered": altered[place], "clean": ~altered[place]}
        scores = table["score"].to_numpy().clip(EDGES[0], EDGES[-1])
        for name, chosen in kinds.items():
            counts[name] = counts.get(name, 0) + np.histogram(scores[chosen], EDGES)[0]
        known = kept & (codes[place] != codes[-1])
        kept_domains.append((table["step"].to_numpy()[known], codes[place[known]]))
    if not any(len(part) for part in sums):
        return None
    return Selected(rank_samples(sums), counts, _shares(domains.tolist(), kept_domains))


def _shares(
    names: list[str], kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
) -> dict[str, Points]:
    """Share of each domain in stretches of steps, from steps and domains of kept candidates."""
    steps, domains = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    if not steps.size:
        return {}
    distinct, place = np.unique(steps, return_inverse=True)
    size = -(-len(distinct) // _STRETCHES)
    counts = np.zeros((-(-len(distinct) // size), len(names)))
    np.add.at(counts, (place // size, domains), 1)
    shares = counts / counts.sum(1, keepdims=True)
    middles = [float(distinct[at : at + size].mean()) for at in range(0, len(distinct), size)]
    return {
        name: list(zip(middles, shares[:, i].tolist(), strict=True))
        for i, name in enumerate(names)
        if counts[:, i].any()
    }
