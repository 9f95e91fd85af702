"""ν = ρ⁻¹(E[x²]/E[|x|]²), α = √(E[x²]·Γ(1/ν)/Γ(3/ν)): the moment fit, of many populations at once.

The moment estimator of Sharifi & Leon-Garcia (1995), taken about zero: the formats and the rate that build on it are
symmetric.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.ggd.blocks import blocks

#: The shapes that a fit can return. ρ(0.1) = 216 and ρ(10) = 1.34; a uniform sample (ν → ∞) has 4/3.
SHAPE_RANGE = (0.1, 10.0)

#: Newton's steps allowed; from where it starts, four to seven are enough.
MOST_STEPS = 60


@dataclass(frozen=True)
class Moments:
    """The first two absolute moments of T populations: tensors, or rows of one.

    Attributes:
        first: (T,) float64 on the CPU, E|x|; NaN for an empty one.
        second: (T,) float64 on the CPU, E[x²].
        counts: (T,) float64 on the CPU, the elements.
    """

    first: Tensor
    second: Tensor
    counts: Tensor

    @classmethod
    def of_sums(cls, sums: Tensor, counts: Sequence[int]) -> "Moments":
        """E = Σ / n, from what `absolute_sums` returns, (T, 2), and the elements of each."""
        n = torch.tensor(counts, dtype=torch.float64)
        return cls(sums[:, 0] / n, sums[:, 1] / n, n)

    @property
    def usable(self) -> Tensor:
        """(T,) bool: neither empty, nor all zero, nor NaN or infinity in it."""
        return torch.isfinite(self.second) & (self.second > 0) & (self.first > 0)

    @property
    def ratio(self) -> Tensor:
        """(T,) float64, E[x²]/E[|x|]², at least 1; 2, the Laplacian's, if there is none."""
        # ρ ≥ 1 holds for every sample (Cauchy-Schwarz); rounding may miss it by an ulp.
        return torch.where(self.usable, self.second / self.first.square(), 2.0).clamp(min=1.0)

    @property
    def shape(self) -> Tensor:
        """ν = ρ⁻¹(E[x²]/E[|x|]²), (T,) float64, clamped to SHAPE_RANGE; 1 for what is not usable."""
        return shape_of_ratio(self.ratio)

    def scale(self, shape: Tensor) -> Tensor:
        """α = √(E[x²]·Γ(1/ν)/Γ(3/ν)), (T,) float64: the scale that keeps σ, for any ν that broadcasts."""
        return self.second.sqrt() * ((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2).exp()

    def pooled(self) -> "Moments":
        """Return the moments of all usable populations taken as one; T = 1."""
        keep = self.usable | (self.second == 0)
        counts = self.counts[keep].sum().reshape(1)
        first, second = ((mean * self.counts)[keep].sum().reshape(1) / counts for mean in (self.first, self.second))
        return Moments(first, second, counts)


def absolute_sums(weights: Sequence[Tensor]) -> Tensor:
    """(Σ|x|, Σx²) of each tensor, (T, 2) float64 on the CPU; one transfer to the host for each device.

    The sums are taken in float64, a block at a time: neither the dtype nor the size costs precision, and no second
    copy of a weight is made. Sums of a tensor's parts add up to those of the whole.

    Args:
        weights: floating, any shapes, strides, dtypes and devices.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    places: dict[torch.device, list[int]] = {}
    for index, weight in enumerate(weights):
        wide = torch.float32 if weight.device.type == "mps" else torch.float64  # which that device does not have
        for block in blocks(weight.detach()):
            magnitude = block.to(wide, copy=True).abs_()
            sums.setdefault(block.device, []).append(torch.stack([magnitude.sum(), magnitude.dot(magnitude)]))
            places.setdefault(block.device, []).append(index)
    total = torch.zeros(len(weights), 2, dtype=torch.float64)
    for device, parts in sums.items():
        total.index_add_(0, torch.tensor(places[device]), torch.stack(parts).cpu().double())
    return total


def moments(weights: Sequence[Tensor]) -> Moments:
    """E|x| and E[x²] of each tensor; as `absolute_sums` takes them."""
    return Moments.of_sums(absolute_sums(weights), [weight.numel() for weight in weights])


def log_moment_ratio(shape: float) -> float:
    """ln ρ(ν) = lnΓ(1/ν) + lnΓ(3/ν) − 2 lnΓ(2/ν), where ρ(ν) = E[x²]/E[|x|]² for μ = 0; falls as ν grows."""
    return math.lgamma(1 / shape) + math.lgamma(3 / shape) - 2 * math.lgamma(2 / shape)


def shape_of_ratio(ratio: Tensor) -> Tensor:
    """ν = ρ⁻¹(ratio) to the last bits, clamped to SHAPE_RANGE.

    With x = 1/ν, ln ρ is convex and rises with x, and lies above its asymptote (3 ln 3 − 4 ln 2)·x + ln(2/√3)
    (Stirling's formula). So Newton's method that starts on the asymptote comes from the right and never overshoots.

    Args:
        ratio: any shape, float64, E[x²]/E[|x|]² ≥ 1.

    Returns:
        The same shape, float64.
    """
    low, high = SHAPE_RANGE
    given = ratio.log()
    target = given.clamp(log_moment_ratio(high), log_moment_ratio(low))
    x = (target - math.log(2 / math.sqrt(3))) / (3 * math.log(3) - 4 * math.log(2))
    for _ in range(MOST_STEPS):
        excess = x.lgamma() + (3 * x).lgamma() - 2 * (2 * x).lgamma() - target
        step = excess / (x.digamma() + 3 * (3 * x).digamma() - 4 * (2 * x).digamma())
        x = x - step
        if not bool((step.abs() > 1e-12 * x).any()):
            break
    # The ends exactly, whatever the last steps rounded.
    return torch.where(given <= log_moment_ratio(high), high, torch.where(given >= log_moment_ratio(low), low, 1 / x))


def shape_of_moment_ratio(ratio: float) -> float:
    """ν = ρ⁻¹(E[x²]/E[|x|]²) of one population; as `shape_of_ratio`."""
    return shape_of_ratio(torch.tensor(ratio, dtype=torch.float64)).item()
