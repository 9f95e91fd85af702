"""E|θ| and E[θ²] of weights that may be sharded over ranks."""

from collections.abc import Sequence

from torch import Tensor

from ggpass.ggd.moments import Moments, absolute_sums
from ggpass.passes.backslash.sharded import grouped, local_part, reduce_


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
