"""A weight's elements in flat blocks, so that what is computed of them needs no second copy of the weight."""

from collections.abc import Iterator

from torch import Tensor

#: Elements worked on at a time unless a caller says otherwise: float64 copies of one block stay near 8 MB each.
BLOCK_ELEMENTS = 1 << 20


def blocks(weight: Tensor, size: int | None = None) -> Iterator[Tensor]:
    """Every element once, in flat views of at most `size` elements; writing to them writes the tensor.

    A tensor with gaps between its elements is walked along its outermost dimension; an empty one has no block.

    Args:
        weight: any shape and strides.
        size: BLOCK_ELEMENTS where it is left out.
    """
    size = BLOCK_ELEMENTS if size is None else size
    weight = weight.permute(sorted(range(weight.dim()), key=lambda d: -weight.stride()[d]))
    if weight.is_contiguous():
        if weight.numel():
            yield from weight.view(-1).split(size)
    elif weight.dim() == 1:
        yield from weight.split(size)
    else:
        for part in weight:
            yield from blocks(part, size)
