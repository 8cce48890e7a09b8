"""Samples per second and seconds to the first pool, against webdataset and tensors in memory.

    python tests/benchmarks/data_throughput.py [--seconds 2] [--rounds 3]

All read the same shards, shuffle 1000 samples together, and hand out pools of 64 of the same
tensors. Each figure is the median of the rounds, which take turns, so that a busy machine slows all
of them alike. The last line is the share of a step that the demo waits for data.
"""

import argparse
import contextlib
import io
import json
import runpy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from selectflow.data import (
    Layout,
    Manifest,
    PoolStream,
    TextOptions,
    make_digits,
    make_text,
    read_batches,
    read_manifest,
    write_manifest,
    write_split,
)

ROOT = Path(__file__).parents[2]
POOL = 64
BUFFER = 1000


def make_images(root, count=4096):
    """Smooth 32 x 32 colour images as PNG."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(256, size=(count, 3, 8, 8)).astype(np.float32))
    pixels = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear").byte().numpy()
    samples = ({"__key__": f"i{i}", "png": pixels[i], "cls": i % 10} for i in range(count))
    shards = write_split(root, "train", samples, 256)
    write_manifest(root, Manifest({"train": tuple(shards)}, ("cls", "png"), {}, 0))


DATASETS = {
    "digits": make_digits,
    "digits, packed by 64": partial(make_digits, pack=64),
    "colour images 32 x 32": make_images,
    "text, blocks of 512": partial(make_text, options=TextOptions(block=512), layout=Layout()),
    "text, packed by 64": partial(make_text, options=TextOptions(block=512)),
}


def stream(root, num_workers, memory_gib=0.0):
    options = {"num_workers": num_workers, "memory_gib": memory_gib}
    return PoolStream(root, pool=POOL, seed=0, buffer=BUFFER, **options)


def unpacked(records):
    for record in records:
        yield from zip(*record, strict=True)


def plain(root, num_workers):
    """What webdataset's documentation shows: shards and a buffer shuffled, decoded, batched."""
    manifest = read_manifest(root)
    urls = [str(Path(root, shard.name)) for shard in manifest.shards("train")]
    names = [name for name in ("npy", "png", "cls") if name in manifest.fields]
    stored = ["cls.npy" if name == "cls" and manifest.pack > 1 else name for name in names]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat()
    if manifest.pack > 1:
        data = data.decode("torchrgb").to_tuple(*stored).compose(unpacked).shuffle(BUFFER)
    else:
        data = data.shuffle(BUFFER).decode("torchrgb").to_tuple(*stored, "__key__")
    data = data.batched(POOL)
    return iter(DataLoader(data, batch_size=None, num_workers=num_workers))


def in_memory(root, _):
    """Tensors indexed by a new permutation every epoch."""
    parts = read_batches(root, "train", 1024)
    tensors = [
        torch.cat([part[name] for part in parts])
        for name in parts[0]
        if torch.is_tensor(parts[0][name])
    ]
    while True:
        for rows in torch.randperm(len(tensors[0])).split(POOL):
            yield [tensor.index_select(0, rows) for tensor in tensors]


READERS = {
    "selectflow": stream,
    "selectflow, in memory": partial(stream, memory_gib=8.0),
    "webdataset": plain,
    "tensors in memory": in_memory,
}


def measure(make: Callable[[], Iterator], seconds: float) -> tuple[float, float]:
    """Samples per second, and seconds to the first pool."""
    began = time.perf_counter()
    pools = make()
    next(pools)
    first = time.perf_counter() - began
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        next(pools)
        count += POOL
    return count / elapsed, first


def wait_of_demo(folder):
    """Seconds that the demo waits for data, and seconds of its training."""
    main = runpy.run_path(str(ROOT / "trainers/vision.py"))["main"]
    values = {"root": folder, "data.root": folder / "digits", "track.wandb": "disabled"}
    with contextlib.redirect_stdout(io.StringIO()):
        main([str(ROOT / "configs/digits_online.yaml"), *(f"{k}={v}" for k, v in values.items())])
    summary = json.loads((folder / "digits_online-s0" / "summary.json").read_text())
    return summary["perf/data_s"], summary["perf/wall_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'data':24} {'workers':>7} {'reader':24} {'samples/s':>12} {'first pool, s':>14}")
    with tempfile.TemporaryDirectory() as folder:
        for index, (data, make) in enumerate(DATASETS.items()):
            root = Path(folder, str(index))
            make(root)
            for num_workers in (0, 2):
                readers = READERS if num_workers == 0 else ("selectflow", "webdataset")
                rounds = [
                    {
                        n: measure(partial(READERS[n], root, num_workers), args.seconds)
                        for n in readers
                    }
                    for _ in range(args.rounds)
                ]
                for name in readers:
                    rate, first = (median(each[name][i] for each in rounds) for i in range(2))
                    print(
                        f"{data:24} {num_workers:7} {name:24} {rate:12,.0f} {first:14.3f}",
                        flush=True,
                    )
        data_s, wall_s = wait_of_demo(Path(folder, "demo"))
    print(f"the demo waits for data {data_s:.2f} of {wall_s:.2f} s, {data_s / wall_s:.1%}")


if __name__ == "__main__":
    main()
