"""ρ(ν) = E[x²]/E[|x|]²: a generalized Gaussian fitted to weights by moments."""

import math

from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.blocks import blocks
from ggpass.ggd.density import GGD

#: The shapes that a fit can return. ρ(0.1) = 216 and ρ(10) = 1.34; a uniform sample (ν → ∞) has 4/3.
SHAPE_RANGE = (0.1, 10.0)


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
    for block in blocks(weight.detach()):
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
