"""WebDataset shards: written, read back, streamed as pools; built-in datasets.

Reading needs `os.pread`, which only POSIX systems have.
"""

from selectflow.control.shares import AutoShares, ShareSchedule
from selectflow.data.cache import Cache
from selectflow.data.images import make_digits, make_folder, make_torchvision
from selectflow.data.manifest import DataError, Manifest, Shard, read_manifest, write_manifest
from selectflow.data.sources import Sources, find_manifest, find_splits, open_catalog
from selectflow.data.splits import (
    check_fields,
    contact_sheet,
    head,
    picture,
    read_batches,
    read_labels,
    read_metadata,
    read_samples,
    read_split,
    verify,
)
from selectflow.data.stream import PoolStream
from selectflow.data.subset import write_subset
from selectflow.data.text import TextOptions, make_text
from selectflow.data.tokenizers import Tokenizer, open_tokenizer
from selectflow.data.write import Layout, write_split

__all__ = [
    "AutoShares",
    "Cache",
    "DataError",
    "Layout",
    "Manifest",
    "PoolStream",
    "Shard",
    "ShareSchedule",
    "Sources",
    "TextOptions",
    "Tokenizer",
    "check_fields",
    "contact_sheet",
    "find_manifest",
    "find_splits",
    "head",
    "make_digits",
    "make_folder",
    "make_text",
    "make_torchvision",
    "open_catalog",
    "open_tokenizer",
    "picture",
    "read_batches",
    "read_labels",
    "read_manifest",
    "read_metadata",
    "read_samples",
    "read_split",
    "verify",
    "write_manifest",
    "write_split",
    "write_subset",
]
