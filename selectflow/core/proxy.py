"""The error proxy: how wrong the first-order estimate of a change of training is, before making it.

A window of H updates is trained with example weights w0. Let alpha move them, and the learning
rate, towards something else (`tangents.Shift`):

    w(alpha) = w0 + alpha dw      lr(alpha) = (1 + alpha s) lr      alpha from 0 to 1

and let phi_h(alpha) be the target loss after h of the updates. What the whole change does, D_h, has
the expansion

    D_h = phi_h(1) - phi_h(0) = I_h + Q_h + third order
    I_h = phi_h'(0)           the first-order estimate: what influence predicts
    Q_h = phi_h''(0) / 2      the next term, so |Q_h| estimates its error |D_h - I_h|
    rho_h = |Q_h| / |I_h|     the predicted relative error;  I_h + Q_h: the corrected prediction

With theta1, theta2 the first and second tangent of the parameters after h updates, and L the target
loss, the chain rule gives, for every h from one pass along the window and without retraining,

    phi_h'  = grad L . theta1
    phi_h'' = theta1 . (Hessian of L) theta1 + grad L . theta2

Their recursions, update by update, stand in `tangents`. This formula is this project's own
derivation. An error proxy is proposed by Deng et al. 2026 (arXiv 2605.18814); its formula is not
known to this project, and no claim is made that the two are the same.

Three changes, one mechanism (`perturbations`): one example is removed from the first update, all
batches of the window are exchanged for selected ones, the learning rate grows.

*h = 0* is the immediate horizon: no update is simulated, so the target loss is read at the present
parameters, moved by what the change of weights makes of the next update through the present
preconditioner (`Update.immediate`, a diagonal matrix P that contains -lr):

    phi_0(alpha) = L(theta + alpha P dg)      dg = sum_i dw_i grad loss_i(theta)

I_0 = gamma . dg is then what horizon 0 scores by, Q_0 the curvature of the target along the move.
A learning rate moves no example: its effect at h = 0 is 0.

*The fast form* needs no tangents. Rolling the window out at alpha = 0, a and 1 and reading the
target loss after each update gives D_h(a) and D_h = D_h(1), and the parabola through them,

    I_h = (D_h(a) / a - a D_h) / (1 - a)      Q_h = D_h - I_h

are right up to third order: of D_h(alpha) = I alpha + Q alpha^2 + C alpha^3 they find I - a C and
Q + (1 + a) C. For a small, Q_h is the error D_h - I_h itself, higher orders included; a = 1/2
would be kinder to rounding, but in float32 a = 1/10 loses nothing to it yet (`MIDDLE`).
A window of h updates costs the gradients of h nominal, h selected and h - 1 joint batches, and
three readings of the target loss, forward only.

*How far it holds.* One example is a small change: |Q_h| is close to its true error at every horizon
and learning rate. A selection is a large one: I_h + Q_h is right while rho_h is well below 1/2, and
above that third order counts as much; the fast form, which really makes the change, still knows the
error. `selectflow audit configs/audit_proxy_mlp.yaml` measures both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selectflow.core.batches import Batch
from selectflow.core.derivatives import Derivatives
from selectflow.core.optim import State
from selectflow.core.tangents import StateTangents, advance, loss_tangents
from selectflow.core.update import Update, after_skipping
from selectflow.core.weight_changes import Perturbation, rollout, weighted_gradient

ProxyMethod = Literal["exact", "fast"]

# The a of the fast form, chosen by measurement (GELU MLP, selections of one look-ahead, h 1 .. 4):
# the median error of I is 2.9% at 1/2, 1.6% at 1/4, 0.7% at 1/10 and 0.4% at 1/20, the states and
# losses in float32; the largest at lr 1e-4, where rounding counts most, 4.0, 2.4, 1.1 and 1.2%.
MIDDLE = 0.1
_RESOLUTION = 1 / MIDDLE  # roundings of the target loss that I may be off by in the fast form


# --- the closed form ------------------------------------------------------------------------


def closed_form(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    target: Batch,
    horizons: Collection[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """I_h and Q_h for every h, from one pass of tangents along the window.

    Args:
        derivatives: of the training loss.
        updates: H >= 1 updates, in order.
        state: the state before the first.
        perturbation: H batches and their M shifts.
        target: batch whose mean loss is the target.
        horizons: where it is read, rising; None: 0 .. H.

    Returns:
        I and Q, both of shape (M, number of horizons). Units: target loss.
    """
    objective = derivatives.objective
    motions = enumerate(_motions(derivatives, updates, state, perturbation))
    with objective.scoring():
        read = [
            loss_tangents(objective, motion, target)
            for horizon, motion in motions
            if horizons is None or horizon in horizons
        ]
    first = torch.stack([first.mean(1) for first, _ in read], 1)
    return first, torch.stack([second.mean(1) / 2 for _, second in read], 1)


def _motions(
    derivatives: Derivatives, updates: Sequence[Update], state: State, perturbation: Perturbation
) -> Iterator[StateTangents]:
    """The motion of horizon 0, then that after each update."""
    perturbation = perturbation.beside(state)
    motion = StateTangents.at_rest(state, perturbation.num_rows)
    _, change = derivatives.gradients(
        state.params, perturbation.batches[0], perturbation.shifts[0].weights
    )
    move = updates[0].immediate(state, change)
    yield motion._replace(first=motion.first._replace(params=move))
    steps = zip(perturbation.batches, perturbation.shifts, strict=True)
    for index, (batch, shift) in enumerate(steps):
        used = weighted_gradient(derivatives, motion.value.params, batch, shift.base)
        updates = after_skipping(updates, index, used)
        motion = advance(updates[index], derivatives.objective, motion, batch, shift, used)
        yield motion


# --- the probe of the live loop --------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """What a change of training does to the target loss, by horizon, and how well I predicts it.

    Attributes:
        horizons: those that were read, rising.
        nominal: target loss after h nominal updates.
        first: I_h. Negative: the change lowers the target loss.
        second: Q_h.
        effect: D_h, really rolled out.
        stopped: why horizons that were asked for are missing; None: none is.
        rounding: relative rounding of the losses' type.
        seconds: what the probe took.
    """

    horizons: tuple[int, ...]
    nominal: tuple[float, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    effect: tuple[float, ...]
    stopped: str | None
    rounding: float
    seconds: float

    @property
    def resolution(self) -> tuple[float, ...]:
        """The smallest change of the target loss that its type can tell from none."""
        return tuple(_RESOLUTION * self.rounding * abs(loss) for loss in self.nominal)

    @property
    def corrected(self) -> tuple[float, ...]:
        """I_h + Q_h."""
        return tuple(map(sum, zip(self.first, self.second, strict=True)))

    @property
    def relative_error(self) -> tuple[float, ...]:
        """rho_h = |Q_h| / |I_h|, finite always.

        An I_h below the resolution counts as the resolution: a change that does nothing has a
        relative error near 0, one that first order does not see has a very large one.
        """
        return tuple(map(relative_error, self.first, self.second, self.resolution))

    @property
    def trust_ratio(self) -> tuple[float, ...]:
        """D_h / I_h, finite always; 1: first order is right, 0 or less: it has the wrong sign.

        An I_h below the resolution counts as the resolution. A change that neither is predicted to
        do anything nor does is predicted rightly.
        """
        return tuple(map(_trust_ratio, self.first, self.effect, self.resolution))


def _trust_ratio(first: float, effect: float, resolution: float) -> float:
    if max(abs(first), abs(effect)) <= resolution:
        return 1.0
    return effect / math.copysign(max(abs(first), resolution), first)


def relative_error(first: float, second: float, resolution: float) -> float:
    """|Q| / max(|I|, resolution); 0 where Q = 0."""
    return abs(second) / max(abs(first), resolution, math.ulp(0.0)) if second else 0.0


class _Reading(NamedTuple):
    nominal: float
    first: float
    second: float
    effect: float


def probe(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    target: Batch,
    *,
    method: ProxyMethod = "fast",
    horizons: Collection[int] | None = None,
    limit: float = math.inf,
) -> Proxy:
    """First and second order of one change, and its real effect, at every horizon of a window.

    Args:
        derivatives: of the training loss.
        updates: H >= 1 updates, in order.
        state: the state before the first; is not changed.
        perturbation: H batches and their one shift, as `selection` or `learning_rate` makes it.
        target: batch whose mean loss is the target.
        method: "fast" rolls the window out three times, "exact" takes the closed form.
        horizons: where the target loss is read, in [0, H]; None: everywhere.
        limit: the pass ends at the first horizon whose relative error is above it.

    Returns:
        The quantities at the horizons that were reached. A window whose losses stop being finite
        ends there, and `stopped` says so.

    Raises:
        ValueError: an argument out of its range.
        FloatingPointError: not even the first horizon could be read.
    """
    began = time.perf_counter()
    wanted = _checked(updates, perturbation, method, horizons, limit)
    read = _read_exact if method == "exact" else _read_fast
    found: dict[int, _Reading] = {}
    stopped = None
    rounding = torch.finfo(next(iter(state.params.values())).dtype).eps
    with derivatives.objective.scoring():
        try:
            for horizon, reading in read(derivatives, updates, state, perturbation, target, wanted):
                found[horizon] = reading
                resolution = _RESOLUTION * rounding * abs(reading.nominal)
                error = relative_error(reading.first, reading.second, resolution)
                if horizon == max(wanted):
                    break
                if error > limit:
                    stopped = f"relative error {error:.3g} above {limit:g} at horizon {horizon}"
                    break
        except FloatingPointError as error:
            if not found:
                raise
            stopped = f"after horizon {max(found)}: {error}"
    columns = zip(*found.values(), strict=True)
    nominal, first, second, effect = (tuple(column) for column in columns)
    seconds = time.perf_counter() - began
    return Proxy(tuple(found), nominal, first, second, effect, stopped, rounding, seconds)


def _read_fast(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    target: Batch,
    wanted: Collection[int],
) -> Iterator[tuple[int, _Reading]]:
    rolled = rollout(derivatives, updates, state, perturbation, (0.0, MIDDLE, 1.0))
    for horizon, states in enumerate(rolled):
        if horizon in wanted:
            with derivatives.group.together():
                losses = [derivatives.losses(at.params, target).double() for at in states]
            means = torch.stack([losses[0].mean(), *((x - losses[0]).mean() for x in losses[1:])])
            nominal, part, effect = derivatives.group.mean(means).tolist()
            first = (part / MIDDLE - MIDDLE * effect) / (1 - MIDDLE)
            yield horizon, _finite(nominal, first, effect - first, effect)


def _read_exact(
    derivatives: Derivatives,
    updates: Sequence[Update],
    state: State,
    perturbation: Perturbation,
    target: Batch,
    wanted: Collection[int],
) -> Iterator[tuple[int, _Reading]]:
    motions = _motions(derivatives, updates, state, perturbation)
    rolled = rollout(derivatives, updates, state, perturbation, (1.0,))
    for horizon, (motion, (end,)) in enumerate(zip(motions, rolled, strict=True)):
        if horizon in wanted:
            nominal = derivatives.losses(motion.value.params, target).double()
            effect = (derivatives.losses(end.params, target).double() - nominal).mean()
            first, second = loss_tangents(derivatives.objective, motion, target)
            terms = float(first.double().mean()), float(second.double().mean()) / 2
            yield horizon, _finite(float(nominal.mean()), *terms, float(effect))


def _finite(*values: float) -> _Reading:
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(
            "the target loss and its derivatives must be finite, got nominal loss, I, Q and D of "
            + ", ".join(f"{value:g}" for value in values)
        )
    return _Reading(*values)


def _checked(
    updates: Sequence[Update],
    perturbation: Perturbation,
    method: str,
    horizons: Collection[int] | None,
    limit: float,
) -> frozenset[int]:
    """The horizons to read."""
    longest = len(updates)
    wanted = frozenset(range(longest + 1) if horizons is None else horizons)
    if not longest or len(perturbation) != longest:
        raise ValueError(
            f"updates must be at least one, and as many as the {len(perturbation)} batches, "
            f"got {longest}"
        )
    if perturbation.num_rows != 1:
        raise ValueError(
            f"perturbation must be one change, got {perturbation.num_rows}; `closed_form` takes "
            "several"
        )
    if method not in ("exact", "fast"):
        raise ValueError(f"method must be 'exact' or 'fast', got {method!r}")
    if not wanted or min(wanted) < 0 or max(wanted) > longest:
        raise ValueError(
            f"horizons must be in [0, {longest}], the updates given, got {sorted(wanted)}"
        )
    if not limit >= 0:
        raise ValueError(f"limit must be >= 0, got {limit}")
    return wanted
