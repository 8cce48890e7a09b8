"""Which fields the samples of a split have: from its manifest, or from the names of all members.

Without a manifest, the fields are those of most samples. They are decided when the shards are
opened, from indexes that are made then in any case; each sample that differs is an error of its
own when it is read.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from selectflow.data.fields import CODECS, FIELDS, PICTURES
from selectflow.data.manifest import DataError
from selectflow.data.tar_index import Record

_PARTS = frozenset(FIELDS)
_IMAGE = "image"


def _kind(names: Iterable[str]) -> frozenset[str]:
    """What batches take of a sample with these extensions; its image may be encoded in any way."""
    parts = _PARTS.intersection(names)
    images = parts.intersection(PICTURES)
    return (parts - images) | {_IMAGE} if len(images) == 1 else parts


@dataclass(frozen=True)
class Schema:
    """The fields of the samples of a split.

    Attributes:
        fields: extensions that every sample has.
        optional: that some have: what is for reports, and images, each of one of several formats.
        kind: what batches take of each, and others are odd; None: whatever is there.
    """

    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()
    kind: frozenset[str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All extensions, sorted."""
        return tuple(sorted({*self.fields, *self.optional}))

    @property
    def batch_names(self) -> frozenset[str]:
        """The names in a batch: of "image", "tokens", "label" and "text"."""
        formats = [name for name in PICTURES if name in self.optional]
        images = formats if len(formats) > 1 else []  # one alone is lacking somewhere
        held, names = {*self.fields, *images}, set[str]()
        if "npy" in held:
            names.add(_IMAGE if "cls" in held else "tokens")
        elif held.intersection(PICTURES):
            names.add(_IMAGE)
        stored = {"cls": "label", "txt": "text"}
        return frozenset(names | {stored[name] for name in held & stored.keys()})

    def fault(self, names: Iterable[str]) -> str | None:
        """How a sample with these extensions differs from what it must be; None: it does not."""
        held = CODECS.keys() & names
        missing = [field for field in self.fields if field not in held]
        if self.kind is None or (not missing and _kind(held) == self.kind):
            return f"none of {missing}" if missing else None
        if _IMAGE in self.kind and not held.intersection(PICTURES) and not missing:
            missing = [" or ".join(name for name in PICTURES if name in self.optional)]
        return f"none of {missing}" if missing else f"{sorted(held)}, unlike most samples"


@dataclass(frozen=True)
class Census:
    """What the records of a shard hold, small enough to be remembered.

    Attributes:
        counts: known extensions, sorted and joined by spaces -> number of records with them.
        keys: a 64-bit digest of each key, in stored order, as hexadecimal digits.
    """

    counts: dict[str, int]
    keys: str

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Census":
        """The census of these records."""
        held = Counter(" ".join(sorted(CODECS.keys() & record.members)) for record in records)
        digests = (hashlib.blake2b(r.key.encode(), digest_size=8).hexdigest() for r in records)
        return cls(dict(held), "".join(digests))


def find_schema(censuses: Iterable[Census]) -> Schema:
    """The schema of most samples of some shards; of equally many, that of more fields."""
    total: Counter[tuple[str, ...]] = Counter()
    for census in censuses:
        for text, count in census.counts.items():
            total[tuple(text.split())] += count
    kinds: Counter[frozenset[str]] = Counter()
    for names, count in total.items():
        kinds[_kind(names)] += count
    if not kinds:
        return Schema(())
    # what has nothing of a batch is no sample, however often it comes
    kind = max(kinds, key=lambda each: (bool(each), kinds[each], len(each), sorted(each)))
    alike = [set(names) for names in total if _kind(names) == kind]
    everywhere = set.intersection(*alike)
    rest = set.union(*alike) - everywhere
    return Schema(tuple(sorted(everywhere)), tuple(sorted(rest)), kind)


def has_equal_keys(censuses: Sequence[Census]) -> bool:
    """Whether a key is in several of the shards; eight bytes a sample are in use meanwhile."""
    digests = np.frombuffer(bytes.fromhex("".join(census.keys for census in censuses)), np.uint64)
    return len(np.unique(digests)) < len(digests)


def check_alike(schemas: Mapping[str, Schema]) -> None:
    """Refuse sources, by name, whose samples cannot be in one batch.

    Raises:
        DataError: they hold different fields; names two of them.
    """
    (first, schema), *others = schemas.items()
    for name, other in others:
        if other.batch_names != schema.batch_names:
            raise DataError(
                f"sources must hold the same fields, got {sorted(schema.batch_names)} in {first!r} "
                f"and {sorted(other.batch_names)} in {name!r}; leave one out, or write it anew"
            )
