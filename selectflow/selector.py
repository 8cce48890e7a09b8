"""The selector: reads what is due, adapts the rate, looks ahead, scores and keeps, in `select`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from selectflow.control.controls import Controls
from selectflow.control.horizon import Horizon
from selectflow.control.interval import IntervalControl
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rollouts import Simulated
from selectflow.control.rules import AutoRate
from selectflow.control.state import Ongoing, TargetSet
from selectflow.core.batches import (
    Batch,
    PeekedPools,
    in_parts,
    num_examples,
    num_kept,
    take,
)
from selectflow.core.chunks import ChunkSize
from selectflow.core.counts import as_count
from selectflow.core.derivatives import Curvature
from selectflow.core.examples import ExampleGradients
from selectflow.core.exchange import keep_best
from selectflow.core.forms import Forms, Method
from selectflow.core.lookahead import NominalChoice, Weighting
from selectflow.core.passes import LossFn, Objective
from selectflow.core.storage import Offload
from selectflow.core.target import Cycle
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.wrappers import check_group
from selectflow.distributed import Group
from selectflow.options import SelectOptions, check_same, problems
from selectflow.strategies import STRATEGIES, Selection, Strategy
from selectflow.strategies.scorer import LiveScorer, Scorer
from selectflow.strategies.scoring import Scoring
from selectflow.strategies.training import plain_memory, restore_memory
from selectflow.strategies.weighting import Weighing, Weights, weighed

_log = logging.getLogger(__name__)


class Selector:
    """Keeps, of every candidate pool, the examples whose training lowers the target loss most.

    The model, its optimizer, scheduler, gradients, buffers, mode and all random generators are
    the same after a selection as before it, also when it raises. `lr="auto"` alone changes what
    the optimizer does.

    Args:
        model: the module that is trained, in any floating-point type.
        optimizer: its `torch.optim.AdamW`, `Adam` or `SGD`.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,), differentiable.
        target: batches of clean examples that define the goal, iterated again and again, one
            for each look-ahead: a list, a DataLoader, or any other iterable, with an end or not.
        lr_scheduler: stepped by the user once after every optimizer step; the look-ahead then
            follows the learning rates to come.
        max_grad_norm: what the user clips gradients to, by norm.
        seed: of the selector's own random numbers.
        num_steps: optimizer steps of the whole run, if known: under `horizon="auto"` no contest is
            then held that what is left of it could hardly repay.
        autocast: the type of the autocast that the user's loop opens around its own forward pass,
            `torch.bfloat16` or `torch.float16`: scoring then runs in it, too. One that is opened in
            loss_fn or around the selection is followed without a word.
        scorer: a small model that scores in this one's place, trained beside it; None: the model
            scores itself.

    Of several processes each gives its own pools and its share of the target, and the model as
    `DistributedDataParallel` or `fully_shard` made it. Each scores with its own buffers, such as
    running statistics.

    All other arguments are options, which `selectflow.options.SelectOptions` describes.

    Raises:
        TypeError: the optimizer or scheduler cannot be modelled.
        ValueError: an argument out of its range, a pattern that matches nothing; an optimizer
            with foreign parameters or state on another device than the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        target: Iterable[Batch],
        keep: int | float,
        horizon: int | Horizon | AutoHorizon | Literal["auto"] = 1,
        interval: int | Literal["auto"] = 1,
        strategy: str | Strategy = "influence",
        derivative: Method = "auto",
        curvature: Curvature = "exact",
        lr_scheduler: LRScheduler | None = None,
        max_grad_norm: float | None = None,
        seed: int = 0,
        *,
        lr: Literal["schedule", "auto"] | AutoRate = "schedule",
        nominal: NominalChoice = "random",
        scope: Literal["local", "global"] = "local",
        weighting: Weighting = "none",
        score_every: int = 1,
        params: Sequence[str] | None = None,
        score_view: Callable[[Batch], Batch] | None = None,
        pools_per_update: int = 1,
        chunk_size: ChunkSize = None,
        memory_gib: float | None = None,
        offload: Offload = "none",
        num_steps: int | None = None,
        autocast: torch.dtype | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        given = locals()
        names = SelectOptions.model_fields
        self.options = options = SelectOptions.checked(**{name: given[name] for name in names})
        if found := list(problems(dict(options))):
            raise ValueError("; ".join(found))
        seed = as_count("seed", seed, None)
        self.num_steps = None if num_steps is None else as_count("num_steps", num_steps, 1)
        horizon = options.horizon_for(scorer)
        self.state = state = options.begin(horizon, scorer, seed)
        self._objective = Objective(model, loss_fn, autocast)
        layout = self._objective.layout
        self._group, self._is_sharded = layout.group, layout.is_sharded
        check_group(layout, is_controlled=bool(state.horizon or state.rate or state.interval))
        self._optimizer = OptimizerReader(
            self._objective.model, optimizer, lr_scheduler, max_grad_norm
        )
        self._scorer: LiveScorer | None = None
        if scorer is not None:
            self._scorer = LiveScorer(
                scorer, loss_fn, self._objective, options.pools_per_update, seed
            )
        trained, scoring = self._simulated()
        scoring.policy.names()  # a pattern without a match is an error now, not at the first pool
        self._target = TargetSet(Cycle(target), score_view, state)
        self._controls = Controls(
            state, trained, scoring, self._target, horizon, self.num_steps, options.score_every
        )
        objective = scoring.policy.derivatives.objective
        self._scoring = Scoring(
            state,
            scoring.policy,
            scoring.optimizer,
            ExampleGradients(objective, options.chunk_size, memory_gib),
            self._target,
            self._controls.horizon,
            IntervalControl(state.interval, trained, scoring) if state.interval else None,
        )
        self._weighing = Weighing(options.weighting, self._optimizer.params)
        self._strategy = strategy if callable(strategy) else STRATEGIES[strategy]
        self._saved_options = options.plain() | {"seed": seed}
        self.last: Selection | None = None
        self._is_agreed = self._group.size == 1

    def _simulated(self) -> tuple[Simulated, Simulated]:
        """The model that is trained, and the one that scores: the same, or its scorer."""
        state, scorer = self.state, self._scorer
        made = partial(self.options.simulated, partial(self.options.interval_at, state))
        if scorer is None:
            itself = made(self._objective, self._optimizer, state.forms)
            return itself, itself
        scoring = made(
            scorer.objective, scorer.optimizer, state.forms, is_frozen=scorer.scorer.is_frozen
        )
        return made(self._objective, self._optimizer, Forms()), scoring

    # --- selecting ------------------------------------------------------------------------

    def stream(self, pools: Iterable[Batch]) -> Iterator[Batch]:
        """Selected batches, one for each pool, in the pools' order.

        While control finds that plain training gains more in the same time (`horizon="auto"`), each
        pool is handed out whole, in batches of about as many examples as are kept else. Pools that
        a look-ahead peeks at are handed out later, in order: none is lost or used twice. Where a
        stream is left early, the next one begins with what was not handed out, unless
        `state.rest.clear()` and `state.peeked.clear()` drop it. The optimizer is read when the next
        batch is asked for.

        Args:
            pools: batches of P >= keep candidates; may be endless. Of several processes each gives
                its own, and as many as the others.

        Yields:
            Batches of the pools' type with the kept examples, best first.
        """
        if isinstance(pools, Sized):  # a process that ran out early would leave the others waiting
            self._group.check_same("pools of the stream", len(pools))
        yield from self.rest()
        source = PeekedPools(pools, self.state.peeked)
        follow = getattr(pools, "follow", None)  # of a stream whose shares may be live
        for pool in source:
            batch = self.select(pool, source.upcoming())
            if follow is not None:
                follow(self.last)
            yield batch
            yield from self.rest()

    def rest(self) -> Iterator[Batch]:
        """What is left to train on of the last pool: nothing, unless it is not selected from."""
        while self.state.rest:
            yield self._next_part()

    def select(self, pool: Batch, upcoming: Iterable[Batch] = ()) -> Batch:
        """The part of one pool to train on now.

        While nothing is selected it is a random part, and `rest` has the others; without it they
        are not trained on.

        Args:
            pool: P >= keep candidates.
            upcoming: the pools that follow it, for horizons above 1; as many as are needed are
                drawn, and only when a look-ahead is due. Where they end, so does the look-ahead.

        Returns:
            The kept examples, best first; `last` has the indices, scores and costs.

        Raises:
            ValueError: the pool is smaller than keep, its leaves disagree in length, the target
                is empty, or loss_fn or the strategy returns a wrong shape; a step was taken
                without the weights of its batch.
            FloatingPointError: a loss, derivative or score is not finite; names the optimizer
                step and the examples.
        """
        state = self.state
        state.rest.clear()
        ongoing = Ongoing(pool, iter(upcoming), self.options.score_view)
        scores: Tensor | None = None
        size_kept = num_kept(self.options.keep, num_examples(pool))
        with self._deciding(ongoing):
            if not self._is_agreed:
                self._agree(size_kept)
            self._controls.adapt_rate(ongoing)
            self._controls.decide_horizon(ongoing, size_kept, self._scoring.is_due)
            if self._controls.is_off:
                state.ahead, num = None, num_examples(pool) // size_kept
                state.rest.extend(in_parts(pool, self._group.least(num), state.generator))
            elif ongoing.step % self.options.score_every == 0:
                self._controls.check_scorer(ongoing)
                scores = self._scores(ongoing)
        if state.rest:
            return self._handed_out(ongoing, state.rest.popleft())
        indices, kept = self._keep(scores, size_kept, ongoing)
        judged = torch.zeros(size_kept, device="cpu") if scores is None else scores[indices]
        weights = self._weighing.weights(judged, ongoing.step)
        if self._scorer is not None:
            self._scorer.train_on(weighed(kept, weights))
        return self._noted(ongoing, pool, kept, indices, scores, weights)

    def _next_part(self) -> Batch:
        """The next part of a pool that is not selected from."""
        part = self.state.rest[0]
        ongoing = Ongoing(part)
        with self._deciding(ongoing):
            self._controls.adapt_rate(ongoing)
        return self._handed_out(ongoing, self.state.rest.popleft())

    def _handed_out(self, ongoing: Ongoing, part: Batch) -> Batch:
        """A part of a pool, of which nothing is known."""
        indices = torch.arange(num_examples(part), device="cpu")
        weights = self._weighing.weights(torch.zeros(len(indices), device="cpu"), ongoing.step)
        return self._noted(ongoing, part, part, indices, None, weights)

    @contextmanager
    def _deciding(self, ongoing: Ongoing) -> Iterator[None]:
        """Between two steps of the user's loop; errors name the optimizer updates made."""
        with self._objective.placed():
            ongoing.step = self.state.num_steps = self._optimizer.num_steps()
            self._weighing.check(ongoing.step)
            self._controls.enter(ongoing.step)
            ongoing.began = time.perf_counter()
            try:
                yield
            except FloatingPointError as error:
                raise FloatingPointError(f"at optimizer step {ongoing.step}: {error}") from error

    def _noted(
        self,
        ongoing: Ongoing,
        pool: Batch,
        kept: Batch,
        indices: Tensor,
        scores: Tensor | None,
        weights: Weights | None,
    ) -> Batch:
        """A batch to train on, once `last` says what it is."""
        state = self.state
        ahead = None if scores is None else state.ahead
        self.last = Selection(
            pool=pool,
            indices=indices,
            scores=scores,
            losses=ongoing.losses,
            step=ongoing.step,
            horizon=ahead.horizon if ahead else None,
            age=ongoing.step - state.ahead_step if ahead else 0,
            target_loss=ahead.target_loss if ahead else None,
            lr_multiplier=self._optimizer.lr_multiplier,
            decisions=tuple(ongoing.decisions),
            lookahead_s=ongoing.lookahead_s,
            control_s=ongoing.control_s,
            score_error=state.forms.errors.get("losses"),
            seconds=time.perf_counter() - ongoing.began,
            is_ranked=scores is not None
            and not ongoing.is_zero
            and self.options.strategy != "uniform",
            scorer_loss=self._scorer.loss if self._scorer else None,
            scorer_gain=ongoing.scorer_gain,
            interval=state.interval.interval if state.interval and ahead else None,
            weighing=weights,
        )
        self._controls.leave(weighed(kept, weights))
        return kept

    def _scores(self, ongoing: Ongoing) -> Tensor:
        """Score of each candidate, shape (P,); found anew once failed steps are taken back."""
        # What one process takes back, all take back.
        agreeing = self._group.together if self._controls.has_rate else nullcontext
        while True:
            try:
                with agreeing():
                    return self._scoring.scores(self._strategy, ongoing)
            except FloatingPointError as error:
                if self._scorer is not None:
                    raise FloatingPointError(f"of the scorer, {error}") from error
                if not self._controls.has_slowed(ongoing, self._scoring.losses):
                    raise

    def _keep(self, scores: Tensor | None, size: int, ongoing: Ongoing) -> tuple[Tensor, Batch]:
        """Positions in the pool that are kept, best first, and the batch to train on."""
        is_apart = self.options.scope == "local" or self._group.size == 1
        if scores is None:  # any, in the pool's order, by which a ledger tells it
            num = num_examples(ongoing.pool)
            order = torch.randperm(num, generator=self.state.generator, device="cpu")
            indices = order[:size].sort().values
        elif ongoing.is_zero:  # no example is better: any
            order = torch.randperm(len(scores), generator=self.state.generator, device="cpu")
            scores = scores.cpu()[order]
            indices = order[scores.argsort(descending=True, stable=True)][:size]
        elif is_apart:  # of equal scores the first
            indices = scores.argsort(descending=True, stable=True)[:size]
        else:  # scores go to all processes, by way of the host
            return keep_best(self._group, ongoing.pool, scores, size)
        return indices, take(ongoing.pool, indices)

    def _agree(self, size_kept: int) -> None:
        """Refuse, in all processes, what would make them go apart; once."""
        params, reader = self._optimizer.params(), self._optimizer
        alike = {
            "selector options": self.options.plain(),
            "trained parameters": {name: tuple(param.shape) for name, param in params.items()},
            "optimizer updates": {
                f"group {index}": vars(rule) | {"names": len(rule.names)}
                for index, rule in enumerate(reader.updates(1)[0].rules)
            },
            "examples kept of a pool": size_kept,
            "num_steps": self.num_steps,
            "batches of the target": self._target.cycle.num_batches,
        }
        # kinds of devices may round a norm apart
        if not self._is_sharded:
            alike["values of the parameters, by norm,"] = f"{reader.values().norm():.5e}"
        if self._scorer is not None:
            with self._scorer.objective.summing():
                norm = self._scorer.optimizer.values().norm()
            alike["values of the scorer's parameters, by norm,"] = f"{norm:.5e}"
        for what, value in alike.items():
            self._group.check_same(what, value)
        self._is_agreed = True

    @property
    def forms(self) -> dict[str, str]:
        """Which form, "exact" or "central", the derivatives of losses and of gradients have.

        With `derivative="auto"` each is decided at its first use, and checked again now and then.
        """
        return dict(self.state.forms.decided)

    # --- state ----------------------------------------------------------------------------

    @property
    def group(self) -> Group:
        """The processes that train the model together; this one alone where there are no more."""
        return self._group

    @property
    def max_peeked(self) -> int:
        """Pools of the longest look-ahead there will be; no more are ever peeked at."""
        return self._controls.max_peeked

    @property
    def num_peeked(self) -> int:
        """Pools that were drawn from the stream and not yet handed out."""
        return len(self.state.peeked)

    def state_dict(self, *, with_peeked: bool = True) -> dict[str, Any]:
        """All that the next selections depend on; `torch.save` it with model and optimizer.

        Args:
            with_peeked: whether the pools that were peeked at and not yet handed out are part of
                it. The source of pools is then resumed after the last one it gave; without them,
                `num_peeked` pools earlier.

        Returns:
            What `torch.load` takes by its default, batches in the form of `core.plain`.
        """
        with self._objective.placed():
            self.state.num_steps = self._optimizer.num_steps()
        state = self.state.plain(with_peeked=with_peeked)
        memory = plain_memory(self._scoring.memory)
        scorer = self._scorer and self._scorer.plain()
        return {"options": self._saved_options, "memory": memory, "scorer": scorer, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, with the model and optimizer of that moment.

        The target must yield the same batches in the same order: not at random, as a shuffling
        loader does.

        Raises:
            ValueError: the state is of a selector with other options, or of another model; a type
                of its batches is not imported yet.
        """
        check_same(state["options"], self._saved_options)
        if (state.get("scorer") is None) != (self._scorer is None):
            got = "one here" if self._scorer else "one in the saved state"
            raise ValueError(f"a scorer must be in both the saved state and here, got {got} alone")
        if self._scorer is not None:
            self._scorer.load(state["scorer"])
        with self._objective.placed():
            params, scored = self._optimizer.values(), self._scoring.optimizer.values()
            names = self._scoring.policy.names()
        self.state.load(state, params, scored if names is None else scored.pick(names))
        restore_memory(self._scoring.memory, state.get("memory", {}), scored)
        self._optimizer.resume_at(self.state.num_steps)
        self._weighing.forget()
        if self.state.rate is not None:
            self._optimizer.lr_multiplier = self.state.rate.rule.multiplier
