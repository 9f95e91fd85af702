"""Σ over ranks: the sums of a tensor that is sharded over a device mesh (DTensor), from each rank's part."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: A mesh and the dimensions of it over which a tensor is sharded.
Shards = tuple[Any, tuple[int, ...]]


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without loading torch.distributed.tensor where nobody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, which shares its memory; any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shards_of(tensor: Tensor) -> Shards | None:
    """Over what a tensor is sharded; None where this rank holds all of it."""
    if not is_distributed(tensor):
        return None
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    dimensions = tuple(d for d, placement in enumerate(placements) if not placement.is_replicate())
    return (mesh, dimensions) if dimensions else None


def grouped(tensors: Sequence[Tensor]) -> dict[Shards | None, list[int]]:
    """Indices of the tensors, by what they are sharded over; in one order on every rank."""
    groups: dict[Shards | None, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(shards_of(tensor), []).append(index)
    return groups


def reduce_(values: Tensor, shards: Shards, how: Callable[[Any], Any] | None = None) -> Tensor:
    """The sum of `values` over the ranks that hold the shards, or what `how` picks from ReduceOp; on its own device."""
    import torch.distributed as dist

    mesh, dimensions = shards
    moved = values.to(mesh.device_type)
    for dimension in dimensions:
        dist.all_reduce(moved, op=how(dist.ReduceOp) if how else dist.ReduceOp.SUM, group=mesh.get_group(dimension))
    return moved.to(values.device)


def gather(values: Tensor, shards: Shards) -> Tensor:
    """The 1-D tensors of all ranks that hold the shards, one after the other; they have one length."""
    import torch.distributed as dist

    mesh, dimensions = shards
    moved = values.to(mesh.device_type)
    for dimension in dimensions:
        group = mesh.get_group(dimension)
        parts = [torch.empty_like(moved) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, moved, group=group)
        moved = torch.cat(parts)
    return moved.to(values.device)
