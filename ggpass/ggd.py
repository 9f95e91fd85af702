"""f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν): the generalized Gaussian and its fit to weights by moments."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.errors import WeightError

#: The shapes that a fit can return. ρ(0.1) = 216 and ρ(10) = 1.34; a uniform sample (ν → ∞) has 4/3.
SHAPE_RANGE = (0.1, 10.0)

#: Elements summed at a time, so that the float64 copies of one block stay near 8 MB each.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class GGD:
    """f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν); ν = 2 is the Gaussian, ν = 1 the Laplacian.

    Attributes:
        shape: ν > 0; the smaller, the heavier the tails.
        scale: α > 0, in the units of x (a Gaussian of deviation σ has α = σ√2).
        mean: μ.

    Raises:
        ValueError: ν or α is not a positive number, or μ not a number.
    """

    shape: float
    scale: float
    mean: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("shape", self.shape), ("scale", self.scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"the {name} of a generalized Gaussian is a positive number, not {value!r}")
        if not math.isfinite(self.mean):
            raise ValueError(f"the mean of a generalized Gaussian is a finite number, not {self.mean!r}")

    @property
    def std(self) -> float:
        """σ = α · √(Γ(3/ν) / Γ(1/ν))."""
        return self.scale * math.exp((math.lgamma(3 / self.shape) - math.lgamma(1 / self.shape)) / 2)

    @property
    def entropy(self) -> float:
        """h = (1/ν + ln(2αΓ(1/ν)/ν)) / ln 2, the differential entropy in bits."""
        return (1 / self.shape - self._log_peak) / math.log(2)

    @property
    def _log_peak(self) -> float:
        """ln f(μ) = ln(ν / (2αΓ(1/ν)))."""
        return math.log(self.shape / (2 * self.scale)) - math.lgamma(1 / self.shape)

    def log_density(self, x: Tensor) -> Tensor:
        """ln f(x) = ln(ν / (2αΓ(1/ν))) − (|x − μ|/α)^ν.

        Args:
            x: any shape, floating.

        Returns:
            The same shape; float32, or float64 where x is.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._log_peak - ((x - self.mean).abs() / self.scale) ** self.shape

    def density(self, x: Tensor) -> Tensor:
        """f(x) = ν / (2αΓ(1/ν)) · exp(−(|x − μ|/α)^ν); shapes and dtypes as in `log_density`."""
        return self.log_density(x).exp()


def log_moment_ratio(shape: float) -> float:
    """ln ρ(ν) = lnΓ(1/ν) + lnΓ(3/ν) − 2 lnΓ(2/ν), where ρ(ν) = E[x²]/E[|x|]² for μ = 0; falls as ν grows."""
    return math.lgamma(1 / shape) + math.lgamma(3 / shape) - 2 * math.lgamma(2 / shape)


def shape_of_moment_ratio(ratio: float) -> float:
    """ν = ρ⁻¹(E[x²]/E[|x|]²), by bisection in ln ν to the last bits of a float; clamped to SHAPE_RANGE."""
    low, high = SHAPE_RANGE
    target = math.log(ratio)
    if target >= log_moment_ratio(low):
        return low
    if target <= log_moment_ratio(high):
        return high
    while high - low > 1e-14 * high:
        middle = math.sqrt(low * high)
        if log_moment_ratio(middle) > target:  # heavier tails than the data: ν is larger
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def fit_moments(weight: Tensor) -> GGD:
    """ρ(ν) = Γ(1/ν)Γ(3/ν)/Γ(2/ν)² = E[x²]/E[|x|]², α = √(E[x²]·Γ(1/ν)/Γ(3/ν)), μ = 0.

    The moment estimator of Sharifi & Leon-Garcia (1995), taken about zero: the formats and the rate that
    build on it are symmetric.

    1. The sums are taken in float64, a block at a time: neither the dtype nor the size costs precision, and
       no second copy of the weight is made.
    2. ν lies in SHAPE_RANGE: heavier tails give its lower end, lighter ones (a constant magnitude, or flatter
       than a GGD of ν = 10) its upper end; σ is √E[x²] all the same.

    Args:
        weight: any shape and strides, floating.

    Raises:
        WeightError: empty, all zero, not floating, or NaN or infinity in it: no such density exists.
    """
    if not weight.is_floating_point():
        raise WeightError(
            "a generalized Gaussian is fitted to floating weights, not "
            f"{str(weight.dtype).removeprefix('torch.')}; skip this tensor"
        )
    if weight.numel() == 0:
        raise WeightError("a generalized Gaussian cannot be fitted to an empty tensor; skip this weight")
    first = second = 0.0
    for block in _blocks(weight.detach()):
        magnitude = block.double().abs()
        first += magnitude.sum().item()
        second += magnitude.square_().sum().item()
    if not math.isfinite(second):
        raise WeightError("NaN, infinity or a square beyond float64 among the weights; repair or skip this weight")
    if second == 0:
        raise WeightError("a generalized Gaussian cannot be fitted to zeros only; skip this weight")
    first, second = first / weight.numel(), second / weight.numel()
    # ρ ≥ 1 holds for every sample (Cauchy-Schwarz); rounding may miss it by an ulp.
    shape = shape_of_moment_ratio(max(1.0, second / first**2))
    log_ratio = math.lgamma(1 / shape) - math.lgamma(3 / shape)
    return GGD(shape, math.exp(0.5 * (math.log(second) + log_ratio)))


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    """Every element once, in flat blocks of at most BLOCK_ELEMENTS that are views, whatever the strides."""
    weight = weight.permute(sorted(range(weight.dim()), key=lambda d: -weight.stride()[d]))
    if weight.is_contiguous():
        yield from weight.view(-1).split(BLOCK_ELEMENTS)
    elif weight.dim() == 1:
        yield from weight.split(BLOCK_ELEMENTS)
    else:
        for part in weight:
            yield from _blocks(part)
