"""The samples that a run scored highest and lowest over all its steps, as pictures or text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from selectflow.data import Sources, Tokenizer

_SIDE = 64  # pixels
_LENGTH = 280  # characters of a text


class Sample(NamedTuple):
    """One sample over a run.

    Attributes:
        key: its id.
        score: mean of its scores, each in standard deviations from the mean of its pool.
        times: pools it was in.
        kept: times it was kept.
    """

    key: str
    score: float
    times: int
    kept: int


@dataclass(frozen=True)
class Shown:
    """A sample as a reader sees it.

    Attributes:
        sample: its id and scores.
        facts: what is known of it: label, score, how often it was kept.
        png: its picture; None for text.
        text: its text; "" for a picture.
        altered: whether its label was altered; None: not known.
    """

    sample: Sample
    facts: list[str]
    png: bytes | None
    text: str
    altered: bool | None


def read_scored(run_dir: Path) -> Iterator[Any]:
    """The candidates of a run in tables of whole steps, with standardised scores.

    Args:
        run_dir: its directory.

    Yields:
        Tables of step, key, score and kept: those of the ledger, of a run by offline selection
        those of its sweep as one pool at step 0; none where the run has neither.

    Raises:
        LedgerError: a part of the ledger cannot be read.
    """
    from pyarrow import array  # noqa: PLC0415
    from pyarrow.parquet import read_table  # noqa: PLC0415

    from selectflow.run.ledger import LEDGER_FOLDER, read_parts  # noqa: PLC0415

    offline = run_dir / "selected" / "scores.parquet"
    if offline.is_file():
        table = read_table(offline, columns=["key", "score", "kept"])
        parts = iter([table.append_column("step", array(np.zeros(len(table), np.int64)))])
    elif any((run_dir / LEDGER_FOLDER).glob("*.parquet")):
        parts = read_parts(run_dir, ["step", "key", "score", "kept"])
    else:
        return
    for table in parts:
        scores = standardised(table["score"].to_numpy(), table["step"].to_numpy())
        place = table.schema.get_field_index("score")
        yield table.set_column(place, "score", array(scores))


def standardised(
    scores: npt.NDArray[np.float64], steps: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Scores in standard deviations from the mean of their step; 0 where all of it are equal.

    The scale of scores changes by orders of magnitude while a model learns; this compares steps.

    Args:
        scores: of shape (N,).
        steps: of shape (N,), equal ones beside each other.
    """
    if not scores.size:
        return scores
    starts = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1))
    sizes = np.diff(starts, append=len(steps))
    deviations = scores - np.repeat(np.add.reduceat(scores, starts) / sizes, sizes)
    sd = np.sqrt(np.add.reduceat(deviations**2, starts) / sizes)
    sd[np.maximum.reduceat(scores, starts) == np.minimum.reduceat(scores, starts)] = np.inf
    return np.asarray(deviations / np.repeat(sd, sizes))


def sum_samples(table: Any) -> Any:
    """Sums of a table of `read_scored` by key, for `rank_samples`."""
    # without threads, so that each call adds in the same order
    grouped = table.group_by("key", use_threads=False)
    return grouped.aggregate([("score", "sum"), ("score", "count"), ("kept", "sum")])


def rank_samples(sums: Sequence[Any]) -> Any:
    """Samples by mean score, best first; equal ones by key.

    Args:
        sums: tables of `sum_samples`, at least one.

    Returns:
        A table with a row for each `Sample`.
    """
    from pyarrow import concat_tables, table  # noqa: PLC0415

    grouped = concat_tables(sums).group_by("key", use_threads=False)
    total = grouped.aggregate([(n, "sum") for n in ("score_sum", "score_count", "kept_sum")])
    times = total["score_count_sum"]
    means = total["score_sum_sum"].to_numpy() / times.to_numpy()
    columns = {"key": total["key"], "score": means, "times": times, "kept": total["kept_sum_sum"]}
    return table(columns).sort_by([("score", "descending"), ("key", "ascending")])


