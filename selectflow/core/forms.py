"""Which form derivatives have, and how far central differences step: decided at run time.

No one step serves every arithmetic. Truncation grows with it, rounding falls, and in bfloat16 the
rounding of a loss, 1e-3, drowns the step that is best in float32. So the step is checked on a few
examples at its first use and now and then: against forward mode where that is to be had, else
against another step. Where the step is wrong, or right but not good, the best of several is taken,
and where none is right the exact form, or an error: nothing is ever ranked by noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from selectflow.core.params import Params

Method = Literal["auto", "exact", "central"]
Use = Literal["losses", "gradients"]
Derive = Callable[[str, float], Tensor]
"""A form and the scale of its step -> the derivatives of a few examples, flat."""

NUM_CHECKED = 8  # examples on which forms and steps are compared

# Relative error at which central differences still rank a pool rightly: up to it, Spearman with the
# exact form was 0.99 and more (tests/benchmarks/derivative_agreement.py). A Hessian product is a
# correction to the adjoint, and across the kinks of ReLU the two forms need not agree.
TOLERANCE = 0.05
# Where the error is larger than this, as in bfloat16, a better step is looked for.
GOOD = TOLERANCE / 2
BEST_TOLERANCE = 0.1  # between the two steps that agree best, where there is nothing else
# Steps that are tried, as multiples of the usual one.
SCALES = (1 / 9, 1 / 3, 1.0, 3.0, 9.0, 27.0, 81.0, 243.0)
# as torch says that a model has no forward mode, or no derivative of a derivative
_NO_FORWARD_MODE = (
    "forward AD", "forward mode AD", "functorch", "functional transforms", "saved tensor hooks",
    "vmap", "is not implemented", "Double backwards", "data pointer", "etc) transform",
    "to have the same dtype",
)  # fmt: skip

_log = logging.getLogger(__name__)


@dataclass
class Forms:
    """Which form, "exact" or "central", the derivatives of losses and of gradients have.

    Attributes:
        decided: the form by use, from the first use on.
        unchecked: uses whose next one is to check that the form is right.
        scales: of the step of central differences, as a multiple of the usual one, by use.
        errors: relative error that the last check found, by use; 0 for the exact form.
        shares_slopes: whether the slopes that Hessian products bring along were found right, by
            the last check that was to say so. Not saved: only sweeps over recordings ask.
    """

    decided: dict[str, str] = field(default_factory=dict)
    unchecked: set[str] = field(default_factory=set)
    scales: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    shares_slopes: bool = False

    def recheck(self) -> None:
        """Let the next use of each form check again that it is right."""
        self.unchecked = set(self.decided)

    def step_as_products(self, scale: float) -> bool:
        """Let losses step as far as central products, whose slopes were found right.

        Args:
            scale: the usual step of products over that of losses.

        Returns:
            Whether products are central ones.
        """
        if self.decided.get("gradients") != "central":
            return False
        self.decided["losses"] = "central"
        self.scales["losses"] = scale * self.scales["gradients"]
        self.unchecked.discard("losses")
        return True

    def is_due(self, use: Use, method: Method) -> bool:
        """Whether the next derivative of this use needs a decision."""
        return use not in self.decided or (use in self.unchecked and method != "exact")

    def decide(self, use: Use, method: Method, derive: Derive) -> str:
        """Decide on the form of a use, and on the step of differences.

        Raises:
            FloatingPointError: no step is right, and the model has no forward mode.
            RuntimeError: the method is "exact", and the model has no forward mode.
        """
        if method == "exact":
            form, scale, error, why = *_exact(derive), "as asked for"
        else:
            form, scale, error, why = self._choose(use, method, derive)
        if form != self.decided.get(use) or scale != self.scales.get(use, 1.0):
            level = logging.WARNING if (form, method) == ("exact", "central") else logging.INFO
            _log.log(level, "derivatives of %s: %s (%s)", use, form, why)
        self.decided[use], self.scales[use], self.errors[use] = form, scale, error
        self.unchecked.discard(use)
        return form

    def _choose(self, use: Use, method: Method, derive: Derive) -> tuple[str, float, float, str]:
        """Form, scale, error, and why."""
        exact = try_exact(derive, say=not self.decided) if method == "auto" else None
        against = "another step" if exact is None else "the exact form"
        scale, tolerance = self.scales.get(use, 1.0), TOLERANCE
        reference = derive("central", scale / 2) if exact is None else exact
        error = apart(derive("central", scale), reference, use)
        if exact is not None and error > GOOD:
            found = best_step(derive, exact, use)
            scale, error = min((scale, error), found, key=lambda pair: pair[1])
        elif error > tolerance:
            (scale, error), tolerance = midway_step(derive, use), BEST_TOLERANCE
        why = f"{error:.1e} from {against} at {scale:g} times the usual step"
        if error <= tolerance:
            return "central", scale, error, why
        if exact is None and try_exact(derive, say=False) is None:
            raise FloatingPointError(
                f"central differences of {use} must agree to {tolerance:.0%} between steps, got "
                f"{error:.1%} at the best of them, and the model has no forward-mode derivative; "
                "make the losses deterministic (no random numbers from generators of your own in "
                "loss_fn, no state that forward keeps from pass to pass) and smooth, or compute "
                "them in higher precision"
                + ("" if use == "losses" else ", or set curvature to 'none'")
            )
        return "exact", 1.0, 0.0, why

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "decided": dict(self.decided),
            "unchecked": sorted(self.unchecked),
            "scales": dict(self.scales),
            "errors": dict(self.errors),
        }

    def load(self, plain: Mapping[str, Any]) -> None:
        """Go on from `plain`."""
        self.decided, self.unchecked = dict(plain["decided"]), set(plain["unchecked"])
        self.scales, self.errors = dict(plain["scales"]), dict(plain["errors"])


def best_step(derive: Derive, exact: Tensor, use: Use) -> tuple[float, float]:
    """The scale of the step that agrees best with the exact form, and its relative error.

    Beside the best scale s of those that are tried, one between its neighbours is: the smallest sum
    of squares of rounding, r / s as at the smaller one, and truncation, t s^2 as at the larger,

        s = (r / (sqrt(2) t))^(1/3)
    """
    errors = [apart(derive("central", scale), exact, use) for scale in SCALES]
    best = min(range(len(SCALES)), key=errors.__getitem__)
    found = [(SCALES[best], errors[best])]
    is_inside = 0 < best < len(SCALES) - 1 and errors[best] > 0
    if is_inside and math.isfinite(errors[best - 1] + errors[best + 1]):
        rounding = errors[best - 1] * SCALES[best - 1]
        truncation = errors[best + 1] / SCALES[best + 1] ** 2
        between = (rounding / (math.sqrt(2) * truncation)) ** (1 / 3)
        found.append((between, apart(derive("central", between), exact, use)))
    return min(found, key=lambda pair: pair[1])


def midway_step(derive: Derive, use: Use) -> tuple[float, float]:
    """The scale midway between the two that agree best with each other, and how far they do not.

    Rounding prevails at the smaller one, truncation at the larger.
    """
    found = [derive("central", scale) for scale in SCALES]
    errors = [apart(one, other, use) for one, other in pairwise(found)]
    scales = [math.sqrt(one * other) for one, other in pairwise(SCALES)]
    return min(zip(scales, errors, strict=True), key=lambda pair: pair[1])


def apart(found: Tensor, reference: Tensor, use: Use) -> float:
    """Norm of the difference over that of the reference.

    Of slopes of losses also about their means: what all examples share moves no rank, however
    large, and what tells them apart counts. Infinite where all differences are 0: a step that
    rounding takes back agrees with any other such step.
    """
    size = _norm_of_slopes if use == "losses" else _norm_of_vector
    if not size(found):
        return math.inf
    pairs = [(found, reference)]
    if use == "losses" and len(found) > 1:
        pairs.append((found - found.mean(), reference - reference.mean()))
    ratios = [size(one - other) / size(other) for one, other in pairs if size(other) > 0]
    return max(ratios, default=math.inf)


def _norm_of_slopes(slopes: Tensor) -> float:
    return float(slopes.norm())


def _norm_of_vector(entries: Tensor) -> float:
    return Params({"all": entries}).norm()  # of shards, over those who hold the rest


def try_exact(derive: Derive, *, say: bool) -> Tensor | None:
    """The exact form; None where the model has no forward mode, which is logged if it is to be."""
    try:
        return derive("exact", 1.0)
    except RuntimeError as error:
        if not _lacks_forward_mode(error):  # as where memory does not suffice
            error.add_note("in forward mode, which derivative='central' does without")
            raise
        level = logging.INFO if say else logging.DEBUG
        _log.log(level, "no forward-mode derivative of this model (%s)", _reason(error))
        return None


def _exact(derive: Derive) -> tuple[str, float, float]:
    try:
        derive("exact", 1.0)
    except RuntimeError as error:
        if not _lacks_forward_mode(error):
            raise
        raise RuntimeError(
            f"a model with derivative 'exact' must have forward mode, got: {_reason(error)}; "
            "use 'auto' or 'central'"
        ) from error
    return "exact", 1.0, 0.0


def _lacks_forward_mode(error: RuntimeError) -> bool:
    is_memory = isinstance(error, torch.OutOfMemoryError)
    return not is_memory and any(words in str(error) for words in _NO_FORWARD_MODE)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
