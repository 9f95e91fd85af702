"""ν/(α^ν ln 2) of every regularized weight: the generalized Gaussians in force, and how they follow the weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ggpass.training.settings import RateSettings
from ggpass.training.statistics import moments, scale_of, shape_of

#: A weight of its tensor's deviation σ moves by at most this share of σ in one step, whatever λ is.
LARGEST_SHARE = 0.25


class Fits:
    """The shape and scale of each weight tensor as of the last fit.

    Attributes:
        shapes: ν of each; 1 before its first fit.
        scales: α of each, in units of weight; NaN before its first fit, and then it has no rate yet.
        broken: indices of tensors in which the last fit found NaN or infinity.
    """

    def __init__(self, count: int) -> None:
        self.shapes = [1.0] * count
        self.scales = [math.nan] * count
        self.factors = [-math.inf] * count
        self.broken: set[int] = set()

    def update(self, weights: Sequence[Tensor], settings: RateSettings) -> list[int]:
        """Fit every tensor that can be: an empty or all-zero one, or one with NaN, keeps the fit it has.

        Returns:
            Indices of the tensors in which NaN or infinity is new.
        """
        found = moments(weights)
        ratio = torch.where(found.usable, found.second / found.first.square(), 2.0).clamp(min=1.0)
        shape = shape_of(ratio) if settings.shape is None else torch.full_like(ratio, settings.shape)
        shape = shape.clamp(max=settings.slope_shape_max)
        scale = scale_of(shape, found.second) if settings.scale is None else torch.full_like(ratio, settings.scale)
        for index, usable in enumerate(found.usable.tolist()):
            if usable:
                self._set(index, shape[index].item(), scale[index].item())
        broken = {i for i, bad in enumerate((~torch.isfinite(found.second) & (found.counts > 0)).tolist()) if bad}
        new = sorted(broken - self.broken)
        self.broken = broken
        return new

    def _set(self, index: int, shape: float, scale: float) -> None:
        self.shapes[index], self.scales[index] = shape, scale
        known = not math.isnan(scale)
        self.factors[index] = math.log(shape / math.log(2)) - shape * math.log(scale) if known else -math.inf

    def log_slope(self, index: int) -> float:
        """ln(ν/(α^ν ln 2)), the factor of (|θ|+ε)^(ν−1) in bits per unit of weight; −∞ before the first fit."""
        return self.factors[index]

    def deviation(self, index: int) -> float:
        """σ = α·√(Γ(3/ν)/Γ(1/ν))."""
        shape = self.shapes[index]
        return self.scales[index] * math.exp((math.lgamma(3 / shape) - math.lgamma(1 / shape)) / 2)

    def log_largest_factor(self, index: int, epsilon: float) -> float:
        """The ln τ at which a weight of size σ moves by LARGEST_SHARE·σ."""
        deviation = self.deviation(index)
        if math.isnan(deviation):
            return -math.inf
        return math.log(LARGEST_SHARE * deviation) - (self.shapes[index] - 1) * math.log(deviation + epsilon)

    def first_strength(
        self, rates: dict[int, float], weights: Sequence[nn.Parameter], epsilon: float, ramp: int
    ) -> float:
        """A λ to begin with: unopposed for the whole ramp it would move a weight of size σ by σ/10, in the median."""
        guesses = []
        for index, weight in enumerate(weights):
            rate = rates.get(id(weight), 0.0)
            if rate > 0 and not math.isnan(self.scales[index]):
                # log_largest_factor − log_slope is ln of the lr·λ that moves a weight of size σ by LARGEST_SHARE·σ.
                largest = self.log_largest_factor(index, epsilon) - self.log_slope(index) - math.log(rate)
                guesses.append(largest + math.log(0.1 / LARGEST_SHARE / ramp))
        return math.exp(sorted(guesses)[len(guesses) // 2]) if guesses else 0.0

    def as_tensor(self) -> Tensor:
        """(T, 2) float64: ν and α."""
        return torch.tensor([self.shapes, self.scales], dtype=torch.float64).T.contiguous()

    def load_tensor(self, state: Tensor) -> None:
        """Continue from `as_tensor()`."""
        for index, (shape, scale) in enumerate(state.tolist()):
            self._set(index, shape, scale)
