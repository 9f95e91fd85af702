"""c_r(v) = #{i : round(w_ri / Δ) = v}: how often each value of a uniform grid occurs in each row of a matrix."""

import math

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.grid import Histogram, symbols_of

#: Cells that one histogram may have: 64-bit counts of as many take half a gigabyte.
MAX_CELLS = 1 << 26

#: Elements rounded at a time.
BLOCK_ELEMENTS = 1 << 20


def count(rows: Tensor, step: float) -> Histogram:
    """c_r(v) for every v from the least to the largest, counts of 0 among them: values[i] = values[0] + i.

    Args:
        rows: (R, n) floating, n ≥ 1, any device; divided by the step in float64.
        step: Δ > 0.

    Raises:
        WeightError: NaN or infinity, or values so far apart that the histogram would not fit MAX_CELLS.
    """
    low, high = (float(bound) / step for bound in rows.aminmax())
    if not math.isfinite(high - low):
        raise WeightError("NaN or infinity among the weights; repair or skip this weight")
    lowest, width = round(low), round(high) - round(low) + 1
    if width * len(rows) > MAX_CELLS:
        raise WeightError(
            f"weights from {low * step:g} to {high * step:g} on a grid of {step:g} need {width} cells; choose a larger "
            "step, or skip this weight"
        )
    counts = torch.zeros(len(rows) * width, dtype=torch.int64)
    stride = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), stride):
        for block in rows[start : start + stride].split(BLOCK_ELEMENTS, dim=1):
            at = symbols_of(block.double(), step).long().cpu() - lowest
            at += width * torch.arange(start, start + len(block))[:, None]
            counts += torch.bincount(at.flatten(), minlength=len(counts))
    return Histogram(torch.arange(lowest, lowest + width), counts.view(len(rows), width))


def join(*histograms: Histogram) -> Histogram:
    """Return the histogram of several matrices together, row by row; each as `count` returns it."""
    lowest = min(int(h.values[0]) for h in histograms)
    values = torch.arange(lowest, max(int(h.values[-1]) for h in histograms) + 1)
    counts = torch.zeros(len(histograms[0].counts), len(values), dtype=torch.int64)
    for h in histograms:
        start = int(h.values[0]) - lowest
        counts[:, start : start + len(h.values)] += h.counts
    return Histogram(values, counts)
