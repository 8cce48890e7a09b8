"""What a step costs where a small model scores for the large one, and where the seconds go.

    OMP_NUM_THREADS=1 python tests/benchmarks/scorer_cost.py [14M 124M] [--rounds 5] [--steps 2]

GPT-2 shapes of `step_cost.py` are trained, and a GPT-2 with as many tokens in its vocabulary and a
twelfth of the parameters scores, trained beside it. A fourth of each pool is kept, at H = 0 and
every step. "Compiled" is by `torch.compile`; "in bfloat16" has the passes that score in an
autocast, which processors without it emulate. Every variant takes its steps once in each round, in
turn, in seconds of the processor; the table shows the medians over the rounds, and the range of the
ratio to a plain step on the kept part in the same round. Weights are random: this measures cost
alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch
from step_cost import gpt2
from torch import Tensor

from selectflow import Scorer, Selector
from selectflow.models.language import token_losses

Parts = dict[str, float]


class Shape(NamedTuple):
    """Sizes of the model and of its scorer, and of what they are given."""

    model: dict[str, int]
    scorer: dict[str, int]
    vocabulary: int
    tokens: int
    keep: int
    chunk: int  # examples in a pass that scores


SHAPES = {
    "14M": Shape({}, {"width": 96, "heads": 4, "layers": 2}, 8192, 128, 8, 8),
    "124M": Shape({"width": 768, "heads": 12, "layers": 12},
                  {"width": 160, "heads": 4, "layers": 6}, 50257, 64, 2, 2),
}  # fmt: skip
# what scores, examples of a target batch over those that are kept, options of the selector
VARIANTS: dict[str, tuple[str | None, float, dict[str, Any]]] = {
    "plain, the kept part": (None, 0, {}),
    "plain, the whole pool": (None, 0, {}),
    "the model scores": ("itself", 1, {}),
    "a small model scores": ("small", 1, {}),
    "  frozen": ("frozen", 1, {}),
    "  half of the target batch": ("small", 0.5, {}),
    "  target gradient every 2": ("small", 1, {"interval": 2}),
    "  half of the tokens": ("small", 1, {"score_view": True}),
    "  half of both": ("small", 0.5, {"score_view": True}),
    "  compiled": ("compiled", 1, {}),
    "  in bfloat16": ("small", 1, {"autocast": torch.bfloat16}),
    "half as wide a model scores": ("smaller", 1, {}),
    "  half of both ": ("smaller", 0.5, {"score_view": True}),
}


def loss_fn(model: Any, tokens: Tensor) -> Tensor:
    targets = tokens[:, 1:]
    return token_losses(model(tokens[:, :-1]), targets).mean(1)


def half_of_tokens(batch: Tensor) -> Tensor:
    return batch[:, : (batch.shape[1] + 1) // 2]


def selector_of(
    shape: Shape, model: Any, optimizer: Any, batch: Any, variant: str
) -> tuple[Selector, Callable[[Tensor], None]]:
    """The selector of a variant, and what trains its scorer on a kept batch."""
    who, share, options = VARIANTS[variant]
    target = [batch(round(share * shape.keep)) for _ in range(4)]
    options = {"horizon": 0, "derivative": "central", "chunk_size": shape.chunk} | options
    if options.pop("score_view", False):
        options["score_view"] = half_of_tokens
    own = None
    if who != "itself":
        sizes = dict(shape.scorer)
        sizes["width"] //= 2 if who == "smaller" else 1
        small, *_ = gpt2(shape.vocabulary, shape.tokens, **sizes)
        own = torch.optim.AdamW(small.parameters(), 1e-3)
        small = torch.compile(small) if who == "compiled" else small
        # it is trained in the loop below, as the selector would, to see its seconds by themselves
        options["scorer"] = Scorer(
            small, None if who == "frozen" else own, autocast=options.pop("autocast", None),
            train=False,
        )  # fmt: skip

    def train(kept: Tensor) -> None:
        if own and who != "frozen":
            take_step(small, own, kept)

    return Selector(model, optimizer, loss_fn, target, shape.keep, **options), train


def take_step(model: Any, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    loss_fn(model, batch).mean().backward()
    optimizer.step()


def stepper(
    shape: Shape, model: Any, optimizer: Any, batch: Any, variant: str
) -> Callable[[int], Parts]:
    """Makes so many steps, and returns the processor's seconds of one by part."""
    size = shape.keep if "kept" in variant else 4 * shape.keep
    pools: Iterator[Tensor] = cycle([batch(size) for _ in range(4)])
    selector = None
    if VARIANTS[variant][0]:
        selector, train = selector_of(shape, model, optimizer, batch, variant)

    def steps(num: int) -> Parts:
        spent = dict.fromkeys(("all", "target gradient", "candidates", "scorer's step"), 0.0)
        for _ in range(num):
            began, began_s = time.process_time(), time.perf_counter()
            kept = next(pools)
            if selector is not None:
                kept = selector.select(kept)
                chosen = time.process_time()
                # the selector tells its parts by the clock
                share = (chosen - began) / (time.perf_counter() - began_s)
                spent["target gradient"] += share * selector.last.lookahead_s / num
                rest = share * (selector.last.seconds - selector.last.lookahead_s)
                spent["candidates"] += rest / num
                train(kept)
                spent["scorer's step"] += (time.process_time() - chosen) / num
            take_step(model, optimizer, kept)
            spent["all"] += (time.process_time() - began) / num
        return spent

    return steps


def num_params(shape: Shape, sizes: dict[str, int]) -> int:
    return sum(p.numel() for p in gpt2(shape.vocabulary, shape.tokens, **sizes)[0].parameters())


def measure(name: str, rounds: int, num_steps: int, variants: list[str]) -> None:
    shape = SHAPES[name]
    sizes = [num_params(shape, each) / 1e6 for each in (shape.model, shape.scorer)]
    torch.manual_seed(0)
    model, _, batch, lr = gpt2(shape.vocabulary, shape.tokens, **shape.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)  # all train the same model, in turn
    steppers = {variant: stepper(shape, model, optimizer, batch, variant) for variant in variants}
    for steps in steppers.values():
        steps(1)  # in which central differences are checked
    found: dict[str, list[Parts]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, steps in steppers.items():
            found[variant].append(steps(num_steps))
    print(f"\n{sizes[0]:.1f}M trained, {sizes[1]:.2f}M scoring; keep {shape.keep} of "
          f"{4 * shape.keep} of {shape.tokens} tokens; {rounds} rounds")  # fmt: skip
    print(f"{'':28}{'s':>7}{'plain-k':>9}{'range':>12}{'plain-n':>9}  of plain-k: by part")
    kept, whole = ([each["all"] for each in found[variant]] for variant in variants[:2])
    for variant, each in found.items():
        times = [parts["all"] for parts in each]
        ratios, others = (
            [time / base for time, base in zip(times, bases, strict=True)]
            for bases in (kept, whole)
        )
        line = f"{variant:28}{statistics.median(times):7.2f}{statistics.median(ratios):9.2f}"
        line += f"{min(ratios):7.2f}-{max(ratios):.2f}{statistics.median(others):9.2f}"
        for part in list(each[0])[1:]:
            share = statistics.median(p[part] / base for p, base in zip(each, kept, strict=True))
            line += f"  {part} {share:.2f}" if share else ""
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="|".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each variant in a round")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[2:])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.shapes:
        measure(name, args.rounds, args.steps, [*list(VARIANTS)[:2], *args.variants])


if __name__ == "__main__":
    main()
