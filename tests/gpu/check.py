"""What can only be seen on an accelerator: precision, memory and cost of a select on CUDA.

    make test-gpu                                   # skips itself without a CUDA device
    python tests/gpu/check.py --device cpu          # the same on the CPU, to try the script itself

Writes one JSON of results, and ends with status 1 where one of them is not as it should be. A GPT-2
shape on random tokens; some minutes at the most.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from selectflow import Selector
from selectflow.models.language import causal_lm_losses

POOL, KEEP, LENGTH, VOCABULARY = 32, 16, 128, 512
Batch = dict[str, Tensor]


class Setting:
    """A GPT-2 that has learned some steps of a text in which each token depends on the last."""

    def __init__(self, device: torch.device, width: int, layers: int) -> None:
        torch.manual_seed(0)
        self.device = device
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.model: Any = GPT2LMHeadModel(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.following = torch.randint(VOCABULARY, (VOCABULARY, 4))
        for _ in range(60):
            self.train(self.batch(KEEP))
        self.pool, self.target = self.batch(POOL), self.batch(POOL)

    def batch(self, num: int) -> Batch:
        tokens = torch.randint(VOCABULARY, (num, LENGTH))
        for place in range(1, LENGTH):
            choice = torch.randint(4, (num,))
            likely = self.following[tokens[:, place - 1], choice]
            tokens[:, place] = torch.where(torch.rand(num) < 0.9, likely, tokens[:, place])
        return {"input_ids": tokens.to(self.device)}

    def train(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        causal_lm_losses(self.model, batch).mean().backward()
        self.optimizer.step()

    def twin(self, dtype: torch.dtype) -> tuple[Any, torch.optim.AdamW]:
        """The model and its optimizer in another type of parameters."""
        model = copy.deepcopy(self.model).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return model, optimizer


def scores(
    setting: Setting,
    *,
    horizon: int = 0,
    derivative: Any = "auto",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of the pool, and how they were found; the model is the same to the bit afterwards."""
    model, optimizer = setting.twin(dtype)
    before = [param.detach().clone() for param in model.parameters()]
    selector = Selector(
        model, optimizer, causal_lm_losses, [setting.target], KEEP, horizon,
        derivative=derivative, autocast=autocast,
    )  # fmt: skip
    with around or nullcontext():
        selector.select(setting.pool, [setting.pool] * horizon)
    assert selector.last is not None
    unchanged = all(map(torch.equal, before, model.parameters()))
    forms = selector.state.forms
    how = {"forms": forms.decided, "scales": forms.scales, "errors": forms.errors}
    return selector.last.scores, how | {"unchanged": unchanged}


class TF32(AbstractContextManager[None]):
    """Matrix products of float32 in TF32, as many trainers switch them on."""

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def precision(setting: Setting) -> dict[str, Any]:
    """Spearman of scores with exact ones in float32, by arithmetic; goals beside them."""
    found = {}
    for horizon in (0, 1):
        exact, _ = scores(setting, horizon=horizon, derivative="exact")
        cases: dict[str, tuple[float, dict[str, Any]]] = {
            "float32": (0.99, {}),
            "TF32": (0.99, {"around": TF32()}),
            "bf16 autocast": (0.99, {"autocast": torch.bfloat16}),
            "bf16 parameters": (0.97, {"dtype": torch.bfloat16}),
        }
        for name, (goal, options) in cases.items():
            for derivative in ("auto", "central"):
                ours, how = scores(setting, horizon=horizon, derivative=derivative, **options)
                rank = float(spearmanr(ours, exact).statistic)
                passed = rank >= goal and how["unchanged"]
                key = f"H = {horizon}, {name}, {derivative}"
                found[key] = {"spearman": rank, "goal": goal, "passed": passed} | how
    return found


def seconds(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """Median seconds of a call, after one that is not counted."""
    spent = []
    for _ in range(times + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def peak_gib(run: Callable[[], object], device: torch.device) -> float | None:
    """Most memory of tensors during a call, in GiB; None where it is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**30


def cost(setting: Setting, autocast: torch.dtype | None) -> dict[str, Any]:
    """A step with selection over plain steps on the kept and on all candidates, and its memory."""
    kept = {name: value[:KEEP] for name, value in setting.pool.items()}
    around = (
        torch.autocast(setting.device.type, autocast) if autocast is not None else nullcontext()
    )

    def step(batch: Batch) -> None:
        with around:
            loss = causal_lm_losses(setting.model, batch).mean()
        setting.optimizer.zero_grad()
        loss.backward()
        setting.optimizer.step()

    plain = {
        "kept": seconds(lambda: step(kept), setting.device),
        "all": seconds(lambda: step(setting.pool), setting.device),
    }
    found: dict[str, Any] = {f"plain on {name}": {"s": spent} for name, spent in plain.items()}
    found["plain on kept"]["peak_gib"] = peak_gib(lambda: step(kept), setting.device)
    for horizon, interval in ((0, 1), (0, 8), (1, 1)):
        selector = Selector(
            setting.model, setting.optimizer, causal_lm_losses, [setting.target], KEEP, horizon,
            interval, autocast=autocast,
        )  # fmt: skip
        rounds = interval

        def selected(selector: Selector = selector, rounds: int = rounds) -> None:
            for _ in range(rounds):
                step(selector.select(setting.pool))

        spent = seconds(selected, setting.device) / rounds
        found[f"H = {horizon} every {interval}"] = {
            "s": spent,
            "over plain on kept": spent / plain["kept"],
            "over plain on all": spent / plain["all"],
            "peak_gib": peak_gib(selected, setting.device),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    device = torch.device(args.device)
    setting = Setting(device, args.width, args.layers)
    found = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": sum(param.numel() for param in nn.Module.parameters(setting.model)),
        "precision": precision(setting),
        "cost, float32": cost(setting, None),
        "cost, bf16 autocast": cost(setting, torch.bfloat16),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    failed = [name for name, each in found["precision"].items() if not each["passed"]]
    print(f"wrote {args.out}; " + (f"failed: {', '.join(failed)}" if failed else "all as expected"))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
