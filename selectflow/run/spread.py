"""Models over the processes of a job, by torch: joined, laid out, saved and loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from selectflow.core.wrappers import unwrap
from selectflow.distributed import ALONE, Group, here, is_sharded, num_processes

Parallel = Literal["ddp", "fsdp2"]


@contextmanager
def joined(device: torch.device, timeout_s: float = 600.0) -> Iterator[Group]:
    """The processes that torchrun has started, joined for as long as the context lasts.

    Alone where torchrun has started none. A group that the caller has joined before is used.

    Args:
        device: where this process computes; of several with CUDA the current one from here on.
        timeout_s: a process that waits longer for another in a collective raises.
    """
    if num_processes() > 1:
        yield here()
        return
    if not dist.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield here()
    finally:
        dist.destroy_process_group()


def local_rank() -> int | None:
    """The number that torchrun gave this process among those of its machine; None: alone."""
    rank = os.environ.get("LOCAL_RANK")
    return int(rank) if rank and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def spread(model: nn.Module, parallel: Parallel, device: torch.device) -> nn.Module:
    """A model laid out over all processes that are joined.

    Args:
        model: the same in all of them; fsdp2 changes it in place.
        parallel: ddp: whole in each; fsdp2: sharded, its repeated blocks one by one, and the rest.
        device: of this process.
    """
    if parallel == "ddp":
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model.to(device), device_ids=ids)
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    mesh = init_device_mesh(device.type, (num_processes(),))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(device)  # what has no parameters


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model stacks, as transformers: those of lists of modules of one class.

    A module without others inside is no block: its parent may use its parameters itself.
    """
    if isinstance(model, nn.ModuleList) and len({type(block) for block in model}) == 1:
        blocks = [block for block in model if any(True for _ in block.children())]
        return [block for block in blocks if any(True for _ in block.parameters())]
    return [block for child in model.children() for block in repeated_blocks(child)]


def unsynced(model: nn.Module) -> AbstractContextManager[object]:
    """Backward passes that DistributedDataParallel adds up before one of them is averaged."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


# --- saved states ---------------------------------------------------------------------------------


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state of a model; of a sharded one put together, on the CPU, where the rank is 0.

    All processes have to ask for it.
    """
    from torch.distributed.checkpoint import state_dict as states  # noqa: PLC0415

    model = unwrap(model)
    if not any(map(is_sharded, model.parameters())):
        return model.state_dict()
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return states.get_model_state_dict(model, options=options)


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the states of a model and its optimizer, each process a part.

    Raises:
        OSError: a part cannot be written; in all processes.
    """
    from torch.distributed.checkpoint import state_dict as states  # noqa: PLC0415
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    of_model, of_optimizer = states.get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    try:
        save(state, checkpoint_id=folder)
    except CheckpointException as error:
        raise OSError(f"checkpoint {folder} cannot be written: {error}") from error


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what `save_state` wrote, in any number of processes."""
    from torch.distributed.checkpoint import state_dict as states  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    of_model, of_optimizer = states.get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    with warnings.catch_warnings():  # that there are no other processes
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, checkpoint_id=folder)
    states.set_state_dict(
        model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer
    )


def load_whole_state(state: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Load the `state_dict` of the model and the optimizer of one process, which trained alone."""
    from torch.distributed.checkpoint import state_dict as states  # noqa: PLC0415

    names = [name for name, param in unwrap(model).named_parameters() if param.requires_grad]
    saved = state["optimizer"]
    of_optimizer: Any = {
        "state": {names[place]: values for place, values in saved["state"].items()},
        "param_groups": [
            group | {"params": [names[place] for place in group["params"]]}
            for group in saved["param_groups"]
        ],
    }
    options = states.StateDictOptions(full_state_dict=True)
    states.set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=of_optimizer,
        options=options,
    )
