"""The shares of the sources of a stream, pool by pool: fixed, scheduled, or following a selection.

The shares of a pool depend on its number and on what was reported of the pools up to `delay`
before it. So they are the same whoever draws the pool and when: a look-ahead, workers that read
ahead, or a stream that was resumed.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from selectflow.control.shares import (
    AutoShares,
    ShareSchedule,
    live_shares,
    log_rates,
    loss_gains,
)
from selectflow.data.fields import Ints
from selectflow.data.manifest import DataError

Floats = npt.NDArray[np.float64]

ShareOptions = Mapping[str, float] | ShareSchedule | AutoShares | Literal["size", "auto", "loss"]


def checked_shares(given: ShareOptions | None, names: Sequence[str]) -> ShareOptions | None:
    """The option `shares` of a stream of these sources; "auto" and "loss" as their settings.

    Raises:
        DataError: it is no such option, or of other sources.
    """
    if given is None:
        return None
    if len(names) < 2:
        raise DataError(
            f"shares must be of several sources, got {given!r} for one; name the sources as in "
            '{"web": ..., "books": ...}, give `by`, or leave shares out'
        )
    if given in ("auto", "loss"):
        given = AutoShares() if given == "auto" else AutoShares(follow="loss")
    if isinstance(given, ShareSchedule):
        if set(given.points[0][1]) != set(names):
            raise _of_others(names, dict(given.points[0][1]))
    elif isinstance(given, AutoShares):
        if given.start is not None:
            _check_mapping(given.start, names)
    elif isinstance(given, Mapping):
        _check_mapping(given, names)
    elif given != "size":
        raise DataError(
            "shares must be a number for each source, 'size', 'auto', 'loss', AutoShares or "
            f"ShareSchedule, got {given!r}; leave it out for one epoch over all of them"
        )
    return given


def _check_mapping(shares: Mapping[str, float], names: Sequence[str]) -> None:
    if set(shares) != set(names) or not all(0 < shares[name] < np.inf for name in names):
        raise _of_others(names, dict(shares))


def _of_others(names: Sequence[str], got: Mapping[str, float]) -> DataError:
    return DataError(
        f"shares must be a positive number for each of the sources {list(names)}, got {got}; "
        "leave it out for one epoch over all of them"
    )


def plain_shares(given: ShareOptions | None) -> Any:
    """The option as JSON can hold it."""
    if isinstance(given, AutoShares):
        return {name: value for name, value in asdict(given).items() if value is not None}
    if isinstance(given, ShareSchedule):
        points = [[pool, dict(shares)] for pool, shares in given.points]
        return {"points": points, "shape": given.shape}
    return dict(given) if isinstance(given, Mapping) else given


class Selected(Protocol):
    """What a stream reads of a selection, as of `selectflow.strategies.Selection`.

    Attributes:
        pool: as the stream gave it.
        indices: positions kept in it.
        scores: of each candidate; None: nothing was scored.
        losses: of each candidate, None where they are not known.
        is_ranked: whether the scores tell the candidates apart.

    One with `weighing` also has weights of what was kept: that of weight 0 is not trained on.
    """

    @property
    def pool(self) -> Any: ...
    @property
    def indices(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor | None: ...
    @property
    def losses(self) -> Tensor | None: ...
    @property
    def is_ranked(self) -> bool: ...


class Shares:
    """The shares of each pool.

    Args:
        option: of `checked_shares`.
        names: of the sources.
        sizes: samples of each, shape (S,).
    """

    def __init__(self, option: ShareOptions, names: Sequence[str], sizes: Ints) -> None:
        self._names, self._schedule = names, option if isinstance(option, ShareSchedule) else None
        self._live = option if isinstance(option, AutoShares) else None
        start = self._live.start if self._live else option
        shares = [start[name] for name in names] if isinstance(start, Mapping) else sizes
        self._start: Floats = np.array(shares) / np.sum(shares)
        self._places = {name: place for place, name in enumerate(names)}
        self._counts: Floats = np.zeros((2, len(names)))  # n of the rule, and k or sums of losses
        self.num_told = 0  # pools
        # before the last `delay` pools that were told of, and after each of them
        first = tuple(self._start.tolist())
        self._recent = deque([first], 1 + self._live.delay if self._live else 1)

    @property
    def follows(self) -> Literal["kept", "loss"] | None:
        """What they follow; None: they do not."""
        return self._live.follow if self._live else None

    @property
    def delay(self) -> int | None:
        """Pools between a selection and the first that may follow it; None: they follow nothing."""
        return self._live.delay if self._live else None

    def at(self, pool: int) -> Floats:
        """The shares of a pool, counted from 0, in sum 1, shape (S,).

        Raises:
            DataError: too little was told of the pools before it, or it is long past.
        """
        if self._schedule is not None:
            return self._schedule.at(pool, self._names)
        if self._live is None:
            return self._start
        told = max(0, pool - self._live.delay)
        if told > self.num_told:
            raise DataError(
                f"the shares of pool {pool} follow what was kept of the first {told} pools, but "
                f"of {self.num_told} alone the stream was told; call follow(selector.last) after "
                "each selection (`Selector.stream`, and the Trainer and Lightning with selection, "
                "do so where they are given the stream itself), "
                "or raise AutoShares(delay=), if workers and the look-ahead draw further ahead"
            )
        place = told - self.num_told - 1
        if -place > len(self._recent):
            raise DataError(
                f"pool {pool} must not be drawn again after {self.num_told} pools were told of; "
                "resume with the state of the stream from before"
            )
        return np.array(self._recent[place])

    def counts_of(self, selection: Selected) -> Floats:
        """What a selection says of each source, shape (2, S); 0 where it says nothing.

        Returns:
            Candidates that were scored, and those of them that were kept, or their losses' sum.

        Raises:
            DataError: its pool has lost its "source".
        """
        weights = self._weights_of(selection)
        if weights is None:
            return np.zeros((2, len(self._names)))
        if "source" not in selection.pool:
            raise DataError(
                "pools must keep the list 'source' that the stream gives them for live shares, got "
                f"{sorted(selection.pool)}; leave it in"
            )
        places = [self._places[name] for name in selection.pool["source"]]
        found = [np.bincount(places, each, len(self._names)) for each in (None, weights)]
        return np.array(found, dtype=np.float64)

    def _weights_of(self, selection: Selected) -> Floats | None:
        """What counts of each candidate: its loss, or whether it was kept; None: nothing does."""
        if self.follows == "loss":
            losses = selection.losses
            return None if losses is None else losses.double().numpy()
        if selection.scores is None or not selection.is_ranked:
            return None
        kept = np.zeros(len(selection.scores))
        weights = getattr(selection, "weighing", None)
        kept[selection.indices.numpy()] = 1.0 if weights is None else (weights.values > 0).cpu()
        return kept

    def tell(self, counts: Floats) -> None:
        """Let the shares follow `counts_of` the next pool, of all processes; 0: they stay."""
        assert self._live is not None
        self.num_told += 1
        if counts[0].any():
            self._counts = (1 - 1 / self._live.memory) * self._counts + counts
            self._recent.append(self._newest())
        else:
            self._recent.append(self._recent[-1])

    def _newest(self) -> tuple[float, ...]:
        assert self._live is not None
        gain = log_rates if self._live.follow == "kept" else loss_gains
        num, sums = self._counts
        gains = gain(num, sums, self._live.prior)
        return tuple(live_shares(self._start, gains, self._live).tolist())

    def now(self, pool: int) -> dict[str, float]:
        """The newest shares that are known once `pool` pools were drawn, by source."""
        newest = self._recent[-1] if self._live else self.at(pool).tolist()
        return dict(zip(self._names, newest, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the shares of later pools depend on; {} where they follow nothing."""
        if self._live is None:
            return {}
        return {
            "num_told": self.num_told,
            "counts": self._counts.tolist(),
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after `state_dict`, which may lack the last sources: they begin now.

        Raises:
            KeyError, TypeError, ValueError: it is no such state.
        """
        if self._live is None:
            return
        counts = np.array(state["counts"], dtype=np.float64)
        new = len(self._names) - counts.shape[1]
        self._counts = np.pad(counts, ((0, 0), (0, new)))
        self.num_told = int(state["num_told"])
        self._recent.clear()
        self._recent += [(*map(float, each), *[0.0] * new) for each in state["recent"]]
        if new:
            self._recent[-1] = self._newest()
