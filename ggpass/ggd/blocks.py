"""A weight's elements in flat blocks, so that what is computed of them needs no second copy of the weight."""

from collections.abc import Iterator

from torch import Tensor

#: Elements at a time on the CPU: several float64 temporaries of a block stay within a processor's cache.
CPU_BLOCK = 1 << 16

#: The same on a device, where the number of kernel launches is what costs.
DEVICE_BLOCK = 1 << 22


def blocks(weight: Tensor, size: int | None = None) -> Iterator[Tensor]:
    """Return every element once, in flat views of at most `size` elements; writing to them writes the tensor.

    A tensor with gaps between its elements is walked along its outermost dimension; an empty one has no block.

    Args:
        weight: any shape and strides.
        size: if left out, CPU_BLOCK or DEVICE_BLOCK.
    """
    size = size or (CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK)
    weight = weight.permute(sorted(range(weight.dim()), key=lambda d: -weight.stride()[d]))
    if weight.is_contiguous():
        if weight.numel():
            yield from weight.view(-1).split(size)
    elif weight.dim() == 1:
        yield from weight.split(size)
    else:
        for part in weight:
            yield from blocks(part, size)
