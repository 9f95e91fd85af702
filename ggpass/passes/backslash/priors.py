"""ν/(α^ν ln 2) of every regularized weight: the generalized Gaussians in force, and how they follow the weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ggpass.ggd.moments import Moments
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.statistics import moments

#: A weight of its tensor's deviation σ moves by at most this share of σ in one proximal step, whatever λ is.
LARGEST_SHARE = 0.25


class Priors:
    """The shape, scale and deviation of each weight tensor as of the last fit.

    Attributes:
        shapes: ν of each; 1 before its first fit.
        scales: α of each, in units of weight; NaN before its first fit, and then it has no rate yet.
        deviations: σ = √E[θ²] of each; NaN before its first fit.
        broken: indices of tensors in which the last fit found NaN or infinity.
    """

    def __init__(self, count: int) -> None:
        self.shapes = [1.0] * count
        self.scales = [math.nan] * count
        self.deviations = [math.nan] * count
        self.broken: set[int] = set()

    def update(self, weights: Sequence[Tensor], settings: RateSettings) -> list[int]:
        """Fit every tensor that can be: an empty or all-zero one, or one with NaN, keeps the fit it has.

        Returns:
            Indices of the tensors in which NaN or infinity is new.
        """
        found = moments(weights)
        shape, scale = self._paper(found) if settings.is_paper else self._fitted(found, settings)
        for index, usable in enumerate(found.usable.tolist()):
            if usable:
                self.shapes[index], self.scales[index] = shape[index].item(), scale[index].item()
                self.deviations[index] = math.sqrt(found.second[index].item())
        return self.find_broken(found)

    def find_broken(self, found: Moments) -> list[int]:
        """Return indices of the tensors in which NaN or infinity is new."""
        broken = {i for i, bad in enumerate((~torch.isfinite(found.second) & (found.counts > 0)).tolist()) if bad}
        new = sorted(broken - self.broken)
        self.broken = broken
        return new

    @staticmethod
    def _fitted(found: Moments, settings: RateSettings) -> tuple[Tensor, Tensor]:
        """ν ≤ ν_max and α of each tensor by its own moments, or as they are given."""
        ones = torch.ones_like(found.first)
        shape = found.shape.clamp(max=settings.shape_max) if settings.shape is None else ones * settings.shape
        scale = found.scale(shape) if settings.scale is None else ones * settings.scale
        return shape, scale

    @staticmethod
    def _paper(found: Moments) -> tuple[Tensor, Tensor]:
        """Return one ν for all weights, and the α that makes ν/(α^ν ln 2) the paper's ν/N: α = (N/ln 2)^(1/ν)."""
        shape = found.pooled().shape.expand_as(found.first)
        return shape, (found.counts.sum() / math.log(2)) ** (1 / shape)

    def log_slope(self, index: int) -> float:
        """ln(ν/(α^ν ln 2)), the factor of (|θ|+ε)^(ν−1) in bits per unit of weight; −∞ before the first fit."""
        shape, scale = self.shapes[index], self.scales[index]
        return -math.inf if math.isnan(scale) else math.log(shape / math.log(2)) - shape * math.log(scale)

    def log_largest_factor(self, index: int, epsilon: float) -> float:
        """Return the ln τ at which a weight of size σ moves by LARGEST_SHARE·σ; −∞ before the first fit."""
        deviation = self.deviations[index]
        if math.isnan(deviation):
            return -math.inf
        return math.log(LARGEST_SHARE * deviation) - (self.shapes[index] - 1) * math.log(deviation + epsilon)

    def as_tensor(self) -> Tensor:
        """(T, 3) float64: ν, α, σ."""
        return torch.tensor([self.shapes, self.scales, self.deviations], dtype=torch.float64).T.contiguous()

    def load_tensor(self, state: Tensor) -> None:
        """Continue from `as_tensor()`."""
        self.shapes, self.scales, self.deviations = state.double().T.tolist()