def extremes(
    ranked: Any, root: Sources, metadata: Mapping[str, Mapping[str, Any]], num: int
) -> tuple[list[Shown], list[Shown]]:
    """The samples with the highest and with the lowest mean score.

    Args:
        ranked: a table of `rank_samples`.
        root: the dataset, as `PoolStream` takes it.
        metadata: sample key -> what the writer of the data recorded.
        num: samples at each end, fewer where there are not twice as many.

    Returns:
        Highest first, and lowest first; without those that the dataset does not hold.

    Raises:
        DataError: the dataset cannot be read.
    """
    from selectflow.data import read_samples  # noqa: PLC0415

    num = min(num, len(ranked) // 2)
    best, worst = ranked.slice(0, num), ranked.slice(len(ranked) - num)
    ends = [[Sample(**row) for row in part.to_pylist()] for part in (best, worst)]
    ends[1].reverse()
    found = read_samples(root, "train", [sample.key for part in ends for sample in part])
    tokenizers = _tokenizers(root)

    def source_of(key: str) -> str:
        return key.partition("/")[0] if isinstance(root, Mapping) else ""

    highest, lowest = (
        [
            show(s, found[s.key], metadata.get(s.key, {}), tokenizers.get(source_of(s.key)))
            for s in part
            if s.key in found
        ]
        for part in ends
    )
    return highest, lowest


def extreme_rows(run_dir: Path, source: Sources, num: int = 16) -> list[dict[str, Any]]:
    """The samples of a run with the highest and the lowest mean score, as rows of a table.

    Args:
        run_dir: its directory.
        source: the dataset that it read, as `PoolStream` takes it.
        num: samples at each end.

    Raises:
        DataError: the dataset cannot be read.
        LedgerError: the ledger cannot be read.
    """
    from selectflow.data import read_metadata  # noqa: PLC0415

    metadata = read_metadata(source, "train", max_errors=math.inf)
    sums = [sum_samples(table) for table in read_scored(run_dir)]
    if not sums:
        return []
    ends = extremes(rank_samples(sums), source, metadata, num)
    return [
        {
            "end": end, "key": shown.sample.key, "score": shown.sample.score,
            "altered": shown.altered, "facts": ", ".join(shown.facts), "text": shown.text,
            "png": shown.png,
        }
        for end, samples in zip(("highest", "lowest"), ends, strict=True)
        for shown in samples
    ]  # fmt: skip


def _tokenizers(root: Sources) -> dict[str, Tokenizer]:
    """The tokenizer of each source by name; "" where there is one source.

    Images, shards without a manifest and a lost tokenizer have none: ids of tokens are shown.
    """
    from selectflow.data import DataError, open_tokenizer  # noqa: PLC0415

    found: dict[str, Tokenizer] = {}
    for name, source in (root if isinstance(root, Mapping) else {"": root}).items():
        if isinstance(source, str | Path):
            with suppress(DataError):
                found[name] = open_tokenizer(source)
    return found


def show(
    sample: Sample,
    fields: Mapping[str, Any],
    made: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
) -> Shown:
    """A sample as a picture or text.

    Args:
        sample: its scores.
        fields: its content, as `read_split` yields it.
        made: what the writer of the data recorded about it.
        tokenizer: of its tokens; None: bytes are text, others stay ids.
    """
    facts = [f"score {sample.score:+.2f} sd", f"kept {sample.kept} of {sample.times}"]
    if "cls" in fields:
        facts.insert(0, f"label {fields['cls']}")
    altered = bool(made["altered"]) if "altered" in made else None
    if altered and "true_label" in made:
        facts[0] += f", really {made['true_label']}"
    known = dict.fromkeys(str(made[name]) for name in ("domain", "origin") if name in made)
    facts[:0] = known
    image = next((fields[f] for f in ("png", "jpg", "jpeg", "npy") if f in fields), None)
    if image is not None and np.ndim(image) == 3:
        return Shown(sample, facts, _png(dict(fields)), "", altered)
    return Shown(sample, facts, None, _text(fields, tokenizer)[:_LENGTH], altered)


def _png(fields: dict[str, Any]) -> bytes:
    from selectflow.data import picture  # noqa: PLC0415

    file = io.BytesIO()
    picture(fields, _SIDE).save(file, "PNG")
    return file.getvalue()


def _text(fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> str:
    if "txt" in fields:
        return str(fields["txt"])
    tokens = np.asarray(fields.get("npy", []))
    if tokenizer is not None and tokens.ndim == 1:
        return tokenizer.decode(tokens.tolist())
    if tokens.dtype == np.uint8:  # bytes are text
        return tokens.tobytes().decode("utf-8", "replace")
    return "tokens " + " ".join(map(str, tokens.ravel()[:_LENGTH].tolist()))
