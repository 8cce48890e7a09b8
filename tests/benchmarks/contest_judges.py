"""How contests should judge: by the last state of each side, or by the mean of its states.

    python tests/benchmarks/contest_judges.py [--tasks clean imbalanced noised] [--seeds 3]

Digits, an MLP trained plainly. From the same states, after 200, 800 and 2,000 steps, selection at
H = 0 takes 8 or 16 steps in simulation and plain training 4.5 times as many, which is what they
cost. Both are judged by the half of the target set that was not selected by, and by the test set,
which decides nothing. "Better" counts leads of 1.5 errors and more. Over a whole run selection is
better on wrong labels and on imbalanced classes, and not on clean digits (`equal_time.py`).
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch
from equal_time import digits, take_step
from torch.optim.lr_scheduler import LambdaLR

from selectflow import AutoHorizon, Selector
from selectflow.control.contests import compared
from selectflow.control.ladder import OFF, Outcome
from selectflow.core.optim import State
from selectflow.core.params import Params
from selectflow.distributed import ALONE

COST, AT = 4.5, (200, 800, 2000)
Lead = tuple[float, float]


def ends(states: Iterator[State], num: int) -> dict[str, Params]:
    """The last of so many states, and their mean."""
    mean = Params()
    for count, state in enumerate(islice(states, num), start=1):
        mean = mean.toward(state.params, 1 / count) if mean else state.params
    return {"last state": state.params, "mean of the states": mean}


def leads(task: str, seed: int) -> Iterator[tuple[tuple[int, str, str], Lead]]:
    """(steps, state, judge) and the lead of selection with its error, at each of the places."""
    setting = digits(task, seed, 1.0)
    model, optimizer, losses, target, stream, test, keep, *_ = setting
    never = AutoHorizon(largest=0, gap=3200, costs={0: COST})
    selector = Selector(model, optimizer, losses, target, keep, horizon=never, seed=seed)
    rollouts = selector._controls._contests._rollouts
    policy, later = rollouts.trained.policy, stream(lambda: 0.0)
    schedule = LambdaLR(optimizer, lambda _: 1.0)
    for step, batch in enumerate(selector.stream(stream(lambda: 0.0)), start=1):
        take_step(setting, schedule, batch)
        if step in AT:
            pools = list(islice(later, 32))
            with selector._objective.placed(), selector._objective.scoring():
                for num in (8, 16):
                    states = rollouts._selected(0, num, pools, target[0])
                    future = rollouts.trained.upcoming(round(COST * num), pools, target[0])
                    plain = policy.train(future, torch.Generator().manual_seed(step))
                    sides = {OFF: ends(plain, round(COST * num)), 0: ends(states, num)}
                    for which in sides[0]:
                        for judge, on in (("target", target[1]), ("test", test[0])):
                            found = {
                                rung: rollouts.losses(each[which], on)
                                for rung, each in sides.items()
                            }
                            yield (num, which, judge), Outcome(*compared(found, ALONE), COST).lead()
        if step == max(AT):
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", nargs="+", default=["clean", "imbalanced", "noised"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks:
        found: dict[tuple[int, str, str], list[Lead]] = defaultdict(list)
        for seed in range(args.seeds):
            for kind, lead in leads(task, seed):
                found[kind].append(lead)
        for (num, which, judge), each in found.items():
            better = sum(lead > 1.5 * error for lead, error in each)
            mean = statistics.mean(lead for lead, _ in each)
            print(
                f"{task:<11}{num:>3} steps, {which:<19} by the {judge:<7} "
                f"{better:>2} of {len(each)} better, mean lead {mean:+.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
