"""The selector: reads what is due, adapts the rate, looks ahead, scores and keeps, in `select`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from selectflow.control.contests import HorizonControl, HorizonState, halves
from selectflow.control.horizon import Horizon, as_horizon
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rate import RateControl, RateState
from selectflow.control.rules import AutoRate, Decision, RateRule
from selectflow.control.state import SelectorState
from selectflow.core.batches import (
    Batch,
    PeekedPools,
    in_parts,
    num_examples,
    num_kept,
    take,
    through,
)
from selectflow.core.chunks import ChunkSize
from selectflow.core.counts import as_count
from selectflow.core.derivatives import Curvature, Derivatives
from selectflow.core.examples import ExampleGradients
from selectflow.core.exchange import keep_best
from selectflow.core.forms import Forms, Method
from selectflow.core.lookahead import NominalChoice, Policy, Upcoming
from selectflow.core.params import Params, scored_names
from selectflow.core.passes import LossFn, Objective
from selectflow.core.storage import Offload
from selectflow.core.target import Cycle
from selectflow.core.torch_optim import OptimizerReader
from selectflow.core.wrappers import check_group
from selectflow.distributed import Group
from selectflow.options import SelectOptions, check_same
from selectflow.strategies import STRATEGIES, Candidates, Selection, Strategy, checked_scores
from selectflow.strategies.training import Memory, Training, plain_memory, restore_memory

# Look-aheads, or steps without, between two checks that central differences still agree.
_RECHECK_EVERY = 100

_log = logging.getLogger(__name__)


@dataclass
class _Found:
    """What the selection of one pool found on its way.

    Attributes:
        step: optimizer updates made.
        began: when, by the clock.
        losses: of the candidates, where the strategy needed them.
        upcoming: pools after the present one that were drawn for a look-ahead, in order.
        is_ahead: whether a look-ahead is under way.
        is_zero: whether the sensitivity is 0, so that no example is better than another.
        lookahead_s: seconds of the look-ahead.
        control_s: seconds of the controller.
        decisions: of the controller.
    """

    step: int = 0
    began: float = 0.0
    losses: Tensor | None = None
    upcoming: list[Batch] = field(default_factory=list)
    is_ahead: bool = False
    is_zero: bool = False
    lookahead_s: float = 0.0
    control_s: float = 0.0
    decisions: list[Decision] = field(default_factory=list)


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
        autocast: the type of the autocast that the user's loop opens around its own forward pass,
            `torch.bfloat16` or `torch.float16`: scoring then runs in it, too. One that is opened in
            loss_fn or around the selection is followed without a word.

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
        interval: int = 1,
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
        params: Sequence[str] | None = None,
        score_view: Callable[[Batch], Batch] | None = None,
        pools_per_update: int = 1,
        chunk_size: ChunkSize = None,
        memory_gib: float | None = None,
        offload: Offload = "none",
        autocast: torch.dtype | None = None,
    ) -> None:
        given = locals()
        names = SelectOptions.model_fields
        self.options = options = SelectOptions.checked(**{name: given[name] for name in names})
        horizon = AutoHorizon() if options.horizon == "auto" else options.horizon
        if isinstance(horizon, AutoHorizon) and options.strategy != "influence":
            horizon = replace(horizon, off=False)  # contests know no other strategy
        seed = as_count("seed", seed, None)
        if options.lr == "auto":
            lr = AutoRate()
        self.state = state = SelectorState(
            torch.Generator().manual_seed(seed),
            Forms(),
            HorizonState.begin(horizon, seed) if isinstance(horizon, AutoHorizon) else None,
            RateState(RateRule(lr)) if isinstance(lr, AutoRate) else None,
        )
        self._objective = Objective(model, loss_fn, autocast)
        layout = self._objective.layout
        self._group, self._is_sharded = layout.group, layout.is_sharded
        check_group(layout, is_controlled=bool(state.horizon or state.rate))
        self._derivatives = Derivatives(
            self._objective, derivative, options.chunk_size, memory_gib, state.forms
        )
        self._optimizer = OptimizerReader(
            self._objective.model, optimizer, lr_scheduler, max_grad_norm
        )
        self._examples = ExampleGradients(self._objective, options.chunk_size, memory_gib)
        self._scored_names()  # a pattern without a match is an error now, not at the first pool
        self._target = Cycle(target)
        self._memory: dict[str, Memory] = {}  # of the strategy
        self._strategy = strategy if callable(strategy) else STRATEGIES[strategy]
        self._policy = Policy(
            self._derivatives,
            self._scored_names,
            options.keep,
            options.interval,
            curvature,
            nominal,
            options.pools_per_update,
            score_view,
            memory_gib,
            offload,
        )
        self._contests: HorizonControl | None = None
        if state.horizon is not None:
            self._contests = HorizonControl(state.horizon, self._policy, self._optimizer)
        self._horizon: Horizon = self._contests or as_horizon(horizon)  # type: ignore[arg-type]
        self._rate: RateControl | None = None
        if state.rate is not None:
            self._rate = RateControl(
                state.rate,
                self._optimizer,
                self._derivatives,
                self._next_target,
                options.pools_per_update,
            )
        self._saved_options = options.plain() | {"seed": seed}
        self.last: Selection | None = None
        self._is_zero_said = False
        self._is_agreed = self._group.size == 1

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
                is empty, or loss_fn or the strategy returns a wrong shape.
            FloatingPointError: a loss, derivative or score is not finite; names the optimizer
                step and the examples.
        """
        state, found = self.state, _Found()
        state.rest.clear()
        size_kept = num_kept(self.options.keep, num_examples(pool))
        seen, pools = through(self.options.score_view, pool), iter(upcoming)
        with self._deciding(found) as step, _naming(step):
            if not self._is_agreed:
                self._agree(size_kept)
            self._adapt_rate(step, found)
            if self._control_horizon(pool, pools, step, found):
                state.ahead, num = None, num_examples(pool) // size_kept
                state.rest.extend(in_parts(pool, self._group.least(num), state.generator))
            else:
                scores = self._scores(pool, seen, pools, step, found)
        if state.rest:
            return self._handed_out(state.rest.popleft(), found)
        indices, kept = self._keep(pool, scores, size_kept, found)
        return self._noted(pool, kept, indices, scores, found)

    def _next_part(self) -> Batch:
        """The next part of a pool that is not selected from."""
        found = _Found()
        with self._deciding(found) as step, _naming(step):
            self._adapt_rate(step, found)
        return self._handed_out(self.state.rest.popleft(), found)

    def _handed_out(self, part: Batch, found: _Found) -> Batch:
        """A part of a pool, of which nothing is known."""
        indices = torch.arange(num_examples(part), device="cpu")
        return self._noted(part, part, indices, None, found)

    @contextmanager
    def _deciding(self, found: _Found) -> Iterator[int]:
        """Between two steps of the user's loop; gives the optimizer updates made."""
        with self._objective.placed():
            found.step = step = self.state.num_steps = self._optimizer.num_steps()
            if self._contests is not None:
                self._contests.enter(step)
            found.began = time.perf_counter()
            yield step

    def _noted(
        self, pool: Batch, kept: Batch, indices: Tensor, scores: Tensor | None, found: _Found
    ) -> Batch:
        """A batch to train on, once `last` says what it is."""
        state = self.state
        if self._rate is not None:
            self._rate.trained_on(kept)
        self.last = Selection(
            pool=pool,
            indices=indices,
            scores=scores,
            losses=None if found.losses is None else found.losses.cpu(),
            step=found.step,
            horizon=state.ahead.horizon if state.ahead else None,
            age=found.step - state.ahead_step if state.ahead else 0,
            target_loss=state.ahead.target_loss if state.ahead else None,
            lr_multiplier=self._optimizer.lr_multiplier,
            decisions=tuple(found.decisions),
            lookahead_s=found.lookahead_s,
            control_s=found.control_s,
            score_error=state.forms.errors.get("losses"),
            seconds=time.perf_counter() - found.began,
            is_ranked=scores is not None
            and not found.is_zero
            and self.options.strategy != "uniform",
        )
        if self._contests is not None:
            self._contests.leave()
        return kept

    def _scores(
        self, pool: Batch, seen: Batch, upcoming: Iterator[Batch], step: int, found: _Found
    ) -> Tensor:
        """What the strategy gives each candidate, shape (P,); again after a step taken back."""
        candidates = Candidates(
            pool,
            num_examples(pool),
            losses=partial(self._losses, seen, found),
            influence=partial(self._influence, pool, seen, upcoming, step, found),
            slopes=partial(self._slopes, seen, step, found),
            generator=self.state.generator,
            training=Training(
                seen,
                self._derivatives,
                self._examples,
                self._optimizer,
                self._scored_names(),
                self._next_target,
                self._target,
                self.options.score_view,
                self._memory,
            ),
        )
        # What one process takes back, all take back.
        agreeing = nullcontext if self._rate is None else self._group.together
        while True:
            try:
                with agreeing():
                    return checked_scores(self._strategy(candidates), candidates.size, pool)
            except FloatingPointError:
                if not self._has_slowed(seen, step, found):
                    raise

    def _keep(self, pool: Batch, scores: Tensor, size: int, found: _Found) -> tuple[Tensor, Batch]:
        """Positions in the pool that are kept, best first, and the batch to train on."""
        indices = self._best_first(scores, found)[:size]
        if self.options.scope == "local" or self._group.size == 1 or found.is_zero:
            return indices, take(pool, indices)
        return keep_best(self._group, pool, scores, size)

    def _best_first(self, scores: Tensor, found: _Found) -> Tensor:
        """Positions by falling score; of equal ones the first, or any where all are 0."""
        order = torch.arange(len(scores), device="cpu")
        if found.is_zero:
            order = torch.randperm(len(scores), generator=self.state.generator, device="cpu")
        return order[scores[order].argsort(descending=True, stable=True)]

    def _losses(self, seen: Batch, found: _Found) -> Tensor:
        """Loss of each candidate at the present parameters."""
        if found.losses is None:
            with self._objective.scoring():
                params = self._optimizer.values()
                found.losses = self._derivatives.losses(params, seen)
        return found.losses

    def _slopes(self, seen: Batch, step: int, found: _Found, direction: Params) -> Tensor:
        """Derivative of the loss of each candidate along a direction."""
        if step % _RECHECK_EVERY == 0:
            self.state.forms.recheck()
        with self._objective.scoring():
            params = self._optimizer.values()
            found.losses, slopes = self._derivatives.directional(params, direction, seen)
        return slopes

    def _influence(
        self, pool: Batch, seen: Batch, upcoming: Iterator[Batch], step: int, found: _Found
    ) -> Tensor:
        """-gamma . grad loss of each candidate, after a look-ahead where one is due."""
        self._contest(pool, upcoming, step, found)
        params, state = self._optimizer.values(), self.state
        is_due = not state.serves(step, self._scored_names() or params)
        num = self._horizon.at(step) if is_due else 0
        pools = self._drawn(pool, upcoming, num, found)
        with self._objective.scoring():
            if is_due:
                self._look_ahead(step, pools, found)
            assert state.ahead is not None
            gamma = state.ahead.gamma(step - state.ahead_step)
            found.is_zero = state.ahead.is_zero(step - state.ahead_step)
            found.losses, slopes = self._derivatives.directional(params, gamma, seen)
        return -slopes

    def _drawn(
        self, pool: Batch, upcoming: Iterator[Batch], num_updates: int, found: _Found
    ) -> list[Batch]:
        """The pools of the next updates, the present one first, as far as they last."""
        # The user's stream is drawn from outside of `scoring`, which would undo its randomness.
        num = max(0, num_updates * self.options.pools_per_update - 1)
        found.upcoming += islice(upcoming, max(0, num - len(found.upcoming)))
        if num:  # all look ahead as far as the shortest stream lasts
            num = self._group.least(min(num, len(found.upcoming)))
        return [pool, *found.upcoming[:num]]

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
            "batches of the target": self._target.num_batches,
        }
        if not self._is_sharded:
            # kinds of devices may round a norm apart
            alike["values of the parameters, by norm,"] = f"{reader.values().norm():.5e}"
        for what, value in alike.items():
            self._group.check_same(what, value)
        self._is_agreed = True

    # --- looking ahead --------------------------------------------------------------------

    def _look_ahead(self, step: int, pools: Sequence[Batch], found: _Found) -> None:
        """Find the sensitivities of the next steps."""
        began, state, horizon = time.perf_counter(), self.state, self._horizon.at(step)
        target = self._next_target()
        state.ahead = None  # its memory is of use now; should this fail, the next call looks ahead
        found.is_ahead = horizon > 0
        if state.num_lookaheads % _RECHECK_EVERY == 0:
            state.forms.recheck()
        updates, now = self._optimizer.updates(max(1, horizon)), self._optimizer.state()
        ahead = self._policy.look_ahead(
            horizon, Upcoming(updates, now, pools, target), state.generator
        )
        # At a learning rate of 0, as where a warm-up begins, no example does anything. The steps
        # that follow are to have sensitivities of their own.
        is_zero = not any(ahead.norms)
        if is_zero:
            self._note_zero(max(rule.lr for update in updates for rule in update.rules))
        state.has_ranked |= not is_zero
        state.ahead, state.ahead_step, found.is_ahead = ahead, step, False
        state.ahead_serves = 1 if is_zero else self.options.interval
        state.num_lookaheads += 1
        found.lookahead_s = time.perf_counter() - began

    def _note_zero(self, lr: float) -> None:
        """Say, once, why no example is preferred, or raise where it must be a mistake."""
        if lr > 0 and not self.state.has_ranked:
            raise ValueError(
                f"the target loss must depend on the training, got sensitivities that are all 0 at "
                f"a learning rate of {lr:.3g}; check that loss_fn uses the model's trained "
                "parameters (no detach, no no_grad), that `params` leaves some that it uses, and "
                "that the target loss is not flat"
            )
        why = "the target loss is flat here" if lr > 0 else "the learning rate is 0"
        if not self._is_zero_said:
            _log.warning("%s: no example is better than another, and any are kept", why)
        self._is_zero_said = True

    def _scored_names(self) -> tuple[str, ...] | None:
        return scored_names(self.options.params, self._optimizer.params(), self._objective.model)

    def _next_target(self) -> Batch:
        """The next batch of the target set, as it is scored."""
        batch, self.state.target_position = self._target.draw(self.state.target_position)
        return through(self.options.score_view, batch)

    @property
    def forms(self) -> dict[str, str]:
        """Which form, "exact" or "central", the derivatives of losses and of gradients have.

        With `derivative="auto"` each is decided at its first use, and checked again now and then.
        """
        return dict(self.state.forms.decided)

    # --- controlling ----------------------------------------------------------------------

    def _adapt_rate(self, step: int, found: _Found) -> None:
        """Let the learning-rate control judge the steps so far."""
        if self._rate is None:
            return
        began = time.perf_counter()
        decision, replaced = self._rate.before(step)
        if replaced:
            self.state.ahead = None  # it was of the steps that were taken back
            if self._contests is not None:
                self._contests.alarm()
        _note(found, decision, step, began)

    def _has_slowed(self, seen: Batch, step: int, found: _Found) -> bool:
        """Whether the learning-rate control has an answer to values that are not finite.

        Steps that led to them are taken back. Where the present state is in order and the next
        steps diverge in a look-ahead, they are looked at again at half the rate.
        """
        if self._rate is None:
            return False
        began, is_ahead = time.perf_counter(), found.is_ahead
        found.losses, found.is_ahead = None, False
        with self._objective.scoring():
            decision, replaced = self._rate.diverged(step)
        if decision is None and is_ahead:
            with self._group.together():
                self._losses(seen, found)  # raises where the pool itself is at fault
            decision = self._rate.slow_down(
                "the look-ahead's own updates are not finite at this rate"
            )
            replaced = decision is not None
        if replaced:
            self.state.ahead = None
        _note(found, decision, step, began)
        return replaced

    def _control_horizon(
        self, pool: Batch, upcoming: Iterator[Batch], step: int, found: _Found
    ) -> bool:
        """Whether nothing is to be selected from this pool, as control finds."""
        if self._contests is None or not self._contests.may_be_off:
            return False
        if self._contests.is_look_due:
            with self._objective.scoring():
                self._contests.look(self._next_target)
        self._contest(pool, upcoming, step, found)
        return self._contests.is_off

    def _contest(self, pool: Batch, upcoming: Iterator[Batch], step: int, found: _Found) -> None:
        """Let the horizon control hold a contest, if one is due."""
        control = self._contests
        if control is None or not control.is_due():
            return
        if self.state.serves(step, self._scored_names() or self._optimizer.params()):
            return
        size = num_examples(pool)
        size_kept = num_kept(self.options.keep, size)
        if size_kept == size:  # there is nothing to choose
            return
        pools = self._drawn(pool, upcoming, control.num_updates(size // size_kept), found)
        began = time.perf_counter()
        target, judge = self._next_target(), self._next_target()
        if self._target.num_batches == 1 or judge is target:
            target, judge = halves(target)
        with self._objective.scoring():
            _note(found, control.contest(pools, target, judge), step, began)

    # --- state ----------------------------------------------------------------------------

    @property
    def group(self) -> Group:
        """The processes that train the model together; this one alone where there are no more."""
        return self._group

    @property
    def max_peeked(self) -> int:
        """Pools of the longest look-ahead there will be; no more are ever peeked at."""
        return self._horizon.largest * self.options.pools_per_update

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
        return {"options": self._saved_options, "memory": plain_memory(self._memory), **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, with the model and optimizer of that moment.

        The target must yield the same batches in the same order: not at random, as a shuffling
        loader does.

        Raises:
            ValueError: the state is of a selector with other options, or of another model; a type
                of its batches is not imported yet.
        """
        check_same(state["options"], self._saved_options)
        with self._objective.placed():
            params, names = self._optimizer.values(), self._scored_names()
        self.state.load(state, params, params if names is None else params.pick(names))
        restore_memory(self._memory, state.get("memory", {}), params)
        self._optimizer.resume_at(self.state.num_steps)
        if self.state.rate is not None:
            self._optimizer.lr_multiplier = self.state.rate.rule.multiplier


@contextmanager
def _naming(step: int) -> Iterator[None]:
    """Let an error about a value that is not finite name the optimizer step."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"at optimizer step {step}: {error}") from error


def _note(found: _Found, decision: Decision | None, step: int, began: float) -> None:
    """Keep a decision of the controller, and the time since `began` as its cost."""
    found.control_s += time.perf_counter() - began
    if decision is not None:
        found.decisions.append(replace(decision, step=step))
        _log.log(logging.INFO if decision.moved else logging.DEBUG, "%s", found.decisions[-1])
