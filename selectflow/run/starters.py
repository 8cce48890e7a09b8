"""A trainer and its configurations, copied into a user's own folder.

They are those of the repository's `trainers/` and `configs/`. `selectflow/starters/` has links to
these folders, which become files of a package.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

# kind -> its files, the one to begin with first among the configurations
_FILES = {
    "vision": (
        "trainers/vision.py", "configs/digits_online.yaml", "configs/digits_uniform.yaml",
        "configs/digits_adaptive.yaml", "configs/digits_offline.yaml", "configs/sweep_digits.yaml",
    ),
    "language": (
        "trainers/language.py", "configs/text_online.yaml", "configs/text_uniform.yaml",
    ),
}  # fmt: skip
KINDS = tuple(_FILES)


class StarterError(ValueError):
    """A folder that starters cannot be written to; the message says why."""


def write_starter(kind: str, folder: Path) -> list[Path]:
    """Write a trainer and commented configurations, which run from that folder as they stand.

    Returns:
        The files, the trainer first, then the configuration to begin with.

    Raises:
        StarterError: one of them is there already; none is written.
        OSError: a file cannot be written.
    """
    packaged = files("selectflow") / "starters"
    paths = {name: folder / name for name in _FILES[kind]}
    if held := [str(path) for path in paths.values() if path.exists()]:
        raise StarterError(
            f"folder must hold none of the files that are written, got {', '.join(held)}; name "
            "another folder, or move them away"
        )
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packaged.joinpath(name).read_bytes())
    return list(paths.values())
