"""The processes that train one model together, and what they agree on; the one seam to torch's.

A `Group` are the processes over which an optimizer's gradients are averaged: those of
DistributedDataParallel, or of the mesh of `fully_shard` (FSDP2). Alone, every operation is the
identity and nothing is sent. Whatever decides a branch is decided from numbers that are the same in
all processes, before a collective depends on it: reductions give all of them the same bits.

Under FSDP2 vectors of parameters are the local shards. Elementwise arithmetic needs no other
process; sums over all entries (`over_shards`) are a local sum and one reduction over the processes
that hold the shards of one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")
_BUCKET_BYTES = 2**25  # of what is reduced at once


@dataclass(frozen=True)
class Group:
    """Some processes, each with a rank in [0, size).

    Args:
        processes: torch's process group; None: this process alone.
    """

    processes: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.processes is None else dist.get_world_size(self.processes)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.processes is None else dist.get_rank(self.processes)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, as a new tensor."""
        if self.processes is None:
            return values
        total = values.detach().clone(memory_format=torch.contiguous_format)
        total = self._reachable(total)
        dist.all_reduce(total, group=self.processes)
        return total.to(values.device)

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise mean over the processes, as a new tensor."""
        return values if self.processes is None else self.sum(values) / self.size

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`mean` of each of several tensors, a bucket of them at a time."""
        if self.processes is None:
            return list(tensors)
        found: list[Tensor] = []
        for bucket in _buckets(tensors):
            flat = self.mean(torch.cat([tensor.reshape(-1) for tensor in bucket]))
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            found += (part.view_as(own) for part, own in zip(parts, bucket, strict=True))
        return found

    def gather(self, value: _T) -> list[_T]:
        """What each process gave, by rank: any object that can be pickled."""
        if self.processes is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.processes)
        return found

    def numbers(self, values: Sequence[float]) -> Tensor:
        """The numbers of each process, shape (size, num), float64, on the CPU; as many in each."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.processes is None:
            return own[None]
        own = self._reachable(own)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.processes)
        return torch.stack(rows).cpu()

    def least(self, value: int) -> int:
        """The smallest of the processes' numbers."""
        return value if self.processes is None else int(self.numbers([value]).min())

    def first(self, value: _T) -> _T:
        """What the process of rank 0 gave."""
        if self.processes is None:
            return value
        found = [value]
        source = dist.get_global_rank(self.processes, 0)
        dist.broadcast_object_list(found, src=source, group=self.processes)
        return found[0]

    def on_first(self, make: Callable[[], _T]) -> _T:
        """What `make` returns or raises in the process of rank 0, the only one that calls it."""
        if self.processes is None:
            return make()
        made: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                made = make()
            except Exception as found:  # all processes raise it: none waits for this one
                error = found
        # not the error itself: the attributes of some cannot be sent
        told = None if error is None else (type(error), str(error))
        made, told = self.first((made, told))
        if error is not None:
            raise error
        if told is not None:
            kind, text = told
            raise kind(text) from _Elsewhere()
        return made  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.processes is not None:
            dist.barrier(self.processes)

    def check_same(self, what: str, value: object) -> None:
        """Refuse, in all processes, what differs between them.

        Args:
            what: the value is.
            value: of this process; of a mapping, also in others, the entry that differs is named.

        Raises:
            ValueError: names a rank that differs from rank 0, and what both have.
        """
        first, *others = (dict(_entries(each)) for each in self.gather(value))
        for rank, other in enumerate(others, start=1):
            for name in sorted(first.keys() | other.keys()):
                theirs, ours = other.get(name), first.get(name)
                if theirs != ours:
                    named = f"{name}: " if name else ""
                    raise ValueError(
                        f"{what} must be the same in all {self.size} processes, got "
                        f"{named}{theirs!r} at rank {rank} and {ours!r} at rank 0"
                    )

    @contextmanager
    def together(self, *kinds: type[Exception]) -> Iterator[None]:
        """Raise in all processes what is raised in one of them; one small collective.

        Args:
            kinds: errors that are shared; none: values that are not finite.
        """
        kinds, error = kinds or (FloatingPointError,), None
        try:
            yield
        except kinds as found:
            error = found
        if self.processes is not None:
            failed = self.numbers([error is not None]).flatten().nonzero().flatten().tolist()
            if failed and error is None:
                text = f"the process of rank {int(failed[0])} failed; its own error says why"
                raise kinds[0](text) from _Elsewhere()
        if error is not None:
            raise error

    def _reachable(self, tensor: Tensor) -> Tensor:
        """The tensor where this group's backend can send it from."""
        return tensor.cuda() if dist.get_backend(self.processes) == "nccl" else tensor


ALONE = Group()


