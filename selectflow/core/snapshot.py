"""What a forward pass may write besides parameters: buffers, attributes and random generators."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_versions


@dataclass(frozen=True)
class Randomness:
    """States of the global generators: Python's, numpy's, torch's on the CPU and on GPUs in use."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpus: list[Tensor]

    @classmethod
    def now(cls) -> Randomness:
        """The states as they are."""
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        gpus = torch.cuda.get_rng_state_all() if in_use else []
        numpy = list(np.random.get_state())  # noqa: NPY002
        return cls(random.getstate(), numpy, torch.get_rng_state(), gpus)

    def put_back(self) -> None:
        """Let the generators be in these states."""
        # To look is quicker than to write: a draw moves the place, and at its end all words.
        if _marks(random.getstate()) != _marks(self.python):
            random.setstate(self.python)
        _, keys, *place = np.random.get_state()  # noqa: NPY002
        if place != self.numpy[2:] or keys[0] != self.numpy[1][0]:
            np.random.set_state(tuple(self.numpy))  # noqa: NPY002
        if not torch.equal(torch.get_rng_state(), self.cpu):
            torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.gpus):
            torch.cuda.set_rng_state(state, index)


def _marks(state: Any) -> tuple[Any, ...]:
    _, words, gauss = state
    return words[-1], words[0], gauss


@dataclass
class Snapshot:
    """What a forward pass may write besides parameters, as it was.

    Attributes:
        buffers: of each module: those there were, and copies of what they held.
        tensors: of each module: its plain attributes that are tensors.
        generators: the global random generators, so that every pass draws the same.
    """

    buffers: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor], dict[str, int]]]
    tensors: list[tuple[dict[str, Any], dict[str, Tensor]]]
    generators: Randomness

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """A model's buffers and attributes, and the generators, as they are."""
        buffers, tensors = [], []
        for module in model.modules():
            if found := {k: b for k, b in module._buffers.items() if b is not None}:
                copies = {name: buffer.detach().clone() for name, buffer in found.items()}
                versions = {name: buffer._version for name, buffer in found.items()}
                buffers.append((module, dict(module._buffers), copies, versions))
            attributes = vars(module)
            tensors.append(
                (attributes, {k: v for k, v in attributes.items() if isinstance(v, Tensor)})
            )
        return cls(buffers, tensors, Randomness.now())

    def put_back(self) -> None:
        """Let everything be as it was."""
        for module, found, copies, versions in self.buffers:
            for name, copy in copies.items():
                buffer = found[name]
                assert buffer is not None
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if buffer._version != versions[name]:
                    with preserve_versions(buffer), torch.no_grad():
                        buffer.copy_(copy)
                    torch._C._autograd._unsafe_set_version_counter((buffer,), (versions[name],))
        for attributes, kept in self.tensors:
            now = {name for name, value in attributes.items() if isinstance(value, Tensor)}
            for name in now - kept.keys():
                del attributes[name]
            for name, value in kept.items():
                if attributes.get(name) is not value:
                    attributes[name] = value
        self.generators.put_back()
