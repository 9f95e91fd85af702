"""drop(λ) = ln(H(shrunk by λ) / H): what a strength will do to the bits, forecast on a sample of the weights."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.passes.backslash.proximal import Slope, slope_of
from ggpass.passes.backslash.sharded import gather, local_part, offset_of, shards_of
from ggpass.passes.backslash.statistics import histogram

#: Weights looked at, about; a model with fewer is looked at whole.
SAMPLE = 1 << 16


@dataclass(frozen=True)
class Forecast:
    """A sample of weights, and how much a unit of λ shrinks each of them until the next measurement.

    Attributes:
        sample: (S,) float32 on the CPU.
        shrinkage: (S,) float32 on the CPU, in units of weight for λ = 1; at least 0.
        step: Δ of the grid that the bits are counted on.
    """

    sample: Tensor
    shrinkage: Tensor
    step: float

    def bits(self, strength: float) -> float:
        """H of the sample after λ has shrunk it."""
        limit = self.shrinkage * strength
        shrunk = self.sample - torch.maximum(torch.minimum(self.sample, limit), -limit)
        return histogram([shrunk], self.step).bits

    def log_drop(self, strength: float) -> float:
        """ln(H after / H before); 0 if there are no bits to lose."""
        return math.log(max(self.bits(strength), 1e-9) / self.before) if self.before > 0 else 0.0

    @functools.cached_property
    def before(self) -> float:
        """H of the sample as it is."""
        return self.bits(0.0)

    @property
    def largest(self) -> float:
        """Return the λ that would bring half of the weights with |q| ≥ 1 to zero; 0 if it acts on none."""
        acts = (self.shrinkage > 0) & (self.sample.abs() > self.step / 2)
        return (self.sample[acts].abs() / self.shrinkage[acts]).median().item() if bool(acts.any()) else 0.0


def sample_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """Every k-th weight, k = ⌈elements / SAMPLE⌉ counted through each tensor; the same on every rank.

    A tensor that is sharded along its first dimension gives the weights that it would give in one piece.

    Returns:
        1-D float32 tensors on the CPU, one for each weight tensor.
    """
    stride = max(1, math.ceil(sum(weight.numel() for weight in weights) / SAMPLE))
    found = []
    for weight in weights:
        shards = shards_of(weight)
        local = local_part(weight.detach()).reshape(-1)
        picked = local[-offset_of(weight) % stride :: stride].float()
        found.append((picked if shards is None else gather(picked, shards)).cpu())
    return found


def forecast(weights: Sequence[Tensor], slopes: Sequence[Slope], steps: Sequence[float]) -> Forecast:
    """Return the forecast for a λ of 1, whose steps together shrink each weight by its slope.

    Args:
        weights: floating; every rank that holds a part of one must call this.
        slopes: one for each, ln τ for all the steps until the next measurement.
        steps: Δ of the grid of each.
    """
    samples = sample_of(weights)
    shrinkages = [slope_of(sample, slope) for sample, slope in zip(samples, slopes)]
    # All in units of the first one's step, so that one grid holds the symbols of all.
    step, empty = next(iter(steps), 1.0), torch.zeros(0)
    samples, shrinkages = ([v * (step / s) for v, s in zip(values, steps)] for values in (samples, shrinkages))
    return Forecast(torch.cat([empty, *samples]), torch.cat([empty, *shrinkages]), step)
