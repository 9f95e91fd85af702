"""r = |x − μ| / √E[x²]: a weight's magnitudes in blocks, for sums over all of them, and thinned, for searches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.blocks import blocks

#: A search starts on this many elements; the result is then refined on all of them.
SEARCH_ELEMENTS = 1 << 16

#: Elements at a time: several float64 temporaries of a block stay within a processor's cache.
CACHED_ELEMENTS = 1 << 16

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Magnitudes:
    """r = |x − μ|/u for every element x of a weight, or for those that are not exactly 0.

    Attributes:
        weight: any shape and strides, floating.
        unit: u, √E[x²] of the elements that are kept: the parameters of the fits are then of the order of 1.
        count: how many are kept.
        mean: μ.
        keep_zeros: whether exact zeros are kept.
    """

    weight: Tensor
    unit: float
    count: int
    mean: float = 0.0
    keep_zeros: bool = True

    def means(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> list[float]:
        """The means of some functions of r over all kept elements, summed in float64.

        Args:
            function: r, (n,) float64 -> tensors of that shape.
        """
        total: Tensor | None = None
        for r in self._parts():
            sums = torch.stack([value.sum() for value in function(r)])
            total = sums if total is None else total + sums
        if total is None:
            raise WeightError("no element is left to fit a density to; skip this weight")
        return [value / self.count for value in total.tolist()]

    def thinned(self) -> "Magnitudes":
        """About SEARCH_ELEMENTS of the elements, always the same; itself where it is no larger.

        Element i of the choice is element ⌊frac(i·φ)·n⌋, φ the golden section: evenly spread, and in step with no
        row or column of a matrix, as every n-th element would be.
        """
        size = self.weight.numel()
        if size <= SEARCH_ELEMENTS:
            return self
        place = torch.arange(SEARCH_ELEMENTS, dtype=torch.float64, device=self.weight.device).mul_(GOLDEN).frac_()
        index = place.mul_(size).long().clamp_(max=size - 1)
        chosen = self.weight[torch.unravel_index(index, self.weight.shape)]
        kept = chosen.numel() if self.keep_zeros else int(chosen.count_nonzero())
        if kept == 0:
            return self  # nearly all zeros: only the whole weight has anything to fit
        return Magnitudes(chosen, self.unit, kept, self.mean, self.keep_zeros)

    def _parts(self) -> Iterator[Tensor]:
        for block in blocks(self.weight):
            for part in block.split(CACHED_ELEMENTS):
                if not self.keep_zeros:
                    part = part[part != 0]
                if part.numel():
                    yield part.double().sub(self.mean).abs_().div_(self.unit)
