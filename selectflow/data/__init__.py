"""WebDataset shards: written, read back, streamed as pools; built-in datasets."""

from selectflow.data.digits import make_digits
from selectflow.data.manifest import DataError, Manifest, Shard, read_manifest, write_manifest
from selectflow.data.shards import write_split
from selectflow.data.splits import read_batches, read_metadata, read_split
from selectflow.data.stream import PoolStream

__all__ = [
    "DataError",
    "Manifest",
    "PoolStream",
    "Shard",
    "make_digits",
    "read_batches",
    "read_manifest",
    "read_metadata",
    "read_split",
    "write_manifest",
    "write_split",
]
