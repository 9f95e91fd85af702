"""c_r(v) = #{i : round(w_ri / Δ) = v}: how often each value of a uniform grid occurs in each row of a matrix."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError

#: Cells that one histogram may have: 64-bit counts of as many take half a gigabyte.
MAX_CELLS = 1 << 26

#: Elements rounded at a time.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Histogram:
    """c_r(v) for v = lowest … lowest + C − 1.

    Attributes:
        step: Δ.
        lowest: the value of the first cell.
        counts: (R, C) int64, on the CPU.
    """

    step: float
    lowest: int
    counts: Tensor

    @property
    def totals(self) -> Tensor:
        """(R,) int64, the elements of each row."""
        return self.counts.sum(dim=1)

    @property
    def values(self) -> Tensor:
        """(C,) float64, the cells' centres v·Δ."""
        return torch.arange(self.lowest, self.lowest + self.counts.shape[1], dtype=torch.float64) * self.step

    @property
    def below(self) -> Tensor:
        """b_r(v) = Σ c_r(u) over u < v, (R, C) int64."""
        return self.counts.cumsum(dim=1) - self.counts

    def moments(self) -> tuple[Tensor, Tensor]:
        """E[|vΔ|] and E[(vΔ)²] of each row, (R,) float64 each."""
        values, share = self.values, self.counts.double() / self.totals[:, None].double()
        return share @ values.abs(), share @ values.square()

    def entropy(self) -> Tensor:
        """H_r = −Σ p log2 p in bits a weight, (R,) float64; of zero order."""
        share = self.counts.double() / self.totals[:, None].double()
        return torch.special.entr(share).sum(dim=1).clamp(min=0.0) / math.log(2)

    def plus(self, other: "Histogram") -> "Histogram":
        """The histogram of both together, row by row."""
        lowest = min(self.lowest, other.lowest)
        end = max(h.lowest + h.counts.shape[1] for h in (self, other))
        counts = torch.zeros(len(self.counts), end - lowest, dtype=torch.int64)
        for h in (self, other):
            counts[:, h.lowest - lowest : h.lowest - lowest + h.counts.shape[1]] += h.counts
        return Histogram(self.step, lowest, counts)


def cells(block: Tensor, step: float) -> Tensor:
    """v = round(w / Δ), ties to even, int64 of the same shape; the division is done in float64."""
    return (block.double() / step).round_().long()


def count(rows: Tensor, step: float) -> Histogram:
    """c_r(v) = #{i : round(rows[r, i] / Δ) = v}.

    Args:
        rows: (R, n) floating, n ≥ 1, any device.
        step: Δ > 0.

    Raises:
        WeightError: NaN or infinity, or values so far apart that the histogram would not fit MAX_CELLS.
    """
    low, high = (float(bound) / step for bound in rows.aminmax())
    if not math.isfinite(high - low):
        raise WeightError("NaN or infinity among the weights; repair or skip this weight")
    width = round(high) - round(low) + 1
    if width * len(rows) > MAX_CELLS:
        raise WeightError(
            f"weights from {low * step:g} to {high * step:g} on a grid of {step:g} need {width} cells; choose a larger "
            "step, or skip this weight"
        )
    lowest = round(low)
    counts = torch.zeros(len(rows) * width, dtype=torch.int64)
    stride = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), stride):
        for block in rows[start : start + stride].split(BLOCK_ELEMENTS, dim=1):
            at = cells(block, step).cpu() - lowest + width * torch.arange(start, start + len(block))[:, None]
            counts += torch.bincount(at.flatten(), minlength=len(counts))
    return Histogram(step, lowest, counts.view(len(rows), width))
