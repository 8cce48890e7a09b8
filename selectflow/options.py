"""The options of a selection, each once: name, type, range, default and meaning.

`Selector`, the configuration of runs (`select.*`), the Hugging Face mixin, the saved state and the
tables of the README and the guide all read `SelectOptions`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from numbers import Integral, Real
from types import FunctionType
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from selectflow.control.contest_state import HorizonState
from selectflow.control.horizon import Horizon
from selectflow.control.interval import IntervalState
from selectflow.control.ladder import AutoHorizon
from selectflow.control.rate import RateState
from selectflow.control.rollouts import Simulated
from selectflow.control.rules import AutoRate, RateRule
from selectflow.control.state import SelectorState
from selectflow.control.worth import WorthState
from selectflow.core.counts import is_count
from selectflow.core.derivatives import Derivatives
from selectflow.core.forms import Forms
from selectflow.core.lookahead import Policy
from selectflow.core.params import scored_names
from selectflow.core.passes import Objective
from selectflow.core.torch_optim import OptimizerReader
from selectflow.fields import Count, Section, describe, must_be, nearest
from selectflow.strategies import SIGNED, STRATEGIES
from selectflow.strategies.scorer import Scorer


def _is_keep(value: object) -> bool:
    is_fraction = isinstance(value, Real) and not isinstance(value, Integral)
    return is_count(value) or (is_fraction and 0 < value <= 1)  # type: ignore[operator]


def _is_horizon(value: object) -> bool:
    decides = hasattr(value, "at") and hasattr(value, "largest")
    return decides or is_count(value, 0) or value == "auto" or isinstance(value, AutoHorizon)


def _is_interval(value: object) -> bool:
    return value == "auto" or is_count(value)


def _is_chunk_size(value: object) -> bool:
    return value is None or value == "auto" or is_count(value)


def _is_rate(value: object) -> bool:
    return value in ("schedule", "auto") or isinstance(value, AutoRate)


def _known_strategy(value: object) -> object:
    if callable(value) or value in STRATEGIES:
        return value
    rule = f"one of {', '.join(STRATEGIES)}, or a function of Candidates"
    fix = nearest(str(value), list(STRATEGIES))
    raise PydanticCustomError("rule", "must be {rule}", {"rule": rule, "fix": fix})


class SelectOptions(Section):
    """How examples are chosen: the options of `Selector`, and of `select.*` in a configuration.

    *Horizon.* A `HorizonSchedule` or an `AutoHorizon` may stand for the number, and decides at each
    look-ahead; under "influence" the latter may also find that plain training gains more in the
    same time, and then every pool is trained on whole, in parts. At the end of a stream the
    look-ahead is as long as the pools that are left. Longer is not better: no setting was found
    where H >= 4 selects better than 0 or 1, and on noisy labels H = 8 does worse than a random
    choice (`tests/benchmarks/long_horizons.py`).

    *Interval.* Steps between two look-aheads use the sensitivities that the last sweep left for
    them, beyond its horizon the last one. Keep it within the horizon where gradients change fast:
    in a mixture of texts, sensitivities older than that kept shuffled code, and trained worse than
    a random choice. On digits H = 0 at an interval of 4 does as well as at every step. "auto"
    begins with 1, and measures now and then how scores change (`control.interval`).

    *Steps that are selected for.* One of four costs a fourth, and brings a fourth of what selection
    alone does; but sources whose shares follow what is kept (`shares="auto"`) learn from it nearly
    as fast. It needs a horizon and an interval of your own: the controller counts every step.

    *Learning rate.* "auto" or an `AutoRate` multiplies the user's rate, within `optimizer.step()`
    alone. A few steps that made the target loss rise are taken back, or replaced by their replay at
    a lower rate, parameters and moments in place.

    *Nominal batches.* Under "policy" training fails at H >= 4 (same benchmark).

    *Weighting.* Under "relu" the weight of a kept example is max(0, score), by the mean of these:
    `selector.last.weights`, which your loop trains with, `(weights * losses).mean()`. With keep=1.0
    and horizon=0 that is Ren et al. 2018. The parts of later pools that a look-ahead trains on have
    equal weights, since their scores are not known.

    *Parameters.* The look-ahead moves all of them: a score is exactly that part of the influence
    that an example has through its gradient at the chosen ones. At H = 0 that is cheaper, too.

    *Score view.* As `models.language.token_window`; the look-ahead trains on whole batches.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    keep: Annotated[
        Count | Annotated[float, Field(gt=0, le=1)],
        must_be("an integer >= 1 or a fraction in (0, 1]", _is_keep),
    ] = Field(default=16, description="B: examples kept of a pool, or the fraction of it kept")
    horizon: Annotated[
        Any, must_be("an integer >= 0, auto, a HorizonSchedule or an AutoHorizon", _is_horizon)
    ] = Field(
        default=1,
        description="H: optimizer updates from scoring to reading the target loss; auto: the "
        "controller's choice, also not to select",
    )
    interval: Annotated[
        Count | Literal["auto"], must_be("an integer >= 1, or auto", _is_interval)
    ] = Field(
        default=1,
        description="K: optimizer steps between two look-aheads; auto: by how fast scores change",
    )
    score_every: Count = Field(
        default=1,
        description="optimizer steps of which one is selected for; to the others the pools give "
        "any examples, unscored",
    )
    strategy: Annotated[Any, BeforeValidator(_known_strategy)] = Field(
        default="influence",
        description="influence: by look-ahead; uniform: at random; loss: largest first; the others "
        "are baselines, each described where it is in selectflow.strategies.baselines",
    )
    derivative: Literal["auto", "exact", "central"] = Field(
        default="auto",
        description="directional derivatives: forward-mode, differences, or the cheaper: "
        "differences where a check finds them right, over a whole run (offline), too",
    )
    curvature: Literal["exact", "fisher", "none"] = Field(
        default="exact", description="Hessian of the adjoint sweep"
    )
    lr: Annotated[Any, must_be("one of schedule, auto, or an AutoRate", _is_rate)] = Field(
        default="schedule",
        description="learning rate: as scheduled, or multiplied by what the controller chooses",
    )
    nominal: Literal["random", "policy"] = Field(
        default="random", description="which part of the peeked pools the look-ahead simulates"
    )
    scope: Literal["local", "global"] = Field(
        default="local",
        description="with several processes: each keeps the best of its own pool, or as many of "
        "the best of all pools",
    )
    weighting: Literal["none", "relu"] = Field(
        default="none",
        description="weights of what is kept: equal, or max(0, score), of mean 1",
    )
    params: tuple[str, ...] | None = Field(
        default=None,
        strict=False,
        description="patterns of the parameters that scores are taken over, '!' leaves out, as "
        "['!*wte*']; null: all",
    )
    score_view: Annotated[
        Any,
        must_be("a function of a batch, or None", lambda value: value is None or callable(value)),
    ] = Field(
        default=None,
        description="makes a batch of candidates or of the target into what is scored, such as "
        "the first tokens of each sequence; null: the batch itself",
    )
    pools_per_update: Count = Field(
        default=1,
        description="pools whose kept examples make one optimizer step together",
    )
    chunk_size: Annotated[
        Count | Literal["auto"] | None,
        must_be("an integer >= 1, 'auto' or None", _is_chunk_size),
    ] = Field(
        default=None,
        description="examples scored at once; null: the whole pool; auto: as many as one pass "
        "takes within memory_gib",
    )
    memory_gib: Annotated[float, Field(gt=0, strict=False)] | None = Field(
        default=None,
        description="memory for the look-ahead's states, in GiB; offline, as much again for the "
        "snapshots of the recorded run; null: 1, or the least that is needed",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        default="none",
        description="where the look-ahead's states are kept; disk: the system's temporary files",
    )

    @classmethod
    def checked(cls, **given: Any) -> Self:
        """The options, or a ValueError that says what is wrong with each.

        Raises:
            ValueError: an option out of its range; an unknown strategy, with the nearest known.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            lines = [describe(dict(item), list(cls.model_fields)) for item in error.errors()]
        raise ValueError("; ".join(lines))

    def plain(self) -> dict[str, Any]:
        """What decides on the choices, as numbers, names and lists, for saved states."""
        free = {"score_view", "chunk_size", "memory_gib", "offload"}
        return {name: _plain(value) for name, value in self if name not in free}

    # --- what they make of a model ----------------------------------------------------------------

    def interval_at(self, state: SelectorState) -> int:
        """Optimizer steps between two look-aheads, now."""
        return self.interval if state.interval is None else state.interval.interval  # type: ignore[return-value]

    def horizon_for(self, scorer: Scorer | None) -> int | Horizon | AutoHorizon:
        """The horizon, "auto" in full, as far as the strategy and the scorer know it.

        Raises:
            ValueError: a frozen scorer has no steps that a look-ahead could follow; one has nothing
                to score.
        """
        if scorer is not None and self.strategy == "uniform":
            raise ValueError(
                "scorer must be None for strategy 'uniform', which scores nothing, got one; leave "
                "it out"
            )
        is_frozen = scorer is not None and scorer.is_frozen
        horizon = self.horizon
        if horizon == "auto":
            horizon = AutoHorizon(largest=0) if is_frozen else AutoHorizon()
        if isinstance(horizon, AutoHorizon) and self.strategy != "influence":
            horizon = replace(horizon, off=False)  # contests know no other strategy
        largest = horizon if isinstance(horizon, int) else horizon.largest
        if is_frozen and largest > 0:
            raise ValueError(
                f"horizon of a frozen scorer must be 0, since its steps are not known, got "
                f"{largest}; give its optimizer to Scorer, or set horizon=0"
            )
        return horizon  # type: ignore[no-any-return]

    def begin(
        self, horizon: int | Horizon | AutoHorizon, scorer: Scorer | None, seed: int
    ) -> SelectorState:
        """What the first selections depend on.

        Args:
            horizon: as `horizon_for` has it.
            scorer: the small model that scores, if there is one.
            seed: of the random numbers.
        """
        rate = AutoRate() if self.lr == "auto" else self.lr
        contests = HorizonState.begin(horizon, seed) if isinstance(horizon, AutoHorizon) else None
        # checks and contests choose by influence: of another choice they would say nothing
        is_checked = scorer is not None and contests is None and self.strategy == "influence"
        return SelectorState(
            torch.Generator().manual_seed(seed),
            Forms(),
            contests,
            RateState(RateRule(rate)) if isinstance(rate, AutoRate) else None,
            IntervalState() if self.interval == "auto" else None,
            WorthState() if is_checked else None,
        )

    def simulated(
        self,
        interval: Callable[[], int],
        objective: Objective,
        optimizer: OptimizerReader,
        forms: Forms,
        *,
        is_frozen: bool = False,
    ) -> Simulated:
        """A model and its optimizer as look-aheads and contests roll them out.

        Args:
            interval: optimizer steps between two look-aheads, now.
            objective: of the model.
            optimizer: that trains it.
            forms: of its derivatives, as found so far.
            is_frozen: whether it is not trained.
        """
        derivatives = Derivatives(
            objective, self.derivative, self.chunk_size, self.memory_gib, forms
        )
        policy = Policy(
            derivatives,
            lambda: scored_names(self.params, optimizer.params(), objective.model),
            self.keep,
            interval,
            self.curvature,
            self.nominal,
            self.pools_per_update,
            self.score_view,
            self.memory_gib,
            self.offload,
            is_frozen=is_frozen,
            weighting=self.weighting,
        )
        return Simulated(policy, optimizer)


def problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What of the options does not go together, one line each.

    Args:
        options: values of `SelectOptions` by name.
    """
    if options["score_every"] > 1:
        for name in ("horizon", "interval"):
            if options[name] == "auto" or isinstance(options[name], AutoHorizon):
                yield (
                    f"{name} must be a number when score_every is above 1, got auto: the "
                    "controller compares what is selected for at every step"
                )
    if options["weighting"] != "none":
        yield from _weighting_problems(options)


