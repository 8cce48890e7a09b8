"""A recorded run's choices, trained on again without scoring anything."""

from __future__ import annotations

import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selectflow.core.batches import Batch, device_of, num_examples, take
from selectflow.core.plain import plain, restored
from selectflow.core.weighted import relu_weights
from selectflow.run.ledger import last_step, num_writers, read_parts, read_stream
from selectflow.run.log import read_decisions
from selectflow.run.yaml import read_yaml
from selectflow.strategies import Selection, Weights


class ReplayError(ValueError):
    """A run that cannot be replayed here; the message names the difference."""


class Choice(NamedTuple):
    """What the ledger says of one step.

    Attributes:
        step: the optimizer step, from 1.
        keys: of its pool, in the pool's order.
        indices: places in the pool that were kept, best first, as they were trained on.
        scores: of the pool, float64; None where nothing was selected: then any were kept, or the
            keys are those of a part of the pool, which was trained on whole.
    """

    step: int
    keys: list[str]
    indices: Tensor
    scores: Tensor | None


def read_choices(
    run_dir: str | Path, after: int = 0, num_pools: int = 1, rank: int | None = None
) -> Iterator[Choice]:
    """The choices of a run, step by step, pool by pool.

    Args:
        after: the first one is that of step `after` + 1.
        num_pools: pools of a step, all of one size.
        rank: of the process that chose; None: all of them.

    Raises:
        LedgerError: there is none, or a part cannot be read.
        ReplayError: a step cannot be of that many pools.
    """
    for part in read_parts(run_dir, ["step", "key", "score", "kept"], rank):
        steps = part["step"].to_numpy()
        starts = np.flatnonzero(np.diff(steps, prepend=0))
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            if steps[start] <= after:
                continue
            size, left = divmod(int(end - start), num_pools)
            if left:
                raise ReplayError(
                    f"select.pools_per_update must be that of the run in {run_dir}, got "
                    f"{num_pools}, which do not make up the {end - start} candidates of step "
                    f"{steps[start]}"
                )
            for place in range(num_pools):
                yield _choice(int(steps[start]), part.slice(start + place * size, size))


def _choice(step: int, rows: Any) -> Choice:
    kept = torch.tensor(rows["kept"].to_numpy()).nonzero().flatten()
    if rows["score"].null_count:
        return Choice(step, rows["key"].to_pylist(), kept, None)
    scores = torch.tensor(rows["score"].to_numpy())
    order = scores[kept].argsort(descending=True, stable=True)  # as the selector does
    return Choice(step, rows["key"].to_pylist(), kept[order], scores)


