"""What a sweep over a whole run costs: seconds in units of the run, and peak memory, by length.

    python tests/benchmarks/sweep_cost.py [--steps 100 2000] [--limit-gib 0.02] [--threads 1]

An MLP is recorded for T steps under one limit for snapshots and one for the sweep, then one target
is swept back over all of them, with each curvature. Plain training of as many steps, without a
recording, is the unit; seconds are the processor's, which other work on the machine changes little.
Memory is the growth of the process's peak over what it held before the recording, each length in a
process of its own; where T states do not fit into the limits, it must not grow with T.

    python tests/benchmarks/sweep_cost.py --shape gpt2 | llama

times and weighs a few recorded steps and their sweep at the shape of GPT-2 (124M) or, with LoRA,
of Llama-3.2-1B.

    python tests/benchmarks/sweep_cost.py --shape small [--steps 16]

sweeps a GPT-2 shape of 2.6M parameters, batch 8 x 64 tokens, by each form of the derivatives, and
prints how well their scores agree with the exact ones of the same curvature.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

from selectflow.audit.budget import RecordedRun
from selectflow.audit.problems import PROBLEMS, AuditedRun
from selectflow.audit.study import AuditConfig, GPT2Model, LlamaModel
from selectflow.models.language import causal_lm_losses
from selectflow.offline.record import record
from selectflow.offline.score import score_samples

BATCH, TARGET = 32, 200
SHAPES = {"gpt2": GPT2Model(shape="124m", block=64), "llama": LlamaModel(shape="1b", block=64)}


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def problem(num_steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU())
    model.append(nn.Linear(256, 10))
    x, y = torch.randn(4096, 64), torch.randint(10, (4096,))

    def batch(step, size):
        index = torch.randint(4096, (size,), generator=torch.Generator().manual_seed(step))
        return {"x": x[index], "y": y[index], "key": [str(i) for i in index.tolist()]}

    batches = [batch(step, BATCH) for step in range(num_steps)]
    return model, batches, batch(-1, TARGET)


def train(model, loss, batches):
    """Seconds of plain training."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, 1e-3)
    began = time.process_time()
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()
    return time.process_time() - began


def peak_gib():
    """The largest size this process has had in memory."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 2**20


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def measure(num_steps, limit_gib, num_threads):
    """One length: plain training, recording, and sweeps of one target."""
    torch.set_num_threads(num_threads)
    model, batches, target = problem(num_steps)
    train(model, loss_fn, batches[:20])  # the first steps of a process are slow
    plain = train(model, loss_fn, batches)
    model, batches, target = problem(num_steps)
    reset_peak()
    before = peak_gib()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    began = time.process_time()
    trajectory = record(model, optimizer, loss_fn, batches, limit_gib=limit_gib)
    recording = time.process_time() - began
    snapshots, state = trajectory.snapshots, trajectory.snapshots.state(0)
    size = sum(part.num_bytes() for part in state) / 2**30
    print(
        f"T = {num_steps}: plain {plain:.2f} s; all states {num_steps * size:.3f} GiB; "
        f"recording {recording / plain:.2f} of it, {len(snapshots.indices)} snapshots, "
        f"{snapshots.gib:.4f} GiB",
        flush=True,
    )
    for curvature in ("exact", "fisher", "none"):
        began = time.process_time()
        score_samples(trajectory, [target], curvature=curvature, memory_gib=limit_gib)
        took = (time.process_time() - began) / plain
        print(f"  sweep and scores, {curvature}: {took:.2f} of plain training", flush=True)
    print(f"  peak memory {peak_gib() - before:.3f} GiB over what it was before", flush=True)


def measure_shape(name, limit_gib):
    """Seconds and memory of recorded steps and of one target's sweep, at full size."""
    config = AuditConfig(
        name=name, model=SHAPES[name], steps=3, batch=4, num_queries=1, horizons=(),
        schedule="constant", memory_gib=limit_gib,
    )  # fmt: skip
    run = AuditedRun(config, 0)
    began = time.process_time()
    model = run.model()
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    total = sum(param.numel() for param in model.parameters())
    print(
        f"{name}: {total / 1e6:.0f}M parameters, {trained / 1e6:.2f}M trained, float32, "
        f"batch 4 x 64 tokens; built in {time.process_time() - began:.0f} s",
        flush=True,
    )
    loss = PROBLEMS[config.model.kind].loss_fn
    plain = train(model, loss, [run.batch(step) for step in range(3)]) / 3
    print(f"  plain step {plain:.2f} s; peak {peak_gib():.2f} GiB", flush=True)
    del model
    reset_peak()
    recorded = RecordedRun.of(run, 1e-4)
    print(
        f"  recorded step {recorded.trajectory.seconds / 3:.2f} s by the clock; peak "
        f"{peak_gib():.2f} GiB",
        flush=True,
    )
    for curvature in ("fisher", "exact"):
        reset_peak()
        began = time.process_time()
        recorded.predicted([(0, 0)], 3, curvature=curvature, reduce="mean")
        took = (time.process_time() - began) / 3
        print(f"  sweep, {curvature}: {took:.2f} s a step; peak {peak_gib():.2f} GiB", flush=True)


def small_problem(num_steps):
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    torch.manual_seed(0)
    rates = {f"{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")}
    shape = {"vocab_size": 2048, "n_positions": 64, "n_embd": 192, "n_layer": 5, "n_head": 6}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **rates, **ends))
    generator = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(2048, (8, 64), generator=generator),
            "key": [f"{step}-{position}" for position in range(8)],
        }
        for step in range(num_steps + 1)
    ]
    return model, batches[:-1], batches[-1]


def measure_small(num_steps, limit_gib):
    """Cost in units of plain training, and agreement, of each form and curvature."""
    model, batches, target = small_problem(num_steps)
    train(copy.deepcopy(model), causal_lm_losses, batches[:8])
    plain = train(copy.deepcopy(model), causal_lm_losses, batches)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    trajectory = record(model, optimizer, causal_lm_losses, batches, limit_gib=limit_gib)
    print(f"{num_steps} steps, {len(trajectory.snapshots.indices)} snapshots; plain {plain:.2f} s")
    for curvature in ("exact", "fisher", "none"):
        exact = torch.empty(0)
        for form in ("exact", "central", "auto"):
            began = time.process_time()
            options = {"curvature": curvature, "derivative": form, "memory_gib": limit_gib}
            found = score_samples(trajectory, [target], **options).score
            took = (time.process_time() - began) / plain
            exact = found if form == "exact" else exact
            error = float((found - exact).norm() / exact.norm())
            rank = spearmanr(found, exact).statistic
            print(
                f"  curvature {curvature:<6} {form:<7} {took:.2f} of plain training; error "
                f"{error:.1e}, Spearman {rank:.5f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 2000])
    parser.add_argument("--limit-gib", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=[*SHAPES, "small"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.shape == "small":
        measure_small(args.steps[0] if len(args.steps) == 1 else 16, args.limit_gib or 4.0)
        return
    if args.shape:
        measure_shape(args.shape, args.limit_gib or 8.0)
        return
    context = multiprocessing.get_context("spawn")
    for num_steps in args.steps:
        options = (num_steps, args.limit_gib or 0.02, args.threads)
        process = context.Process(target=measure, args=options)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
