"""How scores in low precision rank a pool, against exact float32 scores, on a GPT-2 shape of 14M.

    python tests/benchmarks/precision.py [--steps 120] [--width 384 --layers 8] [--tokens 96]
        [--pool 16 --pools 1] [--derivatives auto central]

The model is trained on real text, and scored on the CPU: pools of the stream as it comes, and pools
of its first domain alone; H = 0 under AdamW, whose sensitivity is the preconditioned target
gradient, and under SGD, where it is the raw one. TF32 is emulated: what goes into each matrix
product is rounded to 10 bits. So is bfloat16: products are of rounded values, in float32, and
rounded at the end. Printed are, for each way of `derivatives`, Spearman with the exact float32
scores in each pool, their mean, and the form and step that were chosen at run time, at the first of
them.
"""

from __future__ import annotations

import argparse
import copy
import runpy
import statistics
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selectflow import Selector
from selectflow.core.batches import join, take
from selectflow.data import read_metadata
from selectflow.run.build import build_optimizer, build_schedule
from selectflow.run.config import load

ROOT = Path(__file__).parents[2]
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_ROUNDED = _PRODUCTS | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


class TF32(TorchDispatchMode):
    """Matrix products of operands with 10 bits behind the point, as tensor cores take them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in _PRODUCTS:
            factors = args[-2:]
            args = (*args[:-2], *map(_rounded, factors))
        return func(*args, **(kwargs or {}))


class BF16(TorchDispatchMode):
    """Products of bfloat16 in float32, rounded at the end, as tensor cores accumulate them.

    torch's own take many times as long on processors without bfloat16.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in _ROUNDED or all(map(_is_wide, args)):
            return func(*args, **(kwargs or {}))
        found = func(*(arg if _is_wide(arg) else arg.float() for arg in args), **(kwargs or {}))
        if isinstance(found, Tensor):
            return found.bfloat16()
        return (found[0].bfloat16(), *found[1:])


def _is_wide(arg: object) -> bool:
    return not (isinstance(arg, Tensor) and arg.dtype == torch.bfloat16)


def _rounded(tensor: Tensor) -> Tensor:
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)  # 13 of 23 bits are dropped


def trained(args: argparse.Namespace) -> tuple[Any, Any, dict[str, list[Any]], Any]:
    """A trained model, its loss, pools by kind and a batch of the target."""
    options = [
        f"model.width={args.width}", f"model.layers={args.layers}", "model.heads=6",
        "data.text.num_train=4000", f"data.target_batch={args.pool}", "num_threads=1",
        f"data.text.block={args.tokens}",
    ]  # fmt: skip
    run = load(ROOT / "configs/text_online.yaml", options)
    task = runpy.run_path(str(ROOT / "trainers/language.py"))["build_task"](run)
    optimizer = build_optimizer(task.model, run.optimizer)
    schedule = build_schedule(optimizer, run.schedule, run.steps)
    stream = iter(task.pools)
    for pool in islice(stream, args.steps):
        batch = take(pool, torch.arange(16))
        optimizer.zero_grad()
        task.loss_fn(task.model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pools = [next(stream) for _ in range(8 * args.pools)]
    metadata = read_metadata(run.data.directory, "train")
    from_code = [
        take(pool, torch.tensor([at]))
        for pool in pools
        for at, key in enumerate(pool["key"])
        if metadata[key]["origin"] == "code"
    ]
    starts = range(0, args.pools * args.pool, args.pool)
    kinds = {
        "mixed": [take(pool, torch.arange(args.pool)) for pool in pools[: args.pools]],
        "one domain": [join(from_code[start : start + args.pool]) for start in starts],
    }
    return task, optimizer, kinds, next(iter(task.target))


def scores(task: Any, optimizer: Any, pools: list[Any], target: Any, how: dict[str, Any]) -> Any:
    """Scores of each pool, and the form they were found by."""
    how = dict(how)
    model = copy.deepcopy(task.model).to(how.pop("dtype", torch.float32))
    if how.pop("raw"):
        twin: Any = torch.optim.SGD(model.parameters(), 1e-3)
    else:
        twin = torch.optim.AdamW(model.parameters(), 1e-3)
        twin.load_state_dict(
            {
                **copy.deepcopy(optimizer.state_dict()),
                "param_groups": twin.state_dict()["param_groups"],
            }
        )
    mode = TF32 if how.pop("tf32", False) else BF16  # which leaves float32 alone
    selector = Selector(model, twin, task.loss_fn, [target], keep=4, horizon=0, **how)
    found = []
    for pool in pools:
        with mode():
            selector.select(pool)
        assert selector.last is not None
        found.append(selector.last.scores)
    form = selector.forms["losses"]
    scale = selector.state.forms.scales["losses"]
    return found, form if form == "exact" else f"central x {scale:.3g}"


def cell(exact: list[Any], *given: Any) -> str:
    """Rank correlations of the pools, and the form, or why there are none."""
    try:
        found, form = scores(*given)
    except FloatingPointError as error:
        return f"refused ({str(error)[:60]})"
    ranks = [spearmanr(*pair).statistic for pair in zip(found, exact, strict=True)]
    each = " ".join(f"{rank:.4f}" for rank in ranks)
    return f"{each}, mean {statistics.fmean(ranks):.4f} ({form})"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in (
        ("steps", 120), ("width", 384), ("layers", 8), ("tokens", 96), ("pool", 16), ("pools", 1)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--derivatives", nargs="+", default=["auto", "central"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    task, optimizer, kinds, target = trained(args)
    print(f"{sum(p.numel() for p in task.model.parameters()) / 1e6:.1f}M parameters", flush=True)
    arithmetics: dict[str, dict[str, Any]] = {
        "float32": {},
        "TF32, emulated": {"tf32": True},
        "bf16 autocast": {"autocast": torch.bfloat16},
        "bf16 parameters": {"dtype": torch.bfloat16},
    }
    for raw, kind in product((False, True), kinds):
        given = task, optimizer, kinds[kind], target
        exact, _ = scores(*given, {"raw": raw, "derivative": "exact"})
        for name, options in arithmetics.items():
            cells = [
                cell(exact, *given, {"raw": raw, "derivative": derivative, **options})
                for derivative in args.derivatives
            ]
            gamma = "raw" if raw else "preconditioned"
            print(f"| {gamma}, {kind} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