def _weighting_problems(options: Mapping[str, Any]) -> Iterator[str]:
    when = f"when weighting is {options['weighting']}"
    strategy = options["strategy"]
    if isinstance(strategy, str) and strategy not in SIGNED:
        yield (
            f"strategy must be one of {', '.join(SIGNED)}, or a function of Candidates, {when}, "
            f"got {strategy}: the sign of its scores does not say what helps"
        )
    for name, only, why in (
        ("scope", "local", "each process weighs what it kept of its own pool"),
        ("nominal", "random", "what a look-ahead trains on has equal weights"),
    ):
        if options[name] != only:
            yield f"{name} must be {only} {when}, got {options[name]}: {why}"


def refuse_weights(options: Mapping[str, Any], trainer: str) -> None:
    """Raise ValueError where a trainer, whose own loss is trained, was given options of weights."""
    if (weighting := options.get("weighting", "none")) != "none":
        raise ValueError(
            f"weighting must be 'none' in {trainer}, whose loss has no weights of examples, got "
            f"{weighting!r}; train in your own loop, or in a run by select.weighting"
        )


def check_same(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the differences, unless a saved selector had our options."""
    # what an older state does not know of was as by default
    saved = {name: field.default for name, field in SelectOptions.model_fields.items()} | dict(
        saved
    )
    if differing := [name for name in ours if saved[name] != ours[name]]:
        listed = ", ".join(
            f"{name}: {saved[name]!r} saved, {ours[name]!r} here" for name in differing
        )
        raise ValueError(f"selector options must be those of the saved state, got {listed}")


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, FunctionType):
        return value.__name__
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # another in each process
