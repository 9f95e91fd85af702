"""ν = ρ⁻¹(E[θ²]/E[|θ|]²), α = √(E[θ²]·Γ(1/ν)/Γ(3/ν)): the shape and scale of many tensors at once."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.ggd import SHAPE_RANGE, log_moment_ratio
from ggpass.ggd.blocks import blocks
from ggpass.passes.backslash.sharded import grouped, local_part, reduce_

#: Entries of the table ln ρ -> ln ν. Between two of them the line is off by less than 1e-5 in ln ν.
TABLE_ENTRIES = 4096


@dataclass(frozen=True)
class Moments:
    """The first two absolute moments of T tensors.

    Attributes:
        first: (T,) float64 on the CPU, E|θ|; NaN for an empty tensor.
        second: (T,) float64 on the CPU, E[θ²].
        counts: (T,) float64 on the CPU, the elements.
    """

    first: Tensor
    second: Tensor
    counts: Tensor

    @property
    def usable(self) -> Tensor:
        """(T,) bool: neither empty, nor all zero, nor NaN or infinity in it."""
        return torch.isfinite(self.second) & (self.second > 0) & (self.first > 0)

    @property
    def ratio(self) -> Tensor:
        """(T,) float64, E[θ²]/E[|θ|]², at least 1; 2, the Laplacian's, where there is none."""
        # ρ ≥ 1 holds for every sample (Cauchy-Schwarz); rounding may miss it by an ulp.
        return torch.where(self.usable, self.second / self.first.square(), 2.0).clamp(min=1.0)

    def pooled(self) -> "Moments":
        """The moments of all usable tensors taken as one; T = 1."""
        keep = self.usable | (self.second == 0)
        counts = self.counts[keep].sum().reshape(1)
        return Moments(
            (self.first * self.counts)[keep].sum().reshape(1) / counts,
            (self.second * self.counts)[keep].sum().reshape(1) / counts,
            counts,
        )


def moments(weights: Sequence[Tensor]) -> Moments:
    """E|θ| and E[θ²] of each tensor; one transfer to the host for each device.

    Blocks are summed pairwise in float32 (float64 where the weight is) and added in float64. Of a DTensor each rank
    sums its part, and all get the moments of the whole; every rank must call this.

    Args:
        weights: floating, any shapes, dtypes and devices.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    places: dict[torch.device, list[int]] = {}
    for index, weight in enumerate(weights):
        for block in blocks(local_part(weight.detach())):
            sums.setdefault(block.device, []).append(_block_sums(block))
            places.setdefault(block.device, []).append(index)
    total = torch.zeros(len(weights), 2, dtype=torch.float64)
    for device, parts in sums.items():
        total.index_add_(0, torch.tensor(places[device]), torch.stack(parts).double().cpu())
    for shards, indices in grouped(weights).items():
        if shards is not None:
            total[indices] = reduce_(total[indices], shards)
    counts = torch.tensor([weight.numel() for weight in weights], dtype=torch.float64)
    return Moments(total[:, 0] / counts, total[:, 1] / counts, counts)


def _block_sums(block: Tensor) -> Tensor:
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    return torch.stack([block.abs().sum(), block.square().sum()])


@functools.cache
def _table() -> tuple[Tensor, Tensor]:
    """(ln ρ, ln ν), each (TABLE_ENTRIES,) float64, ln ρ ascending."""
    low, high = torch.tensor(SHAPE_RANGE, dtype=torch.float64).log().tolist()
    log_shape = torch.linspace(high, low, TABLE_ENTRIES, dtype=torch.float64)
    ratio = [log_moment_ratio(shape) for shape in log_shape.exp().tolist()]
    return torch.tensor(ratio, dtype=torch.float64), log_shape


def shape_of(ratio: Tensor) -> Tensor:
    """ν = ρ⁻¹(ratio) by a table, clamped to SHAPE_RANGE.

    Args:
        ratio: any shape, float64, E[θ²]/E[|θ|]² ≥ 1.

    Returns:
        The same shape, float64.
    """
    log_ratio, log_shape = _table()
    x = ratio.log().clamp(log_ratio[0], log_ratio[-1])
    right = torch.searchsorted(log_ratio, x).clamp(1, TABLE_ENTRIES - 1)
    x0, x1 = log_ratio[right - 1], log_ratio[right]
    y0, y1 = log_shape[right - 1], log_shape[right]
    return (y0 + (y1 - y0) * (x - x0) / (x1 - x0)).exp()


def scale_of(shape: Tensor, second: Tensor) -> Tensor:
    """α = √(E[θ²]·Γ(1/ν)/Γ(3/ν)), of tensors of one shape, float64."""
    return second.sqrt() * ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()
