"""Σ over ranks: the sums of a tensor that is sharded over a device mesh (DTensor), from each rank's part."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: A mesh and the dimensions of it over which a tensor is sharded.
Shards = tuple[Any, tuple[int, ...]]


def is_distributed(tensor: Tensor) -> bool:
    """Return True if a tensor is a DTensor; asked without loading torch.distributed.tensor if nobody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, which shares its memory; any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def shards_of(tensor: Tensor) -> Shards | None:
    """Over what a tensor is sharded; None if this rank holds all of it."""
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


def reduce_(values: Tensor, shards: Shards) -> Tensor:
    """Return the sum of `values` over the ranks that hold the shards."""
    import torch.distributed as dist

    mesh, dimensions = shards
    moved = values.to(mesh.device_type)
    for dimension in dimensions:
        dist.all_reduce(moved, group=mesh.get_group(dimension))
    return moved.to(values.device)


def offset_of(tensor: Tensor) -> int:
    """Where this rank's part begins in the flattened tensor, for one sharded along its first dimension; else 0."""
    shards = shards_of(tensor)
    if shards is None:
        return 0
    mesh, dimensions = shards
    if len(dimensions) > 1 or not tensor.placements[dimensions[0]].is_shard(0):  # type: ignore[attr-defined]
        return 0
    # As torch.chunk splits: equal parts rounded up, what is left in the last ones.
    rows = min(tensor.shape[0], -(-tensor.shape[0] // mesh.size(dimensions[0])) * mesh.get_local_rank(dimensions[0]))
    return rows * math.prod(tensor.shape[1:])


def gather(values: Tensor, shards: Shards) -> Tensor:
    """Return the 1-D tensors of all ranks that hold the shards, of any lengths, one after the other."""
    import torch.distributed as dist

    mesh, dimensions = shards
    moved = values.to(mesh.device_type)
    for dimension in dimensions:
        group = mesh.get_group(dimension)
        lengths = [torch.zeros(1, dtype=torch.int64, device=moved.device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(lengths, torch.tensor([moved.numel()], device=moved.device), group=group)
        longest = max(int(length) for length in lengths)
        parts = [moved.new_empty(longest) for _ in lengths]
        dist.all_gather(parts, torch.nn.functional.pad(moved, (0, longest - moved.numel())), group=group)
        moved = torch.cat([part[: int(length)] for part, length in zip(parts, lengths)])
    return moved.to(values.device)
