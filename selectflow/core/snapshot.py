"""What a forward pass may write besides parameters: buffers, attributes and random generators."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_NUMPY_BYTES = 625 * 4  # of a Mersenne twister: 624 words and the place among them


@dataclass(frozen=True)
class Randomness:
    """States of the global generators: Python's, numpy's, torch's on the CPU and on GPUs in use."""

    python: Any
    numpy: _Numpy
    cpu: Tensor
    gpus: list[Tensor]

    @classmethod
    def now(cls) -> Randomness:
        """The states as they are."""
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        gpus = torch.cuda.get_rng_state_all() if in_use else []
        return cls(random.getstate(), _Numpy.now(), torch.get_rng_state(), gpus)

    def put_back(self) -> None:
        """Let the generators be in these states."""
        # To look is quicker than to write.
        if _marks(random.getstate()) != _marks(self.python):
            random.setstate(self.python)
        self.numpy.put_back()
        if not torch.equal(torch.get_rng_state(), self.cpu):
            torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.gpus):
            torch.cuda.set_rng_state(state, index)


def _marks(state: Any) -> tuple[Any, ...]:
    """What any draw changes: the place, or at its end all words; a second normal number."""
    _, words, gauss = state
    return words[-1], words[0], gauss


class _Numpy(NamedTuple):
    """numpy's global generator: its state, and its words in memory where those tell all draws.

    To ask numpy for the state takes longer than a small layer, to compare memory does not.
    """

    state: tuple[Any, ...]
    source: Any
    words: bytes

    @classmethod
    def now(cls) -> _Numpy:
        state: Any = np.random.get_state()  # noqa: NPY002
        source = np.random.mtrand._rand._bit_generator
        # The second normal number of a pair is drawn without a trace in the words.
        is_told = state[0] == "MT19937" and not state[3]
        return cls(state, source, _words(source) if is_told else b"")

    def put_back(self) -> None:
        if not self.words or _words(self.source) != self.words:
            np.random.set_state(self.state)  # noqa: NPY002


def _words(source: Any) -> bytes:
    return ctypes.string_at(source.ctypes.state_address, _NUMPY_BYTES)


class _Written(NamedTuple):
    """One module: its buffers, copies of what they held with versions, and its attributes.

    `identities` are the attributes' ids: where they are the same, no attribute has changed.
    """

    module: nn.Module
    buffers: dict[str, Tensor | None]
    copies: dict[str, tuple[Tensor, int]]
    attributes: dict[str, Any]
    identities: list[int]


@dataclass
class Snapshot:
    """What a forward pass may write besides parameters, as it was.

    Attributes:
        modules: their buffers and attributes.
        generators: the global random generators, so that every pass draws the same.
    """

    modules: list[_Written]
    generators: Randomness

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """A model's buffers and attributes, and the generators, as they are."""
        modules = []
        for module in model.modules():
            buffers = dict(module._buffers)
            copies = {
                k: (b.detach().clone(), b._version) for k, b in buffers.items() if b is not None
            }
            attributes = dict(vars(module))
            modules.append(_Written(module, buffers, copies, attributes, _identities(module)))
        return cls(modules, Randomness.now())

    def put_back(self) -> None:
        """Let everything be as it was."""
        for written in self.modules:
            if written.buffers or written.module._buffers:
                _put_back_buffers(written)
            if _identities(written.module) != written.identities:
                _put_back_tensors(vars(written.module), written.attributes)
        self.generators.put_back()


def _identities(module: nn.Module) -> list[int]:
    return list(map(id, vars(module).values()))


def _put_back_buffers(written: _Written) -> None:
    live = written.module._buffers
    for name in live.keys() - written.buffers.keys():  # registered in forward
        delattr(written.module, name)
    for name, buffer in written.buffers.items():
        if live.get(name) is not buffer:
            live[name] = buffer
        if buffer is not None and buffer._version != written.copies[name][1]:
            copy, version = written.copies[name]
            with torch.no_grad():
                buffer.copy_(copy)
            torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))


def _put_back_tensors(live: dict[str, Any], before: dict[str, Any]) -> None:
    """Attributes that are or were tensors; all others are the module's own business."""
    for name in [k for k, value in live.items() if isinstance(value, Tensor)]:
        if name not in before:
            del live[name]
        elif live[name] is not before[name]:
            live[name] = before[name]
    for name, value in before.items():
        if isinstance(value, Tensor) and live.get(name) is not value:
            live[name] = value
