"""H(Δ) = −Σ p_q log2 p_q, q = round(θ/Δ): the zero-order entropy of weights on a uniform grid."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ggpass.errors import InputError
from ggpass.ggd.grid import Counts, Histogram
from ggpass.passes.backslash.sharded import Shards, gather, grouped, local_part, reduce_

def histogram(weights: Iterable[Tensor], step: float | Sequence[float]) -> Histogram:
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
    counts = Counts()
    for shards, indices in grouped(weights).items():
        mine = counts if shards is None else Counts()
        for index in indices:
            mine.add(local_part(weights[index].detach()), steps[index])
        if shards is not None:
            counts.join(_over_ranks(mine, shards))
    return counts.histogram()


def _over_ranks(counts: Counts, shards: Shards) -> Counts:
    """The counts of all ranks that hold the shards."""
    empty = torch.zeros(0, dtype=torch.int64)
    lists = [gather(torch.cat([empty, *each]), shards) for each in (counts.values, counts.counts)]
    bad = bool(reduce_(torch.tensor([int(counts.bad)]), shards))
    return Counts(reduce_(counts.table, shards), [lists[0]], [lists[1]], bad)


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
