"""The options of a selection, each once: name, type, range, default and meaning.

`Selector`, the configuration of runs (`select.*`), the Hugging Face mixin, the saved state and the
README's table all read `SelectOptions`. What every section of a configuration shares, and the words
of its errors, are here as well.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from selectflow.control.ladder import AutoHorizon
from selectflow.control.rules import AutoRate
from selectflow.core.counts import is_count
from selectflow.strategies import SIGNED, STRATEGIES

# --- what is wrong, in the words of the person who wrote it ---------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line for each thing wrong."""


def nearest(name: str, known: Sequence[str], cutoff: float = 0.5) -> str:
    """The end of an error about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_key(path: str, known: Sequence[str]) -> str:
    """The end of an error about an unknown key, given the dotted paths of all known ones."""
    section, _, leaf = path.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    # A right name in the wrong section (`horizon: 2`) is as common as a misspelt one.
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        return nearest(path, elsewhere, cutoff=0.0)
    near = siblings or known
    return nearest(path, near) or f"; known are {', '.join(near)}"


# The rule of pydantic's error types in words of YAML; other types bring their own message.
_RULES = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "path_type": "a path",
    "model_type": "a mapping of its fields",
    "model_attributes_type": "a mapping of its fields",
    "finite_number": "finite",
}


def describe(error: Mapping[str, Any], known: Sequence[str]) -> str:
    """One error of pydantic as `path must be <rule>, got <value>; <fix>`.

    Args:
        error: an item of `ValidationError.errors()`.
        known: dotted paths of all keys.

    Returns:
        One line.
    """
    path = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))
    kind, message, value = error["type"], error["msg"], error["input"]
    if kind in ("extra_forbidden", "invalid_key"):
        section, _, leaf = path.partition(".")
        if path in known and len(error["loc"]) == 1:  # dotted, as only an override is
            return f"{path} must be nested, got {value!r}; write {section}: {{{leaf}: ...}}"
        return f"{path} must be a known key, got {value!r}{nearest_key(path, known)}"
    if kind == "missing":
        return f"{path} must be given"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = nearest(str(value), choices)
        return f"{path} must be one of {', '.join(choices)}, got {value!r}{near}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        fix = f"put it in quotes, on a command line as '{path}=\"{value}\"'"
        return f"{path} must be a string, got {value!r}; {fix}"
    rule = _RULES.get(kind, message.removeprefix("Input should be ").removeprefix("must be "))
    return f"{path} must be {rule}, got {value!r}{error.get('ctx', {}).get('fix', '')}"


def must_be(rule: str, holds: Callable[[object], object]) -> BeforeValidator:
    """A check before the type is looked at: a value that fails `must be <rule>`."""

    # Pydantic reports a union once per type and a pattern as a regex; this once, and in words.
    def check(value: object) -> object:
        if not holds(value):
            raise PydanticCustomError("rule", "must be {rule}", {"rule": rule})
        return _own_number(value)

    return BeforeValidator(check)


def _own_number(value: object) -> object:
    """A number of numpy as Python's own, which is saved and printed as such."""
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


# --- types of fields ------------------------------------------------------------------------------


class Section(BaseModel):
    """Strict and immutable: an unknown key, or a value of another type, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


Count = Annotated[int, Field(ge=1), must_be("an integer >= 1", is_count)]
# YAML has lists and strings where Python has tuples and paths; only the container is lax.


def expanded(value: object) -> object:
    """A path or URL of a configuration with `~` and `$NAME` filled in, which no shell has done.

    Raises:
        PydanticCustomError: a variable of a path is not set, or a user not known.
    """
    if not isinstance(value, str | Path):
        return value
    filled = os.path.expandvars(os.path.expanduser(value))
    if "://" in filled:
        return filled  # "$" may be a part of it
    if left := re.search(r"\$(\w+|\{\w+\})", filled) or re.match(r"~\w*", filled):
        rule, fix = "a path whose variables are set", f"; {left[0]} is not, set it or write it out"
        raise PydanticCustomError("rule", "must be {rule}", {"rule": rule, "fix": fix})
    return type(value)(filled)


Directory = Annotated[Path, BeforeValidator(expanded), Field(strict=False)]


class SelectOptions(Section):
    """How examples are chosen: the options of `Selector`, and of `select.*` in a configuration.

    *Horizon.* A `HorizonSchedule` or an `AutoHorizon` may stand for the number, and decides at each
    look-ahead; under "influence" the latter may also find that plain training gains more in the
    same time, and then every pool is trained on whole, in parts. At the end of a stream the
    look-ahead is as long as the pools that are left. Longer is not better: no setting was found
    where H >= 4 selects better than 0 or 1, and on noisy labels H = 8 does worse than a random
    choice (`tests/benchmarks/long_horizons.py`).

    *Interval.* Steps between two look-aheads use the sensitivities that the last sweep left for
    them, beyond its horizon the last one. Keep it within the horizon where gradients turn fast: in
    a mixture of texts, sensitivities older than that kept shuffled code, and trained worse than a
    random choice. On digits H = 0 at an interval of 4 does as well as at every step. "auto" begins
    with 1, and measures now and then how scores turn (`control.interval`).

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
        description="K: optimizer steps between two look-aheads; auto: by how fast scores turn",
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


def weighting_problems(options: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with weights, one line each.

    Args:
        options: values of `SelectOptions` by name.
    """
    if options["weighting"] == "none":
        return
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
