"""The proxy against the truth: what it predicts for a change of training, and what the change does.

A run is trained plainly and stops at several places in its middle. There a window of coming
updates is taken, and two kinds of changes are both predicted and really made: single examples are
removed from its first batch, and all its batches are exchanged for selected ones. A selection is
one look-ahead's: for each horizon the examples of each pool whose scores are highest.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selectflow.audit.config import ProxyConfig
from selectflow.audit.reruns import effects
from selectflow.audit.settings import PROBLEMS
from selectflow.core.batches import Batch, num_examples, take
from selectflow.core.derivatives import Derivatives
from selectflow.core.lookahead import immediate
from selectflow.core.optim import Adjoint, State, Update
from selectflow.core.passes import LossFn, Objective
from selectflow.core.proxy import Proxy, closed_form, probe
from selectflow.core.sweep import SweepStep, Window, sweep
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.weight_changes import removals, selection
from selectflow.options import ConfigError


@dataclass(frozen=True)
class Point:
    """One change, one horizon.

    Attributes:
        change: "removal", or "keep F" for a selection of the fraction F.
        lr: learning rate of the run.
        seed: of the run.
        window: which of the run's.
        horizon: updates to where the target loss is read.
        first: I by the closed form.
        second: Q by the closed form.
        effect: D, really made.
        fast_first: I by the fast form; None for a removal.
        fast_second: Q by the fast form; None for a removal.
        exact_s: seconds of the closed form over the whole window, or of all removals together.
        fast_s: seconds of the fast form.
    """

    change: str
    lr: float
    seed: int
    window: int
    horizon: int
    first: float
    second: float
    effect: float
    fast_first: float | None
    fast_second: float | None
    exact_s: float
    fast_s: float | None


def measure_run(config: ProxyConfig, lr: float, seed: int) -> Iterator[Point]:
    """All points of one run.

    Raises:
        ConfigError: there are too few examples.
    """
    course = _Course(config, lr, seed)
    course.train(config.warm_steps)
    for window in range(config.num_windows):
        state, updates = course.reader.state(), course.reader.updates(max(*config.horizons, 1))
        place = _Place(course, state, updates)
        for point in (*_removals(place), *_selections(place)):
            yield dataclasses.replace(point, window=window)
        course.train(config.between)


class _Course:
    """A run that goes on when it is told to; deterministic, as scores are: dropout is off."""

    def __init__(self, config: ProxyConfig, lr: float, seed: int) -> None:
        problem = PROBLEMS[config.model.kind]
        self.config, self.lr, self.seed = config, lr, seed
        self.loss_fn: LossFn = problem.loss_fn
        dtype: torch.dtype = getattr(torch, config.precision)
        self.generator = torch.Generator().manual_seed(seed)
        examples = problem.examples(config.model)
        known = num_examples(examples)
        used = config.num_target + max(round(config.batch / keep) for keep in (*config.keeps, 1))
        if used > known:
            raise ConfigError(
                f"num_target + batch / keeps must be <= {known}, the examples there are, got "
                f"{used}; lower one of them"
            )
        order = torch.randperm(known, generator=self.generator)
        examples = {
            name: values.to(dtype) if values.is_floating_point() else values
            for name, values in take(examples, order).items()
        }
        self.target = take(examples, slice(config.num_target))
        self.rest = _spoiled(
            take(examples, slice(config.num_target, None)), config.noise, self.generator
        )
        torch.manual_seed(seed)
        self.model = problem.adapt(config.model, problem.build(config.model)).to(dtype).eval()
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr, config.betas, config.eps, config.weight_decay
        )
        self.reader = OptimizerReader(self.model, self.optimizer)
        self.derivatives = Derivatives(Objective(self.model, problem.loss_fn), "exact")

    def batch(self, size: int) -> Batch:
        """The next examples, none twice in a batch."""
        order = torch.randperm(num_examples(self.rest), generator=self.generator)
        return take(self.rest, order[:size])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss_fn(self.model, self.batch(self.config.batch)).mean().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class _Place:
    """A moment of a run, and the updates that follow."""

    course: _Course
    state: State
    updates: Sequence[Update]

    def point(self, change: str, horizon: int) -> Point:
        """A point without measurements."""
        lr, seed, nan = self.course.lr, self.course.seed, math.nan
        return Point(change, lr, seed, 0, horizon, nan, nan, nan, None, None, nan, None)


def _removals(place: _Place) -> Iterator[Point]:
    course, config = place.course, place.course.config
    batches = [course.batch(config.batch) for _ in place.updates]
    changes = removals(batches, range(config.num_removals))
    window = course.derivatives, place.updates, place.state, changes, course.target
    began = time.perf_counter()
    horizons = sorted(config.horizons)
    first, second = closed_form(*window, horizons)
    seconds = time.perf_counter() - began
    effect = effects(*window)
    for column, horizon in enumerate(horizons):
        for row in range(config.num_removals):
            yield dataclasses.replace(
                place.point("removal", horizon),
                first=float(first[row, column]),
                second=float(second[row, column]),
                effect=float(effect[row, horizon]),
                exact_s=seconds,
            )


def _selections(place: _Place) -> Iterator[Point]:
    course, config = place.course, place.course.config
    for keep in config.keeps:
        pools = [course.batch(round(config.batch / keep)) for _ in place.updates]
        orders = [torch.randperm(num_examples(pool), generator=course.generator) for pool in pools]
        nominal = [order[: config.batch] for order in orders]
        for horizon in config.horizons:
            num = max(horizon, 1)
            selected = _selected(place, pools[:num], nominal, horizon)
            change = selection(pools[:num], nominal[:num], selected)
            window = course.derivatives, place.updates[:num], place.state, change, course.target
            exact, fast = (
                probe(*window, method=method, horizons=(horizon,)) for method in ("exact", "fast")
            )
            yield _compared(place.point(f"keep {keep:g}", horizon), exact, fast)


def _compared(point: Point, exact: Proxy, fast: Proxy) -> Point:
    return dataclasses.replace(
        point,
        first=exact.first[0],
        second=exact.second[0],
        effect=exact.effect[0],
        fast_first=fast.first[0],
        fast_second=fast.second[0],
        exact_s=exact.seconds,
        fast_s=fast.seconds,
    )


def _selected(
    place: _Place, pools: Sequence[Batch], nominal: Sequence[Tensor], horizon: int
) -> list[Tensor]:
    """The B examples of each pool with the highest scores, by one look-ahead of this horizon."""
    course = place.course
    derivatives, size, found = course.derivatives, course.config.batch, dict[int, Tensor]()

    def keep(visit: SweepStep) -> None:
        gamma = place.updates[visit.index].masked(visit.gamma, visit.after)
        _, slopes = derivatives.directional(visit.state.params, gamma, pools[visit.index])
        found[visit.index] = slopes.argsort(stable=True)[:size]

    def read_target(end: State) -> Adjoint:
        _, grad = derivatives.gradient(end.params, course.target)
        return Adjoint(grad, end.exp_avg.zeros_like(), end.exp_avg_sq.zeros_like())

    if horizon == 0:
        ahead = immediate(derivatives, place.updates[0], place.state, course.target)
        slopes = derivatives.directional(place.state.params, ahead.sensitivities[0], pools[0])[1]
        return [slopes.argsort(stable=True)[:size]]
    window = Window(derivatives, place.updates[:horizon], lambda i, _: take(pools[i], nominal[i]))
    sweep(window, place.state, read_target, keep, capacity=horizon)
    return [found[index] for index in range(horizon)]


def _spoiled(examples: Batch, share: float, generator: torch.Generator) -> Batch:
    """A share of the examples with a wrong label, or with their tokens in random order."""
    num = num_examples(examples)
    chosen = torch.randperm(num, generator=generator)[: round(share * num)]
    name = "label" if "label" in examples else "input_ids"
    values = examples[name].clone()
    if name == "label":
        classes = int(values.max()) + 1
        shift = torch.randint(1, classes, chosen.shape, generator=generator)
        values[chosen] = (values[chosen] + shift) % classes
    else:
        for row in chosen.tolist():
            values[row] = values[row, torch.randperm(values.shape[1], generator=generator)]
    return {**examples, name: values}