def _entries(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The values of a mapping, by dotted names where mappings are inside; or the value itself."""
    if not isinstance(value, Mapping):
        yield prefix, value
        return
    for name, each in value.items():
        yield from _entries(each, f"{prefix}.{name}" if prefix else str(name))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type and device, of `_BUCKET_BYTES` or a single tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        is_alike = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (is_alike and size + tensor.nbytes <= _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


# --- how a model is spread ------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a model's training runs.

    Attributes:
        group: the processes over which gradients are averaged.
        shards: those that together hold one copy of the parameters.
        is_sharded: whether parameters are DTensors, of which each process holds a part.
    """

    group: Group = ALONE
    shards: Group = ALONE
    is_sharded: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """As DistributedDataParallel or `fully_shard` has laid the model out.

        Raises:
            ValueError: parameters spread in a way whose sums are not known: FSDP1, tensor parallel.
        """
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                if left_out := sorted(module.parameters_to_ignore):
                    raise ValueError(
                        "all gradients must be averaged, got parameters that "
                        f"DistributedDataParallel ignores: {', '.join(left_out[:5])}"
                    )
                return cls(_unless_alone(module.process_group))
            if type(module).__name__ == "FullyShardedDataParallel":
                raise ValueError(
                    "parameters must be whole or sharded by fully_shard (FSDP2), got "
                    "FullyShardedDataParallel (FSDP1); use torch.distributed.fsdp.fully_shard"
                )
        reshard(model)
        held = (p for module in model.modules() for p in module._parameters.values())
        sharded: list[Any] = [p for p in held if p is not None and is_sharded(p)]
        if not sharded:
            return cls()
        meshes = {group.mesh_info.mesh for group in _param_groups(model)}
        other = [p.device_mesh for p in sharded if p.device_mesh not in meshes]
        if other or len(meshes) != 1:
            raise ValueError(
                "DTensor parameters must be those of fully_shard over one mesh, got "
                f"{(other or sorted(map(str, meshes)))[0]}; tensor parallel and several meshes are "
                "not supported"
            )
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        if whole_ones := [name for name, param in trained if not is_sharded(param)]:
            raise ValueError(
                "all trained parameters must be sharded where some are, got whole ones, whose "
                f"gradients fully_shard does not average: {', '.join(whole_ones[:5])}; apply "
                "fully_shard to the whole model after its blocks"
            )
        mesh = meshes.pop()
        dims = [i for i, place in enumerate(sharded[0].placements) if place.is_shard()]
        whole = mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()
        shards = mesh.get_group(dims[0]) if dims else None
        return cls(_unless_alone(whole), _unless_alone(shards), True)

    @property
    def is_alone(self) -> bool:
        """Whether one process does everything."""
        return self.group.processes is None


def _unless_alone(processes: dist.ProcessGroup | None) -> Group:
    return Group(processes) if processes is not None and processes.size() > 1 else ALONE


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that `fully_shard` was applied to."""
    return (module for module in model.modules() if hasattr(module, "_get_fsdp_state"))


def _param_groups(model: nn.Module) -> list[Any]:
    """What `fully_shard` gathers and reduces together."""
    states = [module._get_fsdp_state() for module in _sharded_modules(model)]
    return [group for state in states for group in state._fsdp_param_groups]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose type is not imported before there is one."""
    return hasattr(tensor, "to_local")


def num_processes() -> int:
    """Processes that torch.distributed joins here; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing storage; all of a plain one."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may hold a part; all processes have to ask for it."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found


def share_buffers(model: nn.Module, group: Group) -> None:
    """Let the buffers be those of rank 0, as DistributedDataParallel does before a forward pass.

    Running statistics then are the same wherever examples are scored or evaluated.
    """
    if group.processes is not None:
        source = dist.get_global_rank(group.processes, 0)
        for buffer in model.buffers():
            if buffer.dtype is not torch.bool:  # masks
                dist.broadcast(local(buffer), source, group.processes)


def reshard(model: nn.Module) -> None:
    """Let parameters be shards where a forward pass has left them gathered."""
    for module in _sharded_modules(model):
        module.reshard()


def check_reducing(model: nn.Module) -> None:
    """Refuse a model amid gradients that fully_shard has not reduced yet.

    Raises:
        RuntimeError: says how to accumulate instead.
    """
    groups = _param_groups(model)
    pending = any(
        param.unsharded_accumulated_grad is not None for g in groups for param in g.fsdp_params
    )
    if pending or not all(g.reduce_grads for g in groups):
        raise RuntimeError(
            "a selection must come where gradients are reduced, got a model under "
            "set_requires_gradient_sync(False); select the pools of all micro-batches before the "
            "first backward pass, or leave the reduction on in each"
        )


def recover(model: nn.Module) -> None:
    """`reshard` after a pass that was broken off: gathering and reducing begin anew."""
    inner = {id(part) for m in _sharded_modules(model) for part in m.modules() if part is not m}
    for module in _sharded_modules(model):
        if id(module) not in inner and module._get_fsdp_state()._is_root:
            module.reset_iter_state()
    reshard(model)


# --- sums over all entries ------------------------------------------------------------------------

_SHARDS: ContextVar[Group] = ContextVar("shards", default=ALONE)


@contextmanager
def sharing(shards: Group) -> Iterator[None]:
    """Vectors of parameters are shards here, of which these processes hold one copy together."""
    token = _SHARDS.set(shards)
    try:
        yield
    finally:
        _SHARDS.reset(token)


def are_shards() -> bool:
    """Whether vectors of parameters are shards here."""
    return _SHARDS.get().processes is not None


def over_shards(sums: Tensor) -> Tensor:
    """Sums over all entries of vectors, from sums over the entries that this process holds."""
    return _SHARDS.get().sum(sums)


def here() -> Group:
    """All the processes that are joined here."""
    return Group(dist.group.WORLD) if num_processes() > 1 else ALONE


class _Elsewhere(Exception):
    """The cause of an error that was raised in another process, which reports it."""


def is_from_elsewhere(error: BaseException) -> bool:
    """Whether an error was raised in another process first."""
    return isinstance(error.__cause__, _Elsewhere)
