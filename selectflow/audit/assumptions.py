"""What a sweep may assume of the recorded optimizer: the truth, or a common mistake about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from selectflow.core.optim import SGD, AdamW, Rule, Update


def _recorded(updates: Sequence[Update]) -> list[Update]:
    return list(updates)


def _as_sgd(updates: Sequence[Update]) -> list[Update]:
    """Theta' = theta - lr g, with the recorded learning rates."""
    return _with_rules(
        updates, lambda rule: SGD(rule.names, rule.step, rule.lr, 0.0, 0.0, 0.0, False)
    )


def _constant_lr(updates: Sequence[Update]) -> list[Update]:
    """The first learning rate throughout: the schedule is overlooked."""
    first = {name: rule.lr for rule in updates[0].rules for name in rule.names}
    return _with_rules(updates, lambda rule: _replaced(rule, lr=first[rule.names[0]]))


def _no_decay(updates: Sequence[Update]) -> list[Update]:
    """Weight decay is overlooked."""
    return _with_rules(updates, lambda rule: _replaced(rule, weight_decay=0.0))


METHODS: dict[str, Callable[[Sequence[Update]], list[Update]]] = {
    "adamw": _recorded,
    "sgd": _as_sgd,
    "constant_lr": _constant_lr,
    "no_decay": _no_decay,
}
"""Name -> the updates that a sweep takes for the recorded ones."""


def _with_rules(updates: Sequence[Update], change: Callable[[Rule], Rule]) -> list[Update]:
    return [
        dataclasses.replace(update, rules=tuple(map(change, update.rules))) for update in updates
    ]


def _replaced(rule: Rule, **changes: float) -> Rule:
    assert isinstance(rule, AdamW | SGD)
    return dataclasses.replace(rule, **changes)  # type: ignore[arg-type]
