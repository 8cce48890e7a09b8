"""The command line that the programs in trainers/ have in common."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence

import torch

from selectflow.options import ConfigError
from selectflow.run.config import RunConfig, load
from selectflow.run.loop import train
from selectflow.run.task import Task


def trainer_main(
    arguments: Sequence[str], build_task: Callable[[RunConfig], Task], usage: str | None
) -> int:
    """Run a configuration.

    Args:
        arguments: of the command line: the YAML file and `key=value` overrides.
        build_task: makes the model and its data; the same for the same configuration.
        usage: printed when asked for, or where there are no arguments.

    Returns:
        0, or 2 with a message where the input is at fault.
    """
    print_anything()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("selectflow").setLevel(logging.INFO)
    try:
        config = load(arguments[0], arguments[1:])
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        run_dir = train(config, build_task(config))
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {run_dir}")
    return 0


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that the configuration knows, but this trainer does not.

    Raises:
        ConfigError: `value` is not among `choices`.
    """
    if value not in choices:
        raise ConfigError(
            f"{key} must be one of {', '.join(choices)} for this trainer, got {value!r}; the "
            "others belong to another program in trainers/"
        )


def print_anything() -> None:
    """From here on, print a character that stdout cannot encode as its escape in Python source.

    A run must not end because a terminal, a pipe or a log cannot show a character of its data.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
