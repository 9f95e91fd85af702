"""q = round(w/Δ): weights as symbols of a uniform grid, how often each occurs, and the entropy that follows.

No codebook and no fixed number of bits: a coder gives each symbol the bits that its frequency costs, so the step Δ
alone decides size and loss.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.blocks import blocks

#: |q| up to this is counted in a table; what lies outside is sorted instead.
WINDOW = 1 << 15


def symbols_of(weight: Tensor, step: float) -> Tensor:
    """q = round(w/Δ), ties to even: integers in the weight's shape, as float32, or float64 if the weight is."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).div(step).round_()


def on_grid(weight: Tensor, step: float) -> Tensor:
    """ŵ = Δ·round(w/Δ), in the weight's dtype; computed as in `symbols_of`."""
    return symbols_of(weight, step).mul_(step).to(weight.dtype)


def entropy(counts: Tensor) -> Tensor:
    """H = −Σ p log2 p with p = counts / Σ counts, over the last dimension: bits a symbol; 0 for no symbols.

    Args:
        counts: (…, A), integers.

    Returns:
        (…) float64.
    """
    p = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(p).sum(dim=-1) / math.log(2) + 0.0


@dataclass(frozen=True)
class Histogram:
    """How often each symbol occurs, exactly, for symbols of any range.

    Attributes:
        values: (A,) int64 on the CPU, ascending, distinct.
        counts: (A,) int64 on the CPU; or (R, A), one row for each of R populations on the same values.
    """

    values: Tensor
    counts: Tensor

    @property
    def total(self) -> int:
        """Return the number of symbols."""
        return int(self.counts.sum())

    @property
    def bits(self) -> float:
        """H in bits a symbol, of zero order; 0 for no symbols."""
        return entropy(self.counts).item()

    @property
    def zeros(self) -> float:
        """Return the share of symbols that are 0."""
        return int(self.counts[self.values == 0].sum()) / self.total if self.total else 0.0


@dataclass
class Counts:
    """A histogram in the making: a table of the symbols near 0, lists of (symbol, count) for the others.

    Attributes:
        table: (2·WINDOW + 1,) int64, counts of −WINDOW … WINDOW.
        values, counts: int64 tensors of the others; a symbol may be in several.
        bad: True if a weight had no symbol (NaN, infinity, |w|/Δ of 2^62 and more).
    """

    table: Tensor = field(default_factory=lambda: torch.zeros(2 * WINDOW + 1, dtype=torch.int64))
    values: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    bad: bool = False

    def add(self, weight: Tensor, step: float) -> None:
        """Count round(w/Δ) of a floating tensor, on its device, a block at a time."""
        for block in blocks(weight.detach()):
            found = symbols_of(block, step)
            low, high = (float(end) for end in torch.aminmax(found))
            if not (high < 2.0**62 and low > -(2.0**62)):  # NaN fails both
                self.bad = True
                return
            if high > WINDOW or low < -WINDOW:
                inside = found.abs() <= WINDOW
                self.append(*torch.unique(found[~inside].to(torch.int64), return_counts=True))
                found, low, high = found[inside], max(low, -WINDOW), min(high, WINDOW)
                if not found.numel():
                    continue
            # Counted from the lowest on, as int32: half the time of int64 over the whole window.
            first, width = int(low) + WINDOW, int(high - low) + 1
            self.table[first : first + width] += torch.bincount(found.sub_(low).int(), minlength=width).cpu()

    def append(self, values: Tensor, counts: Tensor) -> None:
        """Add symbols and how often each occurs."""
        self.values.append(values.cpu())
        self.counts.append(counts.cpu())

    def join(self, other: "Counts") -> None:
        """Add another's counts."""
        self.table += other.table
        self.values += other.values
        self.counts += other.counts
        self.bad |= other.bad

    def histogram(self) -> Histogram:
        """Return the counts of all that was added.

        Raises:
            WeightError: a weight has no symbol.
        """
        if self.bad:
            raise WeightError(
                "NaN, infinity or a weight beyond 2^62 steps has no symbol on the grid; repair the weight or skip it"
            )
        inside = self.table.nonzero().squeeze(1)
        values, counts = inside - WINDOW, self.table[inside]
        if self.values:
            values, place = torch.unique(torch.cat([values, *self.values]), return_inverse=True)
            counts = torch.zeros_like(values).index_add_(0, place, torch.cat([counts, *self.counts]))
        return Histogram(values[counts > 0], counts[counts > 0])
