"""Updates as plain values, for recordings and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from selectflow.core.optim import SGD, AdamW, Rule, Update

_KINDS: dict[str, type[AdamW | SGD]] = {"AdamW": AdamW, "SGD": SGD}


def plain_update(update: Update) -> dict[str, Any]:
    """Lists and numbers that `restored_update` makes an equal update of."""
    return {
        "rules": [_plain_rule(rule) for rule in update.rules],
        "max_grad_norm": update.max_grad_norm,
    }


def restored_update(plain: Mapping[str, Any]) -> Update:
    """The update that `plain_update` was given."""
    rules = tuple(
        _KINDS[rule["rule"]](
            **{key: value for key, value in rule.items() if key not in ("rule", "names")},
            names=tuple(rule["names"]),
        )
        for rule in plain["rules"]
    )
    return Update(rules, plain["max_grad_norm"])


def _plain_rule(rule: Rule) -> dict[str, Any]:
    assert isinstance(rule, AdamW | SGD)
    fields = dataclasses.asdict(rule)
    return {"rule": type(rule).__name__, **fields, "names": list(rule.names)}
