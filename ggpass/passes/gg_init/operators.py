"""n = the number of terms in one element of the result: the fan of each operator, from its weight's shape."""

import math
from collections.abc import Sequence

from ggpass.passes.gg_init.candidate import Group, Use


def linear(shape: Sequence[int], operator: str = "linear") -> Use:
    """y = x · Wᵀ, W (…, N, K): n = K."""
    return Use(operator, Group.LINEAR, shape[-1], (shape[-1], shape[-2]))


def matmul(shape: Sequence[int], operator: str = "matmul") -> Use:
    """y = x · W, W (…, K, N): n = K."""
    return Use(operator, Group.LINEAR, shape[-2], (shape[-2], shape[-1]))


def _declared(shape: Sequence[int]) -> tuple[float, float]:
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def convolution(shape: Sequence[int]) -> Use:
    """y = x ∗ W, W (N, C/groups, *kernel): n = C/groups · |kernel|."""
    declared = _declared(shape)
    return Use(f"conv{len(shape) - 2}d", Group.CONV, declared[0], declared)


def transposed_convolution(shape: Sequence[int], stride: Sequence[int], groups: int) -> Use:
    """W (C, N/groups, *kernel): n = C/groups · ∏ max(1, kernel/stride).

    A stride of s spreads the inputs s apart, so that one result meets kernel/s of the kernel's elements in each
    dimension (on average over the s phases), and one where the kernel is smaller than that.
    """
    stride = [*stride] * (len(shape) - 2) if len(stride) == 1 else stride
    taps = math.prod(max(1.0, size / step) for size, step in zip(shape[2:], stride))
    return Use(f"conv_transpose{len(shape) - 2}d", Group.CONV, shape[0] // groups * taps, _declared(shape))


def embedding(shape: Sequence[int], padding: int | None, operator: str = "embedding") -> Use:
    """y = W[ids], W (N, K): one term, and no input to keep the power of; the model's own σ is the rule."""
    return Use(operator, Group.EMBEDDING, 1, (shape[1], shape[0]), 1.0, "the model's own σ", padding)
