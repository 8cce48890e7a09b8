"""Record the public names: what a user's own program may rely on.

    .venv/bin/python tests/golden/public.py        # writes public.json anew

`tests/test_golden.py` compares them. A name that changes needs a reason, and a line in
CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PUBLIC = Path(__file__).with_name("public.json")


def names() -> dict[str, Any]:
    """Parameters of the public callables, options of the commands, keys of a configuration."""
    import typer  # noqa: PLC0415

    import selectflow  # noqa: PLC0415
    from selectflow import Selector, audit  # noqa: PLC0415
    from selectflow.audit import influence, leave_one_out  # noqa: PLC0415
    from selectflow.cli import app  # noqa: PLC0415
    from selectflow.data import PoolStream  # noqa: PLC0415
    from selectflow.integrations.huggingface import SelectTrainerMixin  # noqa: PLC0415
    from selectflow.run.config import RunConfig  # noqa: PLC0415

    callables = {
        "Selector": Selector,
        "Selector.stream": Selector.stream,
        "Selector.select": Selector.select,
        "Selector.state_dict": Selector.state_dict,
        "Selector.load_state_dict": Selector.load_state_dict,
        "audit.record": audit.record,
        "audit.leave_one_out": leave_one_out,
        "audit.influence": influence,
        "SelectTrainerMixin": SelectTrainerMixin,
        "PoolStream": PoolStream,
    }
    return {
        "selectflow": sorted(selectflow.__all__),
        "parameters": {name: parameters(function) for name, function in callables.items()},
        "commands": dict(commands(typer.main.get_command(app))),
        "keys": dict(keys(RunConfig)),
    }


def parameters(function: Callable[..., Any]) -> list[str]:
    """Each parameter with its kind and default; annotations may be rewritten."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        value = parameter.default
        shown = getattr(value, "__name__", repr(value))  # a function by its name
        default = "" if value is parameter.empty else f" = {shown}"
        found.append(f"{parameter.name}{default} ({parameter.kind.description})")
    return found


def commands(command: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Arguments and options of each command, by its words."""
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            yield from commands(inner, f"{prefix} {word}".strip())
        return
    kinds: dict[str, list[str]] = {"argument": [], "option": []}
    for each in command.params:
        kinds[each.param_type_name] += each.opts
    yield prefix, [*kinds["argument"], *sorted(kinds["option"])]


def keys(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys of a configuration, with their defaults."""
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "required" if field.is_required() else repr(field.default)


if __name__ == "__main__":
    PUBLIC.write_text(json.dumps(names(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {PUBLIC}")
