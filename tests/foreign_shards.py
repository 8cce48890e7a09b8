"""Shards as other tools write them, and a slow, obvious reader of them."""

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

LINK = object()
"""In place of the contents of a member that is a link or a device."""


def picture(seed=0, form="PNG", size=(8, 8), mode="RGB"):
    """The file of a random image of (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def tar(path, members, form=tarfile.GNU_FORMAT, mtime=0):
    """Write [(name, contents)]; contents may be a TarInfo without contents, such as a link."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                file.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            file.addfile(info, io.BytesIO(data))


def link(target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo("")
    info.type, info.linkname = kind, target
    return info


def dataset(
    root, fields, sizes=(("train", 24), ("target", 8), ("test", 8)), shards=2, key="{s}{i:05}"
):
    """Shards `<split>-<digits>.tar` of samples `fields(split, i)`, a dict by extension.

    The shards of train begin with the samples 0, 1000, ...
    """
    for split, size in sizes:
        num = shards if split == "train" else 1
        for shard in range(num):
            ids = range(shard * 1000, shard * 1000 + size // num)
            members = [
                (f"{key.format(s=split, i=i)}.{extension}", data)
                for i in ids
                for extension, data in fields(split, i).items()
            ]
            tar(Path(root, f"{split}-{shard:06d}.tar"), members)
    return root


def slow_records(path):
    """[(key, {extension: contents})] of a tar file, each in the order of its first member."""
    records = {}
    with tarfile.open(path, encoding="utf-8") as file:
        for info in file:
            named = re.fullmatch(r"((?:.*/|)[^./][^./]*)\.([^/]*)", info.name, re.DOTALL)
            if named and not info.isdir():
                data = file.extractfile(info).read() if info.isreg() else LINK
                records.setdefault(named[1], {})[named[2].lower()] = data
    return list(records.items())


# the layouts of well-known tools


def img2dataset(split, i):
    made = {"caption": f"a cat {i}", "url": f"http://x/{i}.jpg", "status": "success", "exif": None}
    return {
        "jpg": picture(i, "JPEG"),
        "json": json.dumps(made | {"width": 8, "height": 8, "sha256": "0" * 64}).encode(),
        "txt": f"a cat {i}".encode(),
    }


def datacomp(split, i):
    made = {"uid": f"{i:032x}", "clip_b32_similarity_score": 0.3, "original_width": None}
    made |= {"text": None if i % 2 else "a dog", "face_bboxes": [], "score": float("nan")}
    return {
        "jpg": picture(i, "JPEG"),
        "txt": b"" if i % 2 else b"a dog",
        "json": json.dumps(made).encode(),
    }


def imagenet(split, i):
    return {"JPEG": picture(i, "JPEG"), "cls": b"%d\n" % (i % 4)}


def energon(split, i):
    """Cooked crude samples: several arrays and a json beside the image."""
    return {
        "jpg": picture(i, "JPEG"),
        "cls": b"%d" % (i % 4),
        "json": json.dumps({"question": "?", "answers": None}).encode(),
        "boxes.npy": array(np.zeros((2, 4), np.float32)),
    }


def mosaic(split, i):
    """As streaming's converters from WebDataset expect and export them: png and cls."""
    return {"png": picture(i), "cls": b"%d" % (i % 4), "index": b"%d" % i}
