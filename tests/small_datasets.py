"""Small datasets, and damage to their shards."""

import io
import tarfile
from pathlib import Path

import numpy as np

from selectflow.data import Manifest, write_manifest, write_split


def sample(key, label=3, **fields):
    image = np.full((1, 8, 8), label, dtype=np.float32)
    return {"__key__": key, "npy": image, "cls": label, "json": {"row": label}} | fields


def make_small(root, count=10, per_shard=4, first=0):
    """A dataset of `count` samples whose image and label both hold the sample's number."""
    samples = [sample(f"s{i}", i) for i in range(first, first + count)]
    shards = write_split(root, "train", samples, per_shard)
    manifest = Manifest({"train": tuple(shards)}, ("cls", "json", "npy"), {"name": "small"}, 0)
    write_manifest(root, manifest)
    return manifest


def edit_shard(root, name, edit):
    """Rewrite a shard with `edit` of its [(member, bytes)]; the manifest stays as it was."""
    path = Path(root) / name
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(path, "w") as tar:
        for info, data in edit(members):
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def keys_of(pools):
    return [key for pool in pools for key in pool["key"]]


def files_of(root):
    """The contents of each file of a directory, by name."""
    return {path.name: path.read_bytes() for path in Path(root).iterdir()}
