"""H(Δ) = −Σ p_q log2 p_q, q = round(θ/Δ): the zero-order entropy of weights on a uniform grid."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ggpass.errors import InputError, WeightError
from ggpass.ggd.blocks import blocks
from ggpass.passes.backslash.sharded import Shards, gather, grouped, local_part, reduce_

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


def histogram(weights: Iterable[Tensor], step: float | Sequence[float]) -> GridHistogram:
    """counts[q] = #{i : round(θ_i/Δ) = q}, ties to even, pooled over all tensors.

    Of a DTensor every rank counts its part, and all get the sum; every rank that holds a part must call this.

    Args:
        weights: floating, any shapes, dtypes and devices; empty ones count nothing.
        step: Δ > 0, in units of weight: one for all, or one for each.

    Raises:
        WeightError: NaN or infinity in a weight, or |θ|/Δ of 2^62 and more.
        InputError: Δ is not a positive number, or there are not as many as weights.
    """
    weights = list(weights)
    steps = [step] * len(weights) if isinstance(step, int | float) else list(step)
    for each in [step] if isinstance(step, int | float) else steps:
        if not (isinstance(each, int | float) and math.isfinite(each) and each > 0):
            raise InputError(f"the grid's step is a positive number, not {each!r}")
    if len(steps) != len(weights):
        raise InputError(f"{len(steps)} steps for {len(weights)} weights; give one step, or one for each weight")
    counts = _Counts()
    for shards, indices in grouped(weights).items():
        mine = counts if shards is None else _Counts()
        for index in indices:
            for block in blocks(local_part(weights[index].detach())):
                mine.add(block, steps[index])
        if shards is not None:
            counts.join(mine.over_ranks(shards))
    return counts.result()


class _Counts:
    """Counts in the making: a table of the symbols near 0, lists of (symbol, count) for the others."""

    def __init__(self) -> None:
        self.table = torch.zeros(2 * WINDOW + 1, dtype=torch.int64)
        self.values: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.bad = False

    def add(self, block: Tensor, step: float) -> None:
        """Count round(θ/Δ) of a block, in float32, or float64 where the weight is."""
        scaled = block.to(torch.promote_types(block.dtype, torch.float32)) / step
        low, high = (float(end) for end in torch.aminmax(scaled))
        if not (high < 2.0**62 and low > -(2.0**62)):  # NaN fails both
            self.bad = True
            return
        symbols = scaled.round_().to(torch.int64)
        if high > WINDOW or low < -WINDOW:
            inside = symbols.abs() <= WINDOW
            self.append(*torch.unique(symbols[~inside], return_counts=True))
            symbols = symbols[inside]
        self.table += torch.bincount(symbols + WINDOW, minlength=2 * WINDOW + 1).cpu()

    def append(self, values: Tensor, counts: Tensor) -> None:
        self.values.append(values.cpu())
        self.counts.append(counts.cpu())

    def join(self, other: "_Counts") -> None:
        """Add another's counts."""
        self.table += other.table
        self.values += other.values
        self.counts += other.counts
        self.bad |= other.bad

    def over_ranks(self, shards: Shards) -> "_Counts":
        """The counts of all ranks that hold the shards."""
        empty = torch.zeros(0, dtype=torch.int64)
        values, counts = torch.cat([empty, *self.values]), torch.cat([empty, *self.counts])
        joined = _Counts()
        joined.bad = bool(reduce_(torch.tensor([int(self.bad)]), shards))
        joined.table = reduce_(self.table, shards)
        joined.append(gather(values, shards), gather(counts, shards))
        return joined

    def result(self) -> GridHistogram:
        if self.bad:
            raise WeightError(
                "NaN, infinity or a weight beyond 2^62 steps has no symbol on the grid; repair the weight or skip it"
            )
        inside = self.table.nonzero().squeeze(1)
        values = torch.cat([inside - WINDOW, *self.values])
        counts = torch.cat([self.table[inside], *self.counts])
        distinct, where = torch.unique(values, return_inverse=True)
        summed = torch.zeros_like(distinct).index_add_(0, where, counts)
        return GridHistogram(distinct[summed > 0], summed[summed > 0])


def entropy_bits(
    weights: Iterable[Tensor] | Tensor, step: float | Sequence[float], *, tables: Literal["one", "each"] = "one"
) -> float:
    """H(Δ) = −Σ p_q log2 p_q with q = round(θ/Δ): bits a weight, one histogram pooled over all tensors.

    What an ideal coder with one table for the whole model needs, tables aside; memory stays at a block's copies.

    Args:
        weights: one tensor, or several; as in `histogram`.
        step: Δ > 0, in units of weight: one for all, or one for each.
        tables: "each" gives every tensor a table of its own, as a file of them does: Σ n·H / Σ n.

    Returns:
        Bits a weight; 0 for no weights.

    Raises:
        WeightError, InputError: as in `histogram`.
    """
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if tables == "one":
        return histogram(weights, step).bits
    steps = [step] * len(weights) if isinstance(step, int | float) else list(step)
    counted = [histogram([weight], each) for weight, each in zip(weights, steps, strict=True)]
    return sum(h.total * h.bits for h in counted) / max(1, sum(h.total for h in counted))