class Replay:
    """Hands out the part of each pool that a recorded run trained on.

    A run uses it in place of a `Selector`. It gives the same batches in the same order, as long as
    it gets the same pools.

    Args:
        run_dir: the recorded run.
        steps: optimizer steps that are wanted of it.
        stream: what the pools here depend on, as `PoolStream.identity`; {} where it is not known.
        pools_per_update: pools of a step, all of one size; as many as the run had.
        rank: of this process, which trains on what that of this rank kept.
        size: processes that train; as many as the run had.

    Raises:
        LedgerError: it has no ledger, or a part cannot be read.
        ReplayError: it was of other pools or in another number of processes, or did not come as
            far.

    Warns:
        UserWarning: the controller changed its learning rate, which a replay does not repeat.
    """

    def __init__(
        self,
        run_dir: str | Path,
        steps: int,
        stream: Mapping[str, Any],
        pools_per_update: int = 1,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._run_dir, self._step, self._num_pools = run_dir, 0, pools_per_update
        self._rank, select = rank, _select_of(run_dir)
        self._is_ranked = select.get("strategy") != "uniform"
        self._weighs = select.get("weighting", "none") == "relu"
        sizes = num_writers(run_dir)
        if sizes and sizes != {size}:
            there = " and then ".join(map(str, sorted(sizes)))
            raise ReplayError(
                f"a replay must be in as many processes as the run in {run_dir}, {there}, got "
                f"{size}; start as many by torchrun, or replay a run that had one number of them"
            )
        if size > 1:
            _check_equal(run_dir, size)
        _check_same(run_dir, read_stream(run_dir, rank), stream)
        if steps > (recorded := last_step(run_dir)):
            raise ReplayError(
                f"steps must be <= {recorded}, the steps recorded in {run_dir}, got {steps}; "
                "train for fewer"
            )
        if any(made.what == "lr_multiplier" and made.moved for made in read_decisions(run_dir)):
            warnings.warn(
                f"the controller changed the learning rate of the run in {run_dir}: a replay "
                "trains on the same samples at the rates of its own schedule: its weights differ",
                stacklevel=2,
            )
        self.last: Selection | None = None
        self._rest: deque[tuple[int, Batch]] = deque()  # steps, and what they train on
        self._choices: Iterator[Choice] | None = None  # of the steps after `_step`

    def select(self, pool: Batch, upcoming: Iterable[Batch] = ()) -> Batch:
        """The part of a pool that the recorded run trained on.

        Args:
            pool: a mapping with a list "key": the one that the recorded run had.
            upcoming: the pools that follow it, which a replay does not need.

        Raises:
            ReplayError: the pool is another than the recorded one; names the step.
        """
        del upcoming
        began = time.perf_counter()
        choice = self._next_choice()
        assert choice is not None
        if choice.scores is None and len(choice.indices) == len(choice.keys):
            self._rest.extend(self._parts(pool, choice))
            return next(self.rest())
        _check_pool(self._run_dir, choice, pool["key"])
        batch = take(pool, choice.indices)
        self._note(choice.step, pool, choice.indices, choice.scores, began)
        return batch

    def rest(self) -> Iterator[Batch]:
        """What is left to train on of the last pool: nothing, unless it was not selected from."""
        while self._rest:
            began = time.perf_counter()
            step, part = self._rest.popleft()
            self._note(step, part, torch.arange(num_examples(part)), None, began)
            yield part

    def _parts(self, pool: Batch, choice: Choice | None) -> Iterator[tuple[int, Batch]]:
        """The steps that trained on a pool, and the part of it that each had."""
        places: dict[str, list[int]] = {}
        for place, key in enumerate(pool["key"]):
            places.setdefault(key, []).insert(0, place)
        left = num_examples(pool)
        while left and choice is not None:
            try:
                indices = [places[key].pop() for key in choice.keys]
            except LookupError:
                _check_pool(self._run_dir, choice, pool["key"])
                raise
            yield choice.step, take(pool, torch.tensor(indices))
            left -= len(indices)
            choice = self._next_choice() if left else None

    def _next_choice(self) -> Choice | None:
        """The one after those that were read; None at the end of the recorded run."""
        if self._choices is None:
            choices = read_choices(self._run_dir, self._step, self._num_pools, self._rank)
            self._choices = islice(choices, len(self._rest), None)
        return next(self._choices, None)

    def _note(
        self, step: int, pool: Batch, indices: Tensor, scores: Tensor | None, began: float
    ) -> None:
        self._step, weights = step, None
        if self._weighs:  # as those of the run: both are made of its scores in float64
            weights = relu_weights(indices.double() * 0 if scores is None else scores[indices])
        self.last = Selection(
            pool=pool,
            indices=indices,
            scores=scores,
            losses=None,
            step=step - 1,
            horizon=None,
            age=0,
            target_loss=None,
            lookahead_s=0.0,
            seconds=time.perf_counter() - began,
            is_ranked=self._is_ranked and scores is not None and bool((scores != scores[0]).any()),
            weighing=None if weights is None else Weights(weights.to(device_of(pool))),
        )

    def state_dict(self, *, with_peeked: bool = True) -> dict[str, Any]:
        """How far it has come, and what is left of its pool; it peeks at no pools."""
        del with_peeked
        return {"step": self._step, "rest": [(step, plain(part)) for step, part in self._rest]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`."""
        self._step, self._choices = state["step"], None
        self._rest = deque((step, restored(part)) for step, part in state["rest"])


def _select_of(run_dir: str | Path) -> Mapping[str, Any]:
    """How a recorded run, or the one that it replayed, selected; {} where that is not known."""
    path: str | Path | None = run_dir
    select: Mapping[str, Any] = {}
    while path is not None:
        config = Path(path, "config.yaml")
        select = read_yaml(config).get("select", {}) if config.is_file() else {}
        path = select.get("replay")
    return select


def _check_equal(run_dir: str | Path, size: int) -> None:
    """Refuse a run whose processes kept different numbers of their own pools: weights would differ.

    Raises:
        ReplayError: names the first such step.
    """
    lanes = [read_parts(run_dir, ["step", "kept"], rank) for rank in range(size)]
    counts = [Counter[int]() for _ in lanes]
    for count, parts in zip(counts, lanes, strict=True):
        for part in parts:
            count.update(part.filter(part["kept"])["step"].to_pylist())
    for step in sorted(set().union(*counts)):
        kept = [count[step] for count in counts]
        if len(set(kept)) > 1:
            raise ReplayError(
                f"a run must have kept as many examples of each process's pool to be replayed, got "
                f"{kept} at step {step} of the run in {run_dir} (select.scope: global, or samples "
                "that were lost); replay one with select.scope=local"
            )


def _check_same(run_dir: str | Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [
        f"{name}: {theirs[name]!r} there, {ours[name]!r} here"
        for name in theirs
        if name in ours and theirs[name] != ours[name]  # custom pools need not say
    ]
    if differing:
        listed = ", ".join(differing)
        raise ReplayError(
            f"a replay must have the pools of the run in {run_dir}, got {listed}; use its dataset, "
            "pool size and seed"
        )


def _check_pool(run_dir: str | Path, choice: Choice, keys: list[str]) -> None:
    if keys == choice.keys:
        return
    pairs = zip(choice.keys, keys, strict=False)
    place = next((i for i, (theirs, ours) in enumerate(pairs) if theirs != ours), None)
    what = (
        f"{len(keys)} candidates instead of {len(choice.keys)}"
        if place is None
        else f"{keys[place]!r} instead of {choice.keys[place]!r} at place {place}"
    )
    raise ReplayError(
        f"the pool of step {choice.step} must be the one recorded in {run_dir}, got {what}; use "
        "its dataset, pool size and seed"
    )
