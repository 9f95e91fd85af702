"""r = |x − μ| / √E[x²]: a weight's magnitudes, in blocks for sums and thinned for searches; and the search itself."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.blocks import blocks

#: A search starts on this many elements; the result is then refined on all of them.
SEARCH_ELEMENTS = 1 << 16

#: Evaluations after which a search gives its best bracket; Newton's method needs 3 to 8.
MOST_EVALUATIONS = 80

#: Stands for an exact zero in ln r, far below any magnitude: |0|^ν is then 1e-30 at ν = 0.1, and 0 to all purposes.
LEAST = 1e-300

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
        """Return the means of some functions of r over all kept elements, summed in float64.

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
        for part in blocks(self.weight):
            if not self.keep_zeros:
                part = part[part != 0]
            if part.numel():
                yield part.double().sub(self.mean).abs_().div_(self.unit)


def score(magnitudes: Magnitudes, shape: float) -> tuple[float, float, float]:
    """−ν²·dL/dν, its derivative by ln ν, and L = mean(−ln f) in units of u, with α at its best for ν.

    With m = mean r^ν, L = ln 2 − ln ν + lnΓ(1/ν) + (1 + ln(νm))/ν and ν² dL/dν = −ν − ψ(1/ν) − ln(νm) + ν m'/m, where
    m' = mean(r^ν ln r); its derivative by ν is −1 − 1/ν + ψ'(1/ν)/ν² + ν (m''/m − (m'/m)²).
    """

    def powers(r: Tensor) -> tuple[Tensor, ...]:
        log_r = r.clamp_(min=LEAST).log_()
        power = (shape * log_r).exp_()
        first = power * log_r
        return power, first, log_r.mul_(first)

    m, m1, m2 = magnitudes.means(powers)
    order = torch.tensor(1 / shape, dtype=torch.float64)
    digamma, trigamma = torch.digamma(order).item(), torch.polygamma(1, order).item()
    log_power = math.log(shape * m)
    rise = -shape - digamma - log_power + shape * m1 / m
    slope = -1 - 1 / shape + trigamma / shape**2 + shape * (m2 / m - (m1 / m) ** 2)
    nats = math.log(2 / shape) + math.lgamma(1 / shape) + (1 + log_power) / shape
    return -rise, -slope * shape, nats


def falling_root(
    evaluate: Callable[[float], tuple[float, float]],
    start: float,
    bounds: tuple[float, float],
    tolerance: float,
) -> float:
    """ν with g(ν) = 0, g falling; the bound on the root's side if there is no root between them.

    By Newton's method in ln ν, kept within a shrinking bracket.

    Args:
        evaluate: ν -> (g, dg/d ln ν); a slope that is not negative sends the search to a bound, or else bisects.
        start: ν > 0, between the bounds.
        bounds: the smallest and the largest ν.
        tolerance: the relative step in ν below which the search ends (its error is then of the order of its square).
    """
    low, high = bounds
    seen_low = seen_high = False
    at = min(max(start, low), high)
    for _ in range(MOST_EVALUATIONS):
        value, slope = evaluate(at)
        if value >= 0:
            if at == bounds[1]:
                return at
            low, seen_low = at, True
        else:
            if at == bounds[0]:
                return at
            high, seen_high = at, True
        aim = at * math.exp(min(max(-value / slope, -50.0), 50.0)) if slope < 0 else math.nan
        if abs(aim / at - 1) < tolerance:
            return min(max(aim, bounds[0]), bounds[1])
        lost = math.isnan(aim)
        if not seen_high and (aim >= high or (lost and value >= 0)):
            aim = high
        elif not seen_low and (aim <= low or (lost and value < 0)):
            aim = low
        elif not low < aim < high:
            aim = math.sqrt(low * high)
        if high <= low * (1 + 1e-14):
            return at
        at = aim
    return at
