"""A weight's elements in flat blocks, so that float64 sums over them need no second copy of the weight."""

from collections.abc import Iterator

from torch import Tensor

#: Elements summed at a time, so that the float64 copies of one block stay near 8 MB each.
BLOCK_ELEMENTS = 1 << 20


def blocks(weight: Tensor) -> Iterator[Tensor]:
    """Every element once, in flat blocks of at most BLOCK_ELEMENTS that are views, whatever the strides."""
    weight = weight.permute(sorted(range(weight.dim()), key=lambda d: -weight.stride()[d]))
    if weight.is_contiguous():
        yield from weight.view(-1).split(BLOCK_ELEMENTS)
    elif weight.dim() == 1:
        yield from weight.split(BLOCK_ELEMENTS)
    else:
        for part in weight:
            yield from blocks(part)
