"""What a selector found and was asked for, in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectflow.core.lookahead import LookAhead
from selectflow.core.params import Params


def plain(ahead: LookAhead) -> dict[str, Any]:
    """A look-ahead as dicts of tensors and numbers."""
    gammas = [dict(gamma) for gamma in ahead.sensitivities]
    return {"horizon": ahead.horizon, "target_loss": ahead.target_loss, "sensitivities": gammas}


def restored(saved: dict[str, Any], params: Params) -> LookAhead:
    """The look-ahead that `plain` saved, on the devices of `params`.

    Args:
        saved: what `plain` returned.
        params: the parameters that scores are taken over.

    Raises:
        ValueError: it is of other parameters.
    """
    gammas = []
    for gamma in saved["sensitivities"]:
        shapes = {name: tuple(tensor.shape) for name, tensor in gamma.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in params.items()}
        if shapes != expected:
            differing = sorted(
                name for name in shapes | expected if shapes.get(name) != expected.get(name)
            )
            raise ValueError(
                f"saved sensitivities must fit the trained parameters, got a difference in "
                f"{', '.join(differing[:5])}; load the state of the same model"
            )
        gammas.append(Params((name, gamma[name].to(params[name])) for name in params))
    return LookAhead(saved["horizon"], saved["target_loss"], gammas)


def check_same_options(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the differences, unless a saved selector had our options."""
    differing = [name for name in ours if saved[name] != ours[name]]
    if differing:
        listed = ", ".join(
            f"{name}: {saved[name]!r} saved, {ours[name]!r} here" for name in differing
        )
        raise ValueError(f"selector options must be those of the saved state, got {listed}")
