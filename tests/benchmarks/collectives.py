"""What a selection sends between processes: collectives and bytes, by wrapper, horizon and number.

    python tests/benchmarks/collectives.py [--processes 2 4]

Counted on gloo processes of this machine, for a small net in three parts under `fully_shard`: of a
training step, of a select with its look-ahead, and of a select in between. Bytes are those of the
tensors that one process hands to collectives, over those of the parameters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Processes
from test_distributed import counted


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    print("| processes | wrapper | H | training step | select, look-ahead | select, in between |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num in args.processes:
        processes = Processes(num)
        for wrapper in ("ddp", "fsdp2"):
            for horizon in (0, 1, 3):
                cells = processes.run(counted, wrapper, horizon)[0]
                text = " | ".join(f"{count}, {size:.2f}" for count, size in cells)
                print(f"| {num} | {wrapper} | {horizon} | {text} |", flush=True)
        processes.stop()


if __name__ == "__main__":
    main()
