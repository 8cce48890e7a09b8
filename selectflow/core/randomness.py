"""The global random generators, read and put back together."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
        numpy = np.random.get_state()  # noqa: NPY002
        return cls(random.getstate(), numpy, torch.get_rng_state(), gpus)

    def put_back(self) -> None:
        """Let the generators be in these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        for index, state in enumerate(self.gpus):
            torch.cuda.set_rng_state(state, index)
