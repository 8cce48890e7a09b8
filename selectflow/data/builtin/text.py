"""Text as shards of token blocks: domains and dirt in known shares, the origin of each recorded.

Dirt is blocks that a model should not learn from: shuffled, duplicated, or boilerplate.
"""

from __future__ import annotations

import math
import platform
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selectflow.data.builtin.blocks import DIRT, Block, Rest, boilerplate, cut, duplicate, shuffled
from selectflow.data.builtin.documents import (
    Document,
    DocumentGroup,
    hugging_face,
    json_lines,
    source_text,
    text_files,
)
from selectflow.data.builtin.tokenizers import Tokens, make_tokenizer, store_tokenizer
from selectflow.data.fields import Sample
from selectflow.data.manifest import DataError, Manifest, check_least, check_seed
from selectflow.data.write import Layout, build

_TRAINING_TEXT = 4_000_000  # characters that a new tokenizer is trained on


@dataclass(frozen=True)
class TextOptions:
    """What token blocks are made of.

    Attributes:
        source: "python", the text that comes with Python; "files:FOLDER", text files as
            <domain>/<name>.txt; "jsonl:FILE", lines with "text" and "domain"; "hf:NAME", a Hugging
            Face dataset with such columns, or a folder that one was saved to.
        target_domain: the domain of the target and test sets; None: all of them.
        mixture: share of each domain and kind of dirt ("shuffled", "duplicate", "boilerplate")
            in train, adding up to 1; None: all blocks of every domain, without dirt.
        num_train: blocks of train; needed for a mixture. None: all.
        num_target: blocks of the target set.
        num_test: blocks of the test set.
        block: tokens of a block.
        rest: treatment of the tokens of a document that do not fill a block; see `cut`.
        tokenizer: "bytes"; "bpe:SIZE", trained on the text; a tokenizer.json, a folder with one,
            or a name on Hugging Face.
    """

    source: str = "python"
    target_domain: str | None = "code"
    mixture: Mapping[str, float] | None = None
    num_train: int | None = None
    num_target: int = 200
    num_test: int = 400
    block: int = 128
    rest: Rest = "drop"
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        for name in ("num_train", "num_target", "num_test", "block"):
            value = getattr(self, name)
            if value is not None:
                check_least(name, value, 1, "leave it out for the default")
        if self.rest not in ("drop", "pad", "pack"):
            raise DataError(f"rest must be drop, pad or pack, got {self.rest!r}; drop is usual")
        if self.mixture is None:
            return
        if self.num_train is None:
            raise DataError("num_train must be given with a mixture, got None; say how many blocks")
        total = sum(self.mixture.values())
        if min(self.mixture.values()) < 0 or abs(total - 1) > 1e-6:
            raise DataError(
                f"mixture must be shares >= 0 that add up to 1, got {dict(self.mixture)} adding "
                f"up to {total:g}; scale them"
            )


def make_text(
    root: str | Path,
    options: TextOptions | None = None,
    *,
    seed: int = 0,
    layout: Layout | None = None,
) -> Manifest:
    """Write text as blocks of tokens in the splits train, target and test, or reuse them.

    A sample is a block, unsigned integers (block,), with the json
    `{"origin": str, "domain": str, "document": str, "altered": bool}`: its origin is its domain, or
    the kind of dirt it was altered to. A document belongs to one split whole, with all that was
    made of it, and equal documents to the same; a tenth each is for target and test. Those two
    hold clean text of the target domain alone. Train is in random order.

    The tokenizer is stored beside the shards, its digest in the manifest. Python's own text
    depends on its version, which the manifest names. Documents are held in memory.

    Args:
        root: Dataset directory, made if missing.
        options: What to make the blocks of; None: the defaults.
        seed: Chooses the documents of each split, the order and the dirt, >= 0.
        layout: How to lay the samples out in shards; None: 4096 to a shard, 64 to a record.

    Returns:
        The manifest of the directory.

    Raises:
        DataError: An option is out of its range, the source cannot be read or has too little
            text, or the directory holds another dataset.
    """
    options = options or TextOptions()
    check_seed(seed)
    named = {name: value for name, value in vars(options).items() if value is not None}
    if options.mixture is not None:
        named["mixture"] = dict(options.mixture)
    if options.source == "python":
        named["python"] = platform.python_version()
    facts: dict[str, Any] = {}

    def make_splits() -> Mapping[str, Iterable[Sample]]:
        maker = _Maker(options, seed)
        splits = maker.splits()
        Path(root).mkdir(parents=True, exist_ok=True)
        facts.update(store_tokenizer(root, options.tokenizer, maker.tokenizer))
        return {split: list(_samples(blocks)) for split, blocks in splits.items()}

    layout = layout or Layout(4096, pack=64)
    return build(root, make_splits, {"name": "text", **named}, seed, layout, tokenizer=facts)


