"""Which of the trained parameters a score is taken over, by patterns of their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def scored_names(
    patterns: Sequence[str] | None, trained: Iterable[str], model: nn.Module
) -> tuple[str, ...] | None:
    """Names of the trained parameters that the patterns choose.

    A pattern is matched as a whole, with `*` for any characters. Chosen is what one of them
    matches, or everything where none chooses, less what one that begins with `!` matches:
    `["transformer.h.*"]`, `["!*.wte.*", "!*.wpe.*"]`. A tied weight goes by each of its names and
    counts once.

    Args:
        patterns: of names; None: all trained parameters.
        trained: names of the trained parameters.
        model: has the parameters, and the further names of tied ones.

    Returns:
        The chosen names, in the order of `trained`; None where there are no patterns.

    Raises:
        ValueError: a pattern matches no trained parameter, or nothing is left.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ValueError(f"params must be a list of patterns, got {patterns!r}; put it in a list")
    trained = list(trained)
    aliases = _aliases(model)
    chosen: set[str] = set()
    dropped: set[str] = set()
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        found = {
            name
            for name in trained
            if any(fnmatchcase(alias, bare) for alias in aliases.get(name, [name]))
        }
        if not found:
            raise ValueError(_no_match(pattern, bare, trained, aliases))
        (chosen if bare == pattern else dropped).update(found)
    names = tuple(name for name in trained if name in (chosen or trained) and name not in dropped)
    if not names:
        raise ValueError(
            f"params must leave a parameter to score, got {list(patterns)}, which leave none of "
            f"{len(trained)}; name fewer after '!'"
        )
    return names


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return {each[0]: each for each in names.values()}


def _no_match(pattern: str, bare: str, trained: list[str], aliases: dict[str, list[str]]) -> str:
    frozen = [name for name in aliases if name not in trained and fnmatchcase(name, bare)]
    if frozen:
        why = f"which only frozen ones match, as {frozen[0]}"
    else:
        known = [alias for name in trained for alias in aliases.get(name, [name])]
        near = difflib.get_close_matches(bare, known, n=1, cutoff=0)
        why = f"which matches none; the nearest is {near[0]!r}"
    return (
        f"params must be patterns of trained parameters' names, got {pattern!r}, {why}; "
        "* stands for any characters, as in 'transformer.h.*'"
    )
