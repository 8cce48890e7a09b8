"""The samples that runs scored highest and lowest, as pictures or text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selectflow.report.groups import Groups, strategy
from selectflow.report.runs import Run
from selectflow.report.selected import Sample, Selected, read_selected

if TYPE_CHECKING:
    from selectflow.data import Sources, Tokenizer

_SIDE = 64  # pixels
_LENGTH = 280  # characters of a text


@dataclass(frozen=True)
class Shown:
    """A sample as a reader sees it.

    Attributes:
        key: its id.
        facts: what is known of it: label, score, how often it was kept.
        png: its picture; None for text.
        text: its text; "" for a picture.
        altered: whether its label was altered; None: not known.
    """

    key: str
    facts: list[str]
    png: bytes | None
    text: str
    altered: bool | None

    @property
    def data_uri(self) -> str:
        """The picture, for an img element."""
        return "data:image/png;base64," + base64.b64encode(self.png or b"").decode()


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
    root = dataset_of(run)
    if root is None:
        selected = read_selected(run.folder, {})
        note = "samples are not shown: the configuration names no data that can be read here"
        return Examined(label, run, selected, [], [], note) if selected else None
    try:
        metadata = read_metadata(root, "train", max_errors=math.inf)
        selected = read_selected(run.folder, metadata)
        if selected is None:
            return None
        best, worst = extremes(selected, root, metadata, num)
    except DataError as error:
        selected = read_selected(run.folder, {})
        note = f"samples are not shown: {error}"
        return Examined(label, run, selected, [], [], note) if selected else None
    note = "" if best else f"samples are not shown: {root} holds other ones"
    return Examined(label, run, selected, best, worst, note)


def dataset_of(run: Run) -> Path | str | None:
    """Directory or URL of the shards that a run read; None where its configuration is of others."""
    from pydantic import ValidationError  # noqa: PLC0415

    from selectflow.run.sections import DataConfig  # noqa: PLC0415

    try:
        return DataConfig.model_validate(run.config.get("data", {})).directory
    except ValidationError:
        return None


def extremes(
    selected: Selected, root: Sources, metadata: Mapping[str, Mapping[str, Any]], num: int
) -> tuple[list[Shown], list[Shown]]:
    """The samples with the highest and with the lowest mean score.

    Args:
        selected: what a run selected.
        root: the dataset, as `PoolStream` takes it.
        metadata: sample key -> what the writer of the data recorded.
        num: samples at each end, fewer where there are not twice as many.

    Returns:
        Highest first, and lowest first.

    Raises:
        DataError: the dataset cannot be read.
    """
    from selectflow.data import read_samples  # noqa: PLC0415

    ranked = selected.ranked()
    num = min(num, len(ranked) // 2)
    ends = ranked[:num], ranked[len(ranked) - num :][::-1]
    found = read_samples(root, "train", [sample.key for part in ends for sample in part])

    tokenizers = _tokenizers(root)

    def source_of(key: str) -> str:
        return key.partition("/")[0] if isinstance(root, Mapping) else ""

    def shown(part: Sequence[Sample]) -> list[Shown]:
        known = (sample for sample in part if sample.key in found)
        return [
            show(s, found[s.key], metadata.get(s.key, {}), tokenizers.get(source_of(s.key)))
            for s in known
        ]

    return shown(ends[0]), shown(ends[1])


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
    selected = read_selected(run_dir, metadata)
    if selected is None:
        return []
    ends = zip(("highest", "lowest"), extremes(selected, source, metadata, num), strict=True)
    return [
        {
            "end": end, "key": shown.key, "score": selected.samples[shown.key].score,
            "altered": shown.altered, "facts": ", ".join(shown.facts), "text": shown.text,
            "png": shown.png,
        }
        for end, samples in ends
        for shown in samples
    ]  # fmt: skip


def _tokenizers(root: Sources) -> dict[str, Tokenizer]:
    """What the tokens of each source are read with, by name; "" where there is one source.

    Without one are images, shards that have no manifest, and a lost tokenizer: ids can be shown.
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
        return Shown(sample.key, facts, _png(dict(fields)), "", altered)
    return Shown(sample.key, facts, None, _text(fields, tokenizer)[:_LENGTH], altered)


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
