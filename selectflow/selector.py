"""The selector: peeks pools, looks ahead, scores, keeps. The whole algorithm is in `select`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from selectflow.control.horizon import HorizonControl
from selectflow.control.rate import RateControl
from selectflow.control.rules import AutoHorizon, AutoRate, Decision
from selectflow.control.schedule import Horizon, as_horizon
from selectflow.core.batches import Batch, Cycle, num_examples, num_kept, take, through
from selectflow.core.chunks import ChunkSize
from selectflow.core.derivatives import Curvature, Derivatives, Method
from selectflow.core.lookahead_state import check_same_options
from selectflow.core.offload import Offload
from selectflow.core.passes import LossFn, Objective, check_finite
from selectflow.core.peeking import PeekedPools
from selectflow.core.policy import NominalChoice, Policy
from selectflow.core.scored_params import scored_names
from selectflow.core.sensitivities import Sensitivities
from selectflow.core.torch_optim import OptimizerReader
from selectflow.options import SelectOptions
from selectflow.strategies import STRATEGIES, Candidates, Selection, Strategy

_log = logging.getLogger(__name__)


class Selector:
    """Keeps, of every candidate pool, the examples whose training lowers the target loss most.

    The model, its optimizer, scheduler, gradients, buffers, mode and all random generators are
    the same after a selection as before it, also when it raises. `lr="auto"` alone changes what
    the optimizer does.

    Args:
        model: the module that is trained. Parameters in float32 or float64.
        optimizer: its `torch.optim.AdamW`, `Adam` or `SGD`.
        loss_fn: `loss_fn(model, batch)` -> per-example losses, shape (N,), differentiable.
        target: batches of clean examples that define the goal, iterated again and again, one
            for each look-ahead. Any re-iterable: a list, a DataLoader.
        keep: examples kept of each pool, at least 1; a float in (0, 1] is a fraction of it.
        horizon: optimizer updates between scoring and reading the target loss, >= 0, or what
            decides it at each look-ahead, as a `HorizonSchedule`. "auto" or an `AutoHorizon`: the
            controller decides, from contests of horizons and the error proxy. At the end of a
            stream the look-ahead is as long as the pools that are left. Longer is not better: no
            setting was found where H >= 4 selects better than 0 or 1, and on noisy labels H = 8
            does worse than a random choice (`tests/benchmarks/long_horizons.py`).
        interval: optimizer steps between two look-aheads, >= 1. Steps between use the
            sensitivities that the last sweep left for them, beyond its horizon the last one. Keep
            it within the horizon where gradients turn fast: in a mixture of texts, sensitivities
            older than that kept shuffled code, and trained worse than a random choice. On digits
            H = 0 at an interval of 4 does as well as at every step.
        strategy: "uniform", "loss", "influence" or a function of `Candidates`.
        derivative: "exact" (forward mode), "central" (differences) or "auto".
        curvature: Hessian of the look-ahead: "exact", "fisher" (empirical Fisher) or "none".
        lr_scheduler: stepped by the user once after every optimizer step; the look-ahead then
            follows the learning rates to come.
        max_grad_norm: what the user clips gradients to, by norm.
        seed: of the selector's own random numbers.
        lr: "schedule" leaves the learning rate to you. "auto" or an `AutoRate`: the controller
            multiplies it, whatever your schedule makes of it, within `optimizer.step()` alone; a
            few steps that made the target loss rise are taken back, or replaced by their replay at
            a lower rate, parameters and moments in place.
        nominal: which part of each pool the look-ahead simulates: a "random" one, or what the
            current "policy" would keep, under which training fails at H >= 4 (same benchmark).
        params: patterns of the names of the parameters that scores are taken over, as
            `["transformer.h.*"]` or, to leave some out, `["!*.wte.*"]`; None: all that are trained.
            The look-ahead still moves all: a score is exactly that part of the influence that an
            example has through its gradient at these parameters. At H = 0 it is cheaper, too.
        score_view: makes of a batch of candidates or of the target what is scored in its stead,
            such as the first tokens of each sequence (`models.language.token_window`); the
            look-ahead still trains on whole batches. None: the batch itself.
        pools_per_update: pools that make one optimizer step, where you accumulate the gradients
            of their kept examples; the look-ahead then does so, too.
        chunk_size: examples to a pass when scoring and looking ahead; None: all at once; "auto":
            as many as one pass takes within `memory_gib` of resident memory, of each kind of pass.
        memory_gib: limit for the states a look-ahead keeps, in GiB; recomputes beyond it. None: 1,
            or the least that the horizon needs on this model.
        offload: where it keeps them: "none" on their device, "cpu", or "disk", in the system's
            folder for temporary files.

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
        params: Sequence[str] | None = None,
        score_view: Callable[[Batch], Batch] | None = None,
        pools_per_update: int = 1,
        chunk_size: ChunkSize = None,
        memory_gib: float | None = None,
        offload: Offload = "none",
    ) -> None:
        given = locals()
        self.options = options = SelectOptions.checked(
            **{name: given[name] for name in SelectOptions.model_fields}
        )
        self._objective = Objective(model, loss_fn)
        self._derivatives = Derivatives(self._objective, derivative, chunk_size, memory_gib)
        self._optimizer = OptimizerReader(
            self._objective.model, optimizer, lr_scheduler, max_grad_norm
        )
        self._params = params
        self._scored_names()  # a pattern without a match is an error now, not at the first pool
        self._score_view = score_view
        self._target = Cycle(target)
        self._strategy = strategy if callable(strategy) else STRATEGIES[strategy]
        self._policy = Policy(
            self._derivatives,
            keep,
            interval,
            curvature,
            nominal,
            pools_per_update,
            score_view,
            memory_gib,
            self._scored_names,
            offload,
        )
        self._keep = keep
        self._generator = torch.Generator().manual_seed(seed)
        self._sensitivities = Sensitivities(self._policy, self._optimizer, self._generator)
        if horizon == "auto":
            horizon = AutoHorizon()
        self._control: HorizonControl | None = None
        if isinstance(horizon, AutoHorizon):
            self._control = HorizonControl(horizon, self._policy, self._optimizer, seed)
            self._horizon: Horizon = self._control
        else:
            self._horizon = as_horizon(horizon)
        if lr == "auto":
            lr = AutoRate()
        self._rate: RateControl | None = None
        if isinstance(lr, AutoRate):
            self._rate = RateControl(
                lr, self._optimizer, self._derivatives, self._next_target, pools_per_update
            )
        self._options = options.plain() | {"seed": seed}
        self._peeked = PeekedPools()
        self.last: Selection | None = None

    # --- selecting ------------------------------------------------------------------------

    def stream(self, pools: Iterable[Batch]) -> Iterator[Batch]:
        """Selected batches, one for each pool, in the pools' order.

        Pools that a look-ahead peeks at are handed out later, in order: none is lost or used
        twice. The optimizer is read when the next batch is asked for.

        Args:
            pools: batches of P >= keep candidates; may be endless.

        Yields:
            Batches of the pools' type with the kept examples, best first.
        """
        source = iter(pools)
        for pool in self._peeked.handed_out(source):
            yield self.select(pool, self._peeked.upcoming(source))

    def select(self, pool: Batch, upcoming: Iterable[Batch] = ()) -> Batch:
        """The part of one pool to train on now.

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
        began = time.perf_counter()
        size = num_examples(pool)
        size_kept = num_kept(self._keep, size)
        scoring = _Scoring(self, pool, upcoming, self._optimizer.num_steps())
        try:
            self._adapt_rate(scoring)
            scores = self._scores(scoring, size)
        except FloatingPointError as error:
            raise FloatingPointError(f"at optimizer step {scoring.step}: {error}") from error
        indices = scores.argsort(descending=True, stable=True)[:size_kept]
        kept = take(pool, indices)
        if self._rate is not None:
            self._rate.trained_on(kept)
        ahead = self._sensitivities.ahead
        self.last = Selection(
            pool=pool,
            indices=indices,
            scores=scores,
            losses=None if scoring.losses is None else scoring.losses.cpu(),
            step=scoring.step,
            horizon=ahead.horizon if ahead else None,
            age=self._sensitivities.age(scoring.step) if ahead else 0,
            target_loss=ahead.target_loss if ahead else None,
            lr_multiplier=self._optimizer.lr_multiplier,
            decisions=tuple(scoring.decisions),
            lookahead_s=scoring.lookahead_s,
            control_s=scoring.control_s,
            seconds=time.perf_counter() - began,
        )
        return kept

    @property
    def forms(self) -> dict[str, str]:
        """Which form, "exact" or "central", the derivatives of losses and of gradients have.

        With `derivative="auto"` each is decided at its first use, and checked again now and then.
        """
        return dict(self._derivatives.decided)

    def _scores(self, scoring: _Scoring, size: int) -> Tensor:
        candidates = Candidates(
            scoring.pool, size, scoring.read_losses, scoring.read_influence, self._generator
        )
        scores = self._strategy(candidates).detach().cpu()
        if scores.shape != (size,):
            raise ValueError(
                f"strategy must return one score per example, shape ({size},), "
                f"got {tuple(scores.shape)}"
            )
        check_finite("scores", scores, scoring.pool)
        return scores if scores.is_floating_point() else scores.double()  # ranks, yes or no

    # --- looking ahead --------------------------------------------------------------------

    def _scored_names(self) -> tuple[str, ...] | None:
        return scored_names(self._params, self._optimizer.params(), self._objective.model)

    def _next_target(self) -> Batch:
        """The next batch of the target set, as it is scored."""
        return through(self._score_view, self._target.next())

    # --- controlling ----------------------------------------------------------------------

    def _adapt_rate(self, scoring: _Scoring) -> None:
        """Let the learning-rate control judge the steps so far."""
        if self._rate is None:
            return
        began = time.perf_counter()
        with self._objective.scoring():
            decision, replaced = self._rate.before(scoring.step)
        if replaced:
            self._sensitivities.ahead = None  # it was of the steps that were taken back
        scoring.note(decision, began)

    def _adapt_horizon(self, scoring: _Scoring, pools: list[Batch]) -> None:
        """Let the horizon control hold a contest over `pools`, the present one first."""
        assert self._control is not None
        began = time.perf_counter()
        scoring.note(self._control.contest(scoring.step, pools, self._next_target()), began)

    # --- state ----------------------------------------------------------------------------

    @property
    def max_peeked(self) -> int:
        """Pools of the longest look-ahead there will be; no more are ever peeked at."""
        return self._horizon.largest * self._policy.pools_per_update

    @property
    def num_peeked(self) -> int:
        """Pools that were drawn from the stream and not yet handed out."""
        return len(self._peeked)

    def state_dict(self, *, with_peeked: bool = True) -> dict[str, Any]:
        """All that the next selections depend on; `torch.save` it with model and optimizer.

        Args:
            with_peeked: whether the pools that were peeked at and not yet handed out are part of
                it. The source of pools is then resumed after the last one it gave; without them,
                `num_peeked` pools earlier.
        """
        return {
            "options": self._options,
            "generator": self._generator.get_state(),
            "num_steps": self._optimizer.num_steps(),
            **self._sensitivities.state_dict(),
            **self._derivatives.state_dict(),
            "target_position": self._target.position,
            "horizon_control": self._control and self._control.state_dict(),
            "rate_control": self._rate and self._rate.state_dict(),
            "peeked": self._peeked.pools() if with_peeked else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit, with the model and optimizer of that moment.

        The target must yield the same batches in the same order: not at random, as a shuffling
        loader does.

        Raises:
            ValueError: the state is of a selector with other options, or of another model.
        """
        check_same_options(state["options"], self._options)
        params, names = self._optimizer.params(), self._scored_names()
        params = params if names is None else params.pick(names)
        self._sensitivities.load_state_dict(state, params)
        self._generator.set_state(state["generator"])
        self._optimizer.resume_at(state["num_steps"])
        self._derivatives.load_state_dict(state)
        self._target.seek(state["target_position"])
        if self._control is not None:
            self._control.load_state_dict(state["horizon_control"])
        if self._rate is not None:
            self._rate.load_state_dict(state["rate_control"])
        self._peeked = PeekedPools(state["peeked"])


