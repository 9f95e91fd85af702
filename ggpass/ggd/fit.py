"""ρ(ν) = E[x²]/E[|x|]²: a generalized Gaussian fitted to one weight by moments."""

import math

from torch import Tensor

from ggpass.errors import WeightError
from ggpass.ggd.density import GGD
from ggpass.ggd.moments import moments


def fit_moments(weight: Tensor) -> GGD:
    """ρ(ν) = Γ(1/ν)Γ(3/ν)/Γ(2/ν)² = E[x²]/E[|x|]², α = √(E[x²]·Γ(1/ν)/Γ(3/ν)), μ = 0.

    The fit of `ggpass.ggd.moments` for one weight.

    1. The sums are taken in float64, a block at a time.
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
    found = moments([weight])
    if not math.isfinite(found.second.item()):
        raise WeightError("NaN, infinity or a square beyond float64 among the weights; repair or skip this weight")
    if found.second.item() == 0:
        raise WeightError("a generalized Gaussian cannot be fitted to zeros only; skip this weight")
    shape = found.shape
    return GGD(shape.item(), found.scale(shape).item())
