"""H(Δ) = −Σ_k p_k log2 p_k, p_k = ∫_cell f: the bits of a generalized Gaussian that is rounded to a grid."""

import math

import torch
from torch import Tensor

from ggpass.ggd.cells import log_cell, log_peak, upper

#: Cells on either side of the centre that are summed one by one; the density is as good as constant over the others.
MOST_CELLS = 1 << 16

#: Where (|x|/α)^ν is larger, no probability is left in float64.
LAST_EXPONENT = 800.0


def quantized_entropy(shape: float, scale: float, mean: float, step: float) -> float:
    """H = −Σ_k p_k log2 p_k over the cells [(k − ½)Δ, (k + ½)Δ], all of them.

    1. The 2·MOST_CELLS cells around the centre, or as many as hold anything in float64, are summed exactly.
    2. Beyond them −p log2 p is integrated as −f log2(fΔ), which is closed in incomplete gamma functions; with so many
       cells before it the error of that (Δ²f''/(24f) of it) is below 1e-7 bits.
    """
    offset = mean / step - round(mean / step)
    reach = math.log(LAST_EXPONENT) / shape + math.log(scale) - math.log(step)
    count = MOST_CELLS if reach > math.log(MOST_CELLS) else max(1, math.ceil(math.exp(reach)) + 1)
    index = torch.arange(count + 1, dtype=torch.float64)
    right = _bits(log_cell(shape, scale, (index - offset) * step, step))
    left = _bits(log_cell(shape, scale, (index[1:] + offset) * step, step)) if offset else right[1:]
    total = right.sum() + left.sum()
    for side in (-offset, offset):
        total += _tail_bits(shape, scale, (count + 0.5 + side) * step, step)
    return max(0.0, total.item())


def _bits(log_p: Tensor) -> Tensor:
    """−p log2 p, and 0 for p = 0."""
    return torch.where(log_p == -math.inf, 0.0, -log_p * log_p.exp()) / math.log(2)


def _tail_bits(shape: float, scale: float, start: float, step: float) -> Tensor:
    """∫ −f log2(fΔ) from `start` on = (−log2(f(0)Δ) · Q(a, s) + a · Q(a + 1, s)/ln 2)/2, a = 1/ν, s = (start/α)^ν."""
    order = 1 / shape
    s = torch.tensor((start / scale) ** shape if start < 1e30 * scale else math.inf, dtype=torch.float64)
    nats = -(log_peak(shape, scale) + math.log(step)) * upper(order, s) + order * upper(order + 1, s)
    return nats / (2 * math.log(2))
