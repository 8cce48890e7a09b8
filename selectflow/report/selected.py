"""What runs selected, from their ledgers: scores within pools, kept shares, best and worst."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selectflow.report.align import Points

EDGES: npt.NDArray[np.float64] = np.linspace(-4, 4, 41)
"""Edges of the bins of standardised scores; the outermost also count what lies beyond."""

_STRETCHES = 40  # of a run, for shares over steps


class Step(NamedTuple):
    """The pool of one optimizer step: each candidate's key and score, and whether it was kept."""

    step: int
    keys: list[str]
    scores: npt.NDArray[np.float64]
    kept: npt.NDArray[np.bool_]


def read_steps(run_dir: Path) -> Iterator[Step]:
    """The steps in the ledger of a run, none where it has no ledger.

    Raises:
        LedgerError: a part of it cannot be read.
    """
    from selectflow.run.ledger import LEDGER_FOLDER, read_parts  # noqa: PLC0415

    if not any((run_dir / LEDGER_FOLDER).glob("*.parquet")):
        return
    for table in read_parts(run_dir, ["step", "key", "score", "kept"]):
        step, keys = table["step"].to_numpy(), table["key"].to_pylist()
        scores, kept = table["score"].to_numpy(), table["kept"].to_numpy()
        ends = [*(np.flatnonzero(np.diff(step)) + 1), len(step)]
        for start, end in pairwise([0, *ends]):
            part = slice(start, end)
            yield Step(int(step[start]), keys[part], scores[part], kept[part])


def read_offline_scores(run_dir: Path) -> Step | None:
    """All samples that offline selection scored, as one pool before the first step."""
    path = run_dir / "selected" / "scores.parquet"
    if not path.is_file():
        return None
    from pyarrow.parquet import read_table  # noqa: PLC0415

    table = read_table(path, columns=["key", "score", "kept"])
    scores, kept = table["score"].to_numpy(), table["kept"].to_numpy()
    return Step(0, table["key"].to_pylist(), scores, kept)


@dataclass
class Sample:
    """One sample over a run.

    Attributes:
        key: its id.
        score: mean of its scores, each in standard deviations from the mean of its pool.
        times: pools it was in.
        kept: times it was kept.
    """

    key: str
    score: float = 0.0
    times: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Selected:
    """What a run selected.

    Attributes:
        samples: by key.
        histograms: kind of candidate -> counts in the bins of `EDGES`: kept and rejected, and
            where it is known altered and clean.
        domains: domain -> (step, share among the kept), a point for each stretch of the run.
    """

    samples: dict[str, Sample]
    histograms: dict[str, npt.NDArray[np.int64]]
    domains: dict[str, Points] = field(default_factory=dict)

    def domain_share(self, domain: str) -> Points:
        """Share of a domain among the kept over steps."""
        return self.domains.get(domain, [])

    def ranked(self) -> list[Sample]:
        """Samples, highest mean score first."""
        return sorted(self.samples.values(), key=lambda sample: (-sample.score, sample.key))


def read_selected(run_dir: Path, metadata: Mapping[str, Mapping[str, Any]]) -> Selected | None:
    """What a run selected; None where it recorded nothing.

    Scores are those of its ledger; after offline selection, those that it was made by.

    Args:
        run_dir: its directory.
        metadata: sample key -> what the writer of the data recorded: "altered", "domain".
    """
    samples: dict[str, Sample] = {}
    counts = {name: np.zeros(len(EDGES) - 1, np.int64) for name in ("kept", "rejected")}
    if any("altered" in made for made in metadata.values()):
        counts |= {name: np.zeros(len(EDGES) - 1, np.int64) for name in ("altered", "clean")}
    kept_domains: list[tuple[int, list[str]]] = []
    offline = read_offline_scores(run_dir)
    for step in read_steps(run_dir) if offline is None else [offline]:
        scores = standardised(step.scores)
        _count(samples, step, scores)
        kinds = {"kept": step.kept, "rejected": ~step.kept}
        if "altered" in counts:
            altered = np.array([bool(metadata.get(k, {}).get("altered")) for k in step.keys])
            kinds |= {"altered": altered, "clean": ~altered}
        for name, chosen in kinds.items():
            counts[name] += np.histogram(scores[chosen].clip(EDGES[0], EDGES[-1]), EDGES)[0]
        chosen_keys = [key for key, is_kept in zip(step.keys, step.kept, strict=True) if is_kept]
        found = [str(metadata[k]["domain"]) for k in chosen_keys if "domain" in metadata.get(k, {})]
        if found:
            kept_domains.append((step.step, found))
    return Selected(samples, counts, _shares(kept_domains)) if samples else None


def standardised(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scores of a pool in standard deviations from their mean; 0 where all are equal.

    The scale of scores changes by orders of magnitude while a model learns; this compares steps.
    """
    sd = scores.std()
    return (scores - scores.mean()) / sd if sd > 0 else np.zeros_like(scores)


def _count(samples: dict[str, Sample], step: Step, scores: npt.NDArray[np.float64]) -> None:
    for key, score, is_kept in zip(step.keys, scores.tolist(), step.kept.tolist(), strict=True):
        sample = samples.setdefault(key, Sample(key))
        sample.times += 1
        sample.score += (score - sample.score) / sample.times
        sample.kept += is_kept


def _shares(kept: list[tuple[int, list[str]]]) -> dict[str, Points]:
    """Share of each domain in stretches of steps."""
    names = sorted({name for _, found in kept for name in found})
    size = -(-len(kept) // _STRETCHES) if kept else 1
    shares: dict[str, Points] = {name: [] for name in names}
    for start in range(0, len(kept), size):
        part = kept[start : start + size]
        middle = sum(step for step, _ in part) / len(part)
        found = [name for _, of in part for name in of]
        for name in names:
            shares[name].append((middle, found.count(name) / len(found)))
    return shares
