"""States and updates away from where they are used: on the CPU, on disk, in checkpoints.

`keeping` says where the states of a rollout wait for the sweep back. On disk a state is one
safetensors file, written beside its place and moved there when it is complete, and memory-mapped
when it is read. An update is plain numbers and names.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from selectflow.core.files import atomic_file
from selectflow.core.optim import SGD, AdamW, Rule, State
from selectflow.core.params import Params
from selectflow.core.update import Update

Offload = Literal["none", "cpu", "disk"]
Fetch = Callable[[], State]
Keep = Callable[[State], Fetch]
"""Takes a state away; what it returns brings it back, once, bit for bit and where it was."""


@contextmanager
def keeping(offload: Offload) -> Iterator[Keep]:
    """How states are kept; what is left of them is gone afterwards, also after an exception.

    Args:
        offload: "none" leaves them on their device; "cpu" moves them to main memory, which is no
            change where the training runs there; "disk" writes them to files in a folder of its own
            where the system has temporary ones (set TMPDIR where that is memory, too).
    """
    if offload == "disk":
        with tempfile.TemporaryDirectory(
            prefix="selectflow-", ignore_cleanup_errors=True
        ) as folder:
            yield _OnDisk(Path(folder))
    else:
        yield in_place if offload == "none" else _on_cpu


def in_place(state: State) -> Fetch:
    """Leave a state where it is."""
    return lambda: state


def _on_cpu(state: State) -> Fetch:
    devices = _devices(state)
    moved = State(*(part.map(lambda tensor: tensor.cpu()) for part in state))
    return lambda: _placed(moved, devices)


class _OnDisk:
    """Writes each part of a state to a file, so that no more than one part is copied at once."""

    def __init__(self, folder: Path) -> None:
        self._paths = (folder / f"{number:08d}.safetensors" for number in count())

    def __call__(self, state: State) -> Fetch:
        devices = _devices(state)
        paths = []
        for part in state:
            path = next(self._paths)
            write_state(path, State(part, Params(), Params()))
            paths.append(path)

        def fetch() -> State:
            parts = [read_state(path).params for path in paths]
            for path in paths:
                with suppress(PermissionError):  # still mapped, on Windows
                    path.unlink()
            return _placed(State(*parts), devices)

        return fetch


def _devices(state: State) -> list[dict[str, str]]:
    return [{name: str(tensor.device) for name, tensor in part.items()} for part in state]


def _placed(state: State, devices: list[dict[str, str]]) -> State:
    parts = (
        Params((name, part[name].to(device)) for name, device in where.items())
        for part, where in zip(state, devices, strict=True)
    )
    return State(*parts)


# --- files --------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there complete or not at all.

    Raises:
        OSError: it could not be written (disk full, no permission); names the file.
    """
    try:
        with atomic_file(path, durable=True) as file:
            file.write(content)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}) and was left out; free space there, "
            "lower limit_gib or choose another folder",
        ) from error


def write_state(path: Path, state: State) -> None:
    """Write a state as one safetensors file.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    from safetensors.torch import save  # noqa: PLC0415

    tensors: dict[str, Tensor] = {
        f"{field}/{name}": tensor.detach().contiguous()
        for field, params in state._asdict().items()
        for name, tensor in params.items()
    }
    write_whole(path, save(tensors))


def read_state(path: Path) -> State:
    """The state in a file of `write_state`, memory-mapped, on the CPU.

    Raises:
        OSError: the file is missing or not whole.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    parts: dict[str, Params] = {field: Params() for field in State._fields}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                field, name = key.split("/", 1)
                parts[field][name] = file.get_tensor(key)
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"{path} must be a whole snapshot, got: {error}; record again") from error
    order = list(parts["params"])
    return State(*(part.pick([name for name in order if name in part]) for part in parts.values()))


# --- updates ------------------------------------------------------------------------------------

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