class _Maker:
    """The splits of a source, by its options."""

    def __init__(self, options: TextOptions, seed: int) -> None:
        self.options, self.rng, self.seed = options, np.random.default_rng([seed, 0]), seed
        groups = _groups(options.source)
        # in random order: as many as are needed are then a fair sample of the source
        order = self.rng.permutation(len(groups))
        self.groups: dict[str, list[DocumentGroup]] = {"train": [], "target": [], "test": []}
        for index in order.tolist():
            self.groups[_split_of(groups[index], seed)].append(groups[index])
        self.tokenizer = make_tokenizer(options.tokenizer, self._training_text())

    def _training_text(self) -> Iterator[str]:
        left = _TRAINING_TEXT
        for document in _documents(self.groups["train"]):
            if left <= 0:
                return
            left -= len(document.text)
            yield document.text

    def splits(self) -> dict[str, list[Block]]:
        options = self.options
        return {
            "train": self._train(),
            "target": self._held_out("target", options.num_target),
            "test": self._held_out("test", options.num_test),
        }

    def _held_out(self, split: str, count: int) -> list[Block]:
        domain = self.options.target_domain
        found = self._blocks(split, {domain: count} if domain else None)
        blocks = [block for each in found.values() for block in each]
        if len(blocks) < count:
            what = "text" if domain is None else f"text of domain {domain!r}"
            raise DataError(
                f"num_{split} must be at most the {len(blocks)} blocks of {what} in a tenth of "
                f"the source, got {count}; lower it or block, or add text"
            )
        return self._shuffle(blocks)[:count]

    def _train(self) -> list[Block]:
        options = self.options
        if options.mixture is None:
            found = self._blocks("train", None, options.num_train)
            blocks = [block for each in found.values() for block in each]
            return self._shuffle(blocks)[: options.num_train]
        assert options.num_train is not None
        counts = _counts(options.mixture, options.num_train)
        wanted = {name: count for name, count in counts.items() if name not in DIRT and count}
        found = self._blocks("train", wanted)
        clean: list[Block] = []
        for name, count in wanted.items():
            there = self._shuffle(found.get(name, []))
            if len(there) < count:
                raise DataError(
                    f"mixture must take at most the {len(there)} blocks that there are of "
                    f"{name!r}, got {count}; lower its share or num_train, or choose of "
                    f"{sorted(found)} and {list(DIRT)}"
                )
            clean += there[:count]
        return self._shuffle(clean + self._dirt(counts, clean))

    def _dirt(self, counts: Mapping[str, int], clean: Sequence[Block]) -> list[Block]:
        options, domain = self.options, self.options.target_domain
        of_target = [block for block in clean if domain in (None, block.domain)]
        return [
            *shuffled(of_target, counts.get("shuffled", 0), self.rng),
            *duplicate(clean, counts.get("duplicate", 0), self.rng),
            *boilerplate(self.tokenizer, options.block, counts.get("boilerplate", 0), self.seed),
        ]

    def _blocks(
        self, split: str, wanted: Mapping[str, int] | None, total: int | None = None
    ) -> dict[str, list[Block]]:
        """Blocks by domain: documents are read until each domain, or the total, has enough."""
        size, rest = self.options.block, self.options.rest
        encoded: dict[str, list[tuple[Document, Tokens]]] = defaultdict(list)
        counts: Counter[str] = Counter()
        for document in _documents(self.groups[split]):
            domain = document.domain
            if wanted is not None and counts[domain] >= wanted.get(domain, 0):
                continue
            tokens = self.tokenizer.encode(document.text)
            encoded[domain].append((document, tokens))
            counts[domain] += len(tokens) // size
            is_enough = wanted is not None and all(counts[d] >= n for d, n in wanted.items())
            if is_enough or counts.total() >= (total or math.inf):
                break
        return {
            domain: list(cut(each, self.tokenizer.end, size, rest))
            for domain, each in encoded.items()
        }

    def _shuffle(self, blocks: Sequence[Block]) -> list[Block]:
        return [blocks[index] for index in self.rng.permutation(len(blocks))]


def _documents(groups: Iterable[DocumentGroup]) -> Iterator[Document]:
    return (document for group in groups for document in group.read())


def _groups(source: str) -> list[DocumentGroup]:
    kind, _, where = source.partition(":")
    readers = {"files": text_files, "jsonl": json_lines, "hf": hugging_face}
    if source == "python":
        return source_text()
    if kind not in readers or not where:
        raise DataError(
            f"source must be python, files:FOLDER, jsonl:FILE or hf:NAME, got {source!r}; "
            "python needs nothing"
        )
    return readers[kind](where)


def _split_of(group: DocumentGroup, seed: int) -> str:
    place = zlib.crc32(f"{seed}/{group.identity}".encode()) % 10
    return {0: "target", 1: "test"}.get(place, "train")


def _counts(mixture: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in these shares that add up to `total`."""
    ends = np.round(np.cumsum(list(mixture.values())) * total).astype(int)
    return dict(zip(mixture, np.diff(ends, prepend=0).tolist(), strict=True))


def _samples(blocks: Iterable[Block]) -> Iterator[Sample]:
    for number, block in enumerate(blocks):
        name = re.sub(r"[^A-Za-z0-9_/-]|^__", "-", block.name)[-60:].strip("/").replace("//", "/-")
        yield {
            "__key__": f"{number:07d}-{name}-{block.place:05d}",
            "npy": block.tokens,
            "json": {
                "origin": block.origin,
                "domain": block.domain,
                "document": block.name,
                "altered": block.origin in DIRT,
            },
        }
