"""Record the golden runs: what short runs of every kind do, step by step.

    .venv/bin/python tests/golden/record.py        # writes runs.json anew

`tests/test_golden.py` makes the same runs and compares them exactly: a change that is not meant
to change a number must leave them as they are. They are re-made only on purpose, with the reason
in the commit.

The arithmetic is the same on every processor: one thread, torch's plain kernels, and MKL's
compatible ones. The data are made here, so that they do not depend on the Python that runs this.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("runs.json")
ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
}

DIGITS = ["data.label_noise=0.4", "model.hidden=[24]", "eval_every=10", "steps=30"]
TEXT = [
    "steps=24", "eval_every=8", "data.name=text", "data.pool=16", "data.text.block=24",
    "data.text.num_train=400", "data.text.num_target=16", "data.text.num_test=16",
    "data.target_batch=8", "data.text.target_domain=code",
    "data.text.mixture={code: 0.4, prose: 0.3, shuffled: 0.2, duplicate: 0.1}",
    "model.name=gpt2", "model.layers=1", "model.width=16", "model.heads=2",
    "optimizer.lr=2e-3", "optimizer.max_grad_norm=1.0", "schedule.name=cosine",
    "schedule.warmup_steps=4", "select.keep=4",
]  # fmt: skip
SETTINGS = {
    # a trainer, and what its configuration differs in from the defaults
    "immediate": ("vision", [*DIGITS, "select.horizon=0", "select.interval=4"]),
    "own update": ("vision", [*DIGITS, "select.horizon=1"]),
    "controlled": (
        "vision",
        [
            *DIGITS,
            "steps=400",
            "select.horizon=auto",
            "select.lr=auto",
            "optimizer.lr=1e-2",
            "select.largest_horizon=1",
            "select.costs={0: 2.0, 1: 3.0}",
            "select.control_share=0.5",
        ],
    ),
    "offline": (
        "vision",
        [*DIGITS, "select.horizon=.inf", "select.record_steps=30", "select.record_lr=3e-4"],
    ),
    "text": ("language", [*TEXT, "select.horizon=2", "select.interval=2"]),
}


def make_text(folder: Path) -> None:
    """Forty documents of two domains, of words drawn at random."""
    words = {
        "code": ["def", "return", "if", "else:", "for", "in", "self", "None", "(a, b):", "+=", "#"],
        "prose": ["the", "a", "river", "house", "over", "and", "walked", "slowly", "bright", "she"],
    }
    rng = random.Random(0)
    for domain, known in words.items():
        (folder / domain).mkdir(parents=True)
        for number in range(20):
            text = " ".join(rng.choice(known) for _ in range(200))
            (folder / domain / f"{number}.txt").write_text(text, encoding="utf-8")


def record(folder: Path) -> dict[str, Any]:
    """What each of the runs does; they are made in `folder`, which is to be empty."""
    make_text(folder / "text")
    config = folder / "run.yaml"
    mains: dict[str, Any] = {}
    found = {}
    for name, (trainer, given) in SETTINGS.items():
        if trainer not in mains:
            mains[trainer] = runpy.run_path(str(ROOT / "trainers" / f"{trainer}.py"))["main"]
        config.write_text(f"name: {name.replace(' ', '_')}\n", encoding="utf-8")
        options = [*given, f"root={folder}", f"data.root={folder / trainer}", "device=cpu"]
        if trainer == "language":
            options.append(f"data.text.source=files:{folder / 'text'}")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = mains[trainer]([str(config), *options, "num_threads=1"])
        if status:
            raise RuntimeError(f"golden run {name!r} must end well, got {said.getvalue()}")
        found[name] = what_it_did(folder / name.replace(" ", "_"))
    return found


def what_it_did(run_dir: Path) -> dict[str, Any]:
    """The metrics, decisions and choices that a run directory holds, without its seconds."""
    import pyarrow.parquet  # noqa: PLC0415

    rows = pyarrow.parquet.ParquetDataset(sorted((run_dir / "selection").glob("*.parquet"))).read()
    rows = rows.filter(rows["kept"]).to_pylist()
    kept: dict[int, list[Any]] = {}
    for row in rows:
        kept.setdefault(row["step"], []).append([row["key"], row["score"]])
    decisions, scores = run_dir / "decisions.jsonl", run_dir / "selected" / "scores.parquet"
    return {
        "metrics": [
            {name: value for name, value in line.items() if not name.startswith("perf/")}
            for line in read_lines(run_dir / "metrics.jsonl")
        ],
        # a reason may name the seconds of a step
        "decisions": [
            {name: value for name, value in line.items() if name != "reason"}
            for line in (read_lines(decisions) if decisions.exists() else [])
        ],
        "kept": [kept[step] for step in sorted(kept)],
        # of offline selection, best first
        "scores": [
            [row["key"], row["score"]]
            for row in (pyarrow.parquet.read_table(scores).to_pylist() if scores.exists() else [])
        ],
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def record_apart() -> dict[str, Any]:
    """`record` in a process of its own, with the arithmetic that is the same everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, __file__, "--print", folder],
            env=os.environ | ARITHMETIC,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"golden runs must end well, got\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def in_lines(versions: dict[str, str], runs: dict[str, Any]) -> str:
    """JSON with a line for each step, so that a difference shows where it begins."""
    parts = []
    for name, run in runs.items():
        sections = (
            f"  {json.dumps(section)}: [\n"
            + ",\n".join(f"   {json.dumps(item)}" for item in items)
            + "\n  ]"
            for section, items in run.items()
        )
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(sections) + "\n }")
    listed = ",\n".join(parts)
    return f'{{"versions": {json.dumps(versions)},\n"runs": {{\n{listed}\n}}}}\n'


def versions() -> dict[str, str]:
    """What the last digits depend on besides our own code."""
    import numpy  # noqa: PLC0415
    import torch  # noqa: PLC0415

    return {"torch": torch.__version__, "numpy": numpy.__version__}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--print"]:
        print(json.dumps(record(Path(sys.argv[2]))))
    else:
        RUNS.write_text(in_lines(versions(), record_apart()), encoding="utf-8")
        print(f"wrote {RUNS}")
