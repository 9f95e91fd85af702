"""E|θ|, E[θ²], H(Δ) = −Σ p_q log2 p_q, q = round(θ/Δ): moments and entropy of weights, sharded over ranks or not."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ggpass.errors import InputError
from ggpass.ggd.grid import Counts, Histogram
from ggpass.ggd.moments import Moments, absolute_sums
from ggpass.passes.backslash.sharded import Shards, gather, grouped, local_part, reduce_


def moments(weights: Sequence[Tensor]) -> Moments:
    """E|θ| and E[θ²] of each tensor; of a DTensor those of the whole, and every rank must call this.

    Args:
        weights: floating, any shapes, dtypes and devices.
    """
    sums = absolute_sums([local_part(weight.detach()) for weight in weights])
    for shards, indices in grouped(weights).items():
        if shards is not None:
            sums[indices] = reduce_(sums[indices], shards)
    return Moments.of_sums(sums, [weight.numel() for weight in weights])


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
    weights, counts = list(weights), Counts()
    steps = _steps(step, len(weights))
    for shards, indices in grouped(weights).items():
        mine = counts if shards is None else Counts()
        for index in indices:
            mine.add(local_part(weights[index].detach()), steps[index])
        if shards is not None:
            counts.join(_over_ranks(mine, shards))
    return counts.histogram()


def _steps(step: float | Sequence[float], count: int) -> list[float]:
    """Return Δ of each of `count` weights."""
    given = [step] if isinstance(step, int | float) else list(step)
    for each in given:
        if not (isinstance(each, int | float) and math.isfinite(each) and each > 0):
            raise InputError(f"the grid's step is a positive number, not {each!r}")
    steps = given * count if isinstance(step, int | float) else given
    if len(steps) != count:
        raise InputError(f"{len(steps)} steps for {count} weights; give one step, or one for each weight")
    return steps


def _over_ranks(counts: Counts, shards: Shards) -> Counts:
    """Return the counts of all ranks that hold the shards."""
    empty = torch.zeros(0, dtype=torch.int64)
    values, others = (gather(torch.cat([empty, *each]), shards) for each in (counts.values, counts.counts))
    bad = bool(reduce_(torch.tensor([int(counts.bad)]), shards))
    return Counts(reduce_(counts.table, shards), [values], [others], bad)


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
    counted = [histogram([weight], each) for weight, each in zip(weights, _steps(step, len(weights)))]
    return sum(h.total * h.bits for h in counted) / max(1, sum(h.total for h in counted))
