"""H(Δ) = −Σ p_q log2 p_q, q = round(θ/Δ): the zero-order entropy of weights on a uniform grid."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import InputError, WeightError

#: Elements quantized at a time: the copies of one block stay near 8 MB.
BLOCK_ELEMENTS = 1 << 20

#: |q| up to this is counted in a table; what lies outside is sorted instead.
WINDOW = 1 << 15


@dataclass(frozen=True)
class GridHistogram:
    """How often each symbol q = round(θ/Δ) occurs.

    Attributes:
        values: (A,) int64, ascending, distinct.
        counts: (A,) int64, each at least 1.
    """

    values: Tensor
    counts: Tensor

    @property
    def total(self) -> int:
        """The number of weights."""
        return int(self.counts.sum())

    @property
    def bits(self) -> float:
        """H in bits a weight; 0 for no weights."""
        if not self.total:
            return 0.0
        p = self.counts.double() / self.total
        return float(-(p * p.log2()).sum()) + 0.0

    @property
    def zeros(self) -> float:
        """The share of weights whose symbol is 0."""
        return int(self.counts[self.values == 0].sum()) / self.total if self.total else 0.0


def flat_blocks(weight: Tensor, size: int = BLOCK_ELEMENTS) -> Iterator[Tensor]:
    """Every element of a tensor once, in flat views of at most `size` elements; writing to them writes the tensor.

    A tensor with gaps between its elements is walked along its outermost dimension.
    """
    weight = weight.permute(sorted(range(weight.dim()), key=lambda d: -weight.stride()[d]))
    if weight.is_contiguous():
        if weight.numel():
            yield from weight.view(-1).split(size)
    elif weight.dim() == 1:
        yield from weight.split(size)
    else:
        for part in weight:
            yield from flat_blocks(part, size)


def histogram(weights: Iterable[Tensor], step: float) -> GridHistogram:
    """counts[q] = #{i : round(θ_i/Δ) = q}, ties to even, pooled over all tensors.

    Args:
        weights: floating, any shapes, dtypes and devices; empty ones count nothing.
        step: Δ > 0, in units of weight.

    Raises:
        WeightError: NaN or infinity in a weight, or |θ|/Δ of 2^62 and more.
        InputError: Δ is not a positive number.
    """
    if not (math.isfinite(step) and step > 0):
        raise InputError(f"the grid's step is a positive number, not {step!r}")
    table = torch.zeros(2 * WINDOW + 1, dtype=torch.int64)
    values, counts = [], []
    for weight in weights:
        for block in flat_blocks(weight.detach()):
            symbols = quantize(block, step)
            inside = symbols.abs() <= WINDOW
            if not bool(inside.all()):
                more, often = torch.unique(symbols[~inside], return_counts=True)
                values.append(more.cpu())
                counts.append(often.cpu())
                symbols = symbols[inside]
            table += torch.bincount(symbols + WINDOW, minlength=2 * WINDOW + 1).cpu()
    return _merge(table, values, counts)


def quantize(block: Tensor, step: float) -> Tensor:
    """q = round(θ/Δ), int64, of any shape; computed in float32, or float64 where the weight is."""
    scaled = block.to(torch.promote_types(block.dtype, torch.float32)) / step
    low, high = torch.aminmax(scaled)
    if not (float(high) < 2.0**62 and float(low) > -(2.0**62)):  # NaN fails both
        raise WeightError(
            "NaN, infinity or a weight beyond 2^62 steps has no symbol on the grid; repair the weight or skip it"
        )
    return scaled.round_().to(torch.int64)


def _merge(table: Tensor, values: list[Tensor], counts: list[Tensor]) -> GridHistogram:
    inside = table.nonzero().squeeze(1)
    all_values, all_counts = torch.cat([inside - WINDOW, *values]), torch.cat([table[inside], *counts])
    distinct, where = torch.unique(all_values, return_inverse=True)
    return GridHistogram(distinct, torch.zeros_like(distinct).index_add_(0, where, all_counts))


def entropy_bits(weights: Iterable[Tensor] | Tensor, step: float) -> float:
    """H(Δ) = −Σ p_q log2 p_q with q = round(θ/Δ): bits a weight, one histogram pooled over all tensors.

    What an ideal coder with one table for the whole model needs, tables aside; memory stays at a block's copies.

    Args:
        weights: one tensor, or several; as in `histogram`.
        step: Δ > 0, in units of weight.

    Returns:
        Bits a weight; 0 for no weights.

    Raises:
        WeightError, InputError: as in `histogram`.
    """
    return histogram([weights] if isinstance(weights, Tensor) else weights, step).bits