class _Scoring:
    """What a strategy may ask of one pool; keeps the losses that came along."""

    def __init__(self, selector: Selector, pool: Batch, upcoming: Iterable[Batch], step: int):
        self.pool, self.step = pool, step
        self.seen = through(selector._score_view, pool)
        self.losses: Tensor | None = None
        self.lookahead_s = self.control_s = 0.0
        self.decisions: list[Decision] = []
        self._selector, self._upcoming = selector, upcoming

    def read_losses(self) -> Tensor:
        selector = self._selector
        if self.losses is None:
            with selector._objective.scoring():
                params = selector._optimizer.params().detach()
                self.losses = selector._derivatives.losses(params, self.seen)
        return self.losses

    def read_influence(self) -> Tensor:
        selector = self._selector
        sensitivities = selector._sensitivities
        is_due = sensitivities.is_due(self.step)
        control = selector._control if is_due else None
        if control is not None and not control.is_due(self.step):
            control = None
        # The user's stream is drawn from outside of `scoring`, which would undo its randomness.
        num_updates = selector._horizon.at(self.step) if is_due else 0
        if control is not None:
            num_updates = control.num_updates()
        num_pools = num_updates * selector._policy.pools_per_update
        pools = [self.pool, *islice(self._upcoming, max(0, num_pools - 1))]
        with selector._objective.scoring():
            if control is not None:
                selector._adapt_horizon(self, pools)
            if is_due:
                began = time.perf_counter()
                horizon, target = selector._horizon.at(self.step), selector._next_target()
                sensitivities.refresh(horizon, self.step, pools, target)
                self.lookahead_s = time.perf_counter() - began
            params = selector._optimizer.params().detach()
            gamma = sensitivities.at(self.step)
            self.losses, slopes = selector._derivatives.directional(params, gamma, self.seen)
        return -slopes

    def note(self, decision: Decision | None, began: float) -> None:
        """Keep a decision of the controller, and the time since `began` as its cost."""
        self.control_s += time.perf_counter() - began
        if decision is not None:
            self.decisions.append(replace(decision, step=self.step))
            _log.log(logging.INFO if decision.moved else logging.DEBUG, "%s", self.decisions[-1])
